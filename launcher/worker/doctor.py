"""Which fast paths a model takes, tried on a short copy of it: what `launcher doctor --model` runs.

`python -m launcher.worker.doctor`: JSON with `model` (its transformers config), `fast` (the plan's) and
`block_size` on standard input; a list of checks, each with name, state, found and remedy, on standard output.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from launcher.plan.fast import Fast
from launcher.worker.fast import make_fast
from launcher.worker.tracing import compiled, watch

LAYERS = 2
"""Of the copy: what holds for two layers holds for all."""

TOKENS = 64
ROWS = 2

Check = Mapping[str, str | None]


def short_copy(fields: Mapping[str, Any]) -> PreTrainedModel:
    """The model of these config fields, in fp32 with few layers and random weights."""
    rest = {key: value for key, value in fields.items() if key != "model_type"}
    config = AutoConfig.for_model(fields["model_type"], **rest)
    config.num_hidden_layers = min(LAYERS, config.num_hidden_layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.loss_type = "ForCausalLM"
    model.config.use_cache = False
    return model


def examine(model: PreTrainedModel, fast: Fast, block_size: int) -> Iterator[Check]:
    """A check for each planned path of the model, then what a pass through it shows."""
    fell_back = make_fast(model, fast, block_size=block_size)
    for name in ("tanh_gelu", "causal_attention", "chunked_loss", "padded_vocabulary"):
        key = f"train.fast.{name}"
        if name in fell_back:
            yield _check(key, "warning", f"falls back: {fell_back[name]}")
        else:
            yield _check(key, "ok", f"off: {fast.off[name]}" if name in fast.off else "taken")
    ids = torch.arange(ROWS * min(TOKENS, block_size)).reshape(ROWS, -1)
    ids = ids % model.config.get_text_config().vocab_size
    inputs = {"input_ids": ids, "labels": ids, "num_items_in_batch": torch.tensor(ids.numel())}
    model.train()
    seen, graphs = watch(model, inputs), compiled(model, inputs)
    if not seen.attentions:
        how = f"no fused attention: {model.config._attn_implementation}"
        yield _check("attention", "warning", how, "set attn_implementation: sdpa in model.overrides")
    elif seen.masked:
        yield _check("attention", "warning", f"a dense mask in {seen.masked} of {seen.attentions} layers")
    else:
        yield _check("attention", "ok", "fused and causal, without a mask")
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


def _check(name: str, state: str, found: str, remedy: str | None = None) -> Check:
    return {"name": name, "state": state, "found": found, "remedy": remedy}


def main() -> int:
    asked = json.load(sys.stdin)
    logging.set_verbosity_error()
    try:
        model = short_copy(asked["model"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        checks = [_check("model", "missing", f"cannot be built: {error}", "check model.name and overrides")]
    else:
        checks = list(examine(model, Fast(**asked["fast"]), asked["block_size"]))
    json.dump(checks, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
