"""Which fast paths a model takes, tried on a short copy of it: what `launcher doctor --model` runs.

`python -m launcher.worker.doctor`: JSON with `model` (its transformers config), `fast` (the plan's) and
`data` (the run's section) on standard input; a list of checks, each with name, state, found and remedy, as
the last line of standard output.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from logging import WARNING, Handler, LogRecord
from typing import Any, Final

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from launcher.config.schema import DataSection
from launcher.errors import RequestError
from launcher.plan.fast import Fast
from launcher.worker.collate import IGNORED, Tensors, collate_of
from launcher.worker.fast import CAUSAL, make_fast
from launcher.worker.probe import check_predicts_next
from launcher.worker.tracing import TracedPass, compiled, watch

LAYERS = 2
"""Of the copy, or as many as it takes to have one of each type: what holds for these holds for all."""

TOKENS = 61
"""A prime, so that what is as long on two sides are the scores of an attention."""
END_OF_TEXT = 0

FALLS_BACK: Final = re.compile(
    r"(\S+) (?:is falling back to its reference|not available .* falling back to a Python)"
)
INSTALL: Final = re.compile(r"(?:; |`pip )install `?([^`]+)`")
"""How transformers says that a kernel is missing, and what to install."""

Check = Mapping[str, str | None]


def short_copy(fields: Mapping[str, Any]) -> PreTrainedModel:
    """The model of these config fields, in fp32 with few layers and random weights."""
    rest = {key: value for key, value in fields.items() if key != "model_type"}
    config = AutoConfig.for_model(fields["model_type"], **rest)
    _shorten(config.get_text_config())
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.loss_type = "ForCausalLM"
    model.config.use_cache = False
    return model


def _shorten(config: Any) -> None:
    types = getattr(config, "layer_types", None) or []
    layers = max([LAYERS, *(1 + types.index(each) for each in set(types))])
    with suppress(AttributeError):  # the number has another name, or the types are worked out from it
        config.num_hidden_layers = min(layers, config.num_hidden_layers)
        config.layer_types = config.layer_types[:layers]


class _Told(Handler):
    """What transformers warned of."""

    def __init__(self) -> None:
        super().__init__(WARNING)
        self.messages: list[str] = []

    def emit(self, record: LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def transformers_warnings() -> Iterator[list[str]]:
    """While inside, what transformers warns of goes into the list, though it was said before."""
    told, verbosity = _Told(), logging.get_verbosity()
    logging.warning_once.cache_clear()
    logging.disable_default_handler()
    logging.add_handler(told)
    logging.set_verbosity_warning()
    try:
        yield told.messages
    finally:
        logging.set_verbosity(verbosity)
        logging.remove_handler(told)
        logging.enable_default_handler()


def examine(model: PreTrainedModel, fast: Fast, data: DataSection) -> list[Check]:
    """What `model` shows when it is tried, and the kernels that transformers had no package for."""
    with transformers_warnings() as told:
        checks = list(_tried(model, fast, data))
    return [*checks, *of_kernels(told)]


def of_kernels(told: list[str]) -> Iterator[Check]:
    """A check where transformers told of slower code in a kernel's place."""
    slow = {text: found[1].strip("`") for text in told if (found := FALLS_BACK.search(text))}
    if slow:
        packages = dict.fromkeys(found[1] for text in slow if (found := INSTALL.search(text)))
        what = f"missing, slower code runs instead: {', '.join(slow.values())}"
        yield _check("kernels", "warning", what, f"install {', '.join(packages)}" if packages else None)


def _tried(model: PreTrainedModel, fast: Fast, data: DataSection) -> Iterator[Check]:
    """A check for each planned path of the model, then what a pass through it on rows of `data` shows."""
    try:
        check_predicts_next(model, data.block_size)
    except RequestError as error:
        yield _check("loss", "missing", error.message, error.hint)
        return
    fell_back = make_fast(model, fast, block_size=data.block_size)
    for name in ("tanh_gelu", "causal_attention", "chunked_loss", "padded_vocabulary"):
        key = f"train.fast.{name}"
        if name in fell_back:
            yield _check(key, "warning", f"falls back: {fell_back[name]}")
        else:
            yield _check(key, "ok", f"off: {fast.off[name]}" if name in fast.off else "taken")
    inputs = _batch(model, data)
    model.train()
    try:
        seen, graphs = watch(model, inputs), compiled(model, inputs)
    except Exception as error:  # noqa: BLE001 - a model of any kind
        yield _check("pass", "warning", f"the model does not run here on rows of this data: {error}")
        return
    yield from _of_attention(model, seen, data)
    if graphs.masked:
        yield _check("attention, compiled", "warning", f"a dense mask in {graphs.masked} layers")
    if seen.waits:
        yield _check(
            "host", "warning", f"waits for the GPU {seen.waits} times in a forward and backward pass"
        )
    else:
        yield _check("host", "ok", "never waits for the GPU in a forward and backward pass")
    if graphs.count == 1 and not graphs.breaks:
        yield _check("torch.compile", "ok", "one graph")
    else:
        broken = f"{graphs.count} graphs: {'; '.join(dict.fromkeys(graphs.breaks))}"
        yield _check("torch.compile", "warning", broken)


def _batch(model: PreTrainedModel, data: DataSection) -> Tensors:
    """Two rows of two documents, as the run makes tensors of them; one is shorter where rows may be."""
    vocabulary, tokens = model.config.get_text_config().vocab_size, min(TOKENS, data.block_size)
    flash = str(model.config._attn_implementation).startswith("flash")
    collate = collate_of(data, END_OF_TEXT, END_OF_TEXT, flash=flash)
    row = (np.arange(tokens) + 1) % vocabulary
    row[tokens // 2 - 1] = END_OF_TEXT
    batch = collate([row, row if data.packing == "concat" else row[: -tokens // 4]])
    return {**batch, "num_items_in_batch": batch["labels"].ne(IGNORED).sum()}


def _of_attention(model: PreTrainedModel, seen: TracedPass, data: DataSection) -> Iterator[Check]:
    asked = model.config._attn_implementation
    if not seen.attentions and not seen.by_hand and asked in ("eager", "sdpa", CAUSAL):
        yield _check("attention", "ok", "none in the layers that were tried")
    elif not seen.attentions and asked not in ("sdpa", CAUSAL):
        how = f"no fused attention: {asked}"
        remedy = "set attn_implementation: sdpa in model.overrides" if model._supports_sdpa else None
        yield _check("attention", "warning", how, remedy)
    elif seen.by_hand:
        how = f"computed by hand in {seen.by_hand} of {seen.attentions + seen.by_hand} layers"
        yield _check("attention", "warning", how, "scaled_dot_product_attention computes the same, fused")
    elif seen.masked:
        apart = data.packing != "concat" or data.isolate_documents
        remedy = "data.packing: concat, without data.isolate_documents, needs none" if apart else None
        how = f"a dense mask in {seen.masked} of {seen.attentions} layers"
        yield _check("attention", "warning", how, remedy)
    else:
        yield _check("attention", "ok", "fused and causal, without a mask")


def _check(name: str, state: str, found: str, remedy: str | None = None) -> Check:
    return {"name": name, "state": state, "found": found, "remedy": remedy}


def main() -> int:
    asked = json.load(sys.stdin)
    try:
        with transformers_warnings() as told:
            model = short_copy(asked["model"])
    except (ImportError, OSError, ValueError, TypeError, KeyError) as error:
        checks = [_check("model", "missing", f"cannot be built: {error}", "check model.name and overrides")]
    else:
        checks = [
            *of_kernels(told),
            *examine(model, Fast(**asked["fast"]), DataSection.model_validate(asked["data"])),
        ]
    print(f"\n{json.dumps(checks)}")  # a line of its own, whatever else was printed
    return 0


if __name__ == "__main__":
    sys.exit(main())
