"""Rules over more than one key.

Each rule names the keys it reads and is given their plain values; it is judged whenever all of them
are sound, whatever else is wrong in the file, so that one pass reports everything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from launcher.config.addresses import no_pattern_in
from launcher.config.faults import shown
from launcher.config.gpus import gpu_is_known
from launcher.config.keys import did_you_mean, in_words, nearest
from launcher.config.secrets import is_secret, secret_in
from launcher.config.slurm import (
    SLURM_KEYS,
    needs_a_description,
    options_as_written,
    single_lines,
    slurm_unused,
)
from launcher.config.training_arguments import FORMER, FREE, SECRET, SET_BY_LAUNCHER
from launcher.errors import Fault

LENGTHS = ("tokens", "steps", "epochs")


@dataclass(frozen=True)
class Rule:
    """`judge` is given the values of `needs`, in that order, and yields the faults, without places."""

    needs: tuple[str, ...]
    judge: Callable[..., Iterator[Fault]]


def broken(rules: tuple[Rule, ...], parts: Mapping[str, Any]) -> list[Fault]:
    """Every fault in `parts` (dotted path -> plain value), without places."""
    return [
        fault
        for rule in rules
        if all(key in parts for key in rule.needs)
        for fault in rule.judge(*(parts[key] for key in rule.needs))
    ]


def one_length(*lengths: float | None) -> Iterator[Fault]:
    given = [f"train.{name}" for name, value in zip(LENGTHS, lengths, strict=True) if value is not None]
    one_of = "exactly one of train.tokens, train.steps and train.epochs says how long to train"
    if not given:
        yield Fault("train", f"{one_of}, and none is set", hint="set one of them")
    for extra in given[1:]:
        yield Fault(extra, f"{one_of}, and {given[0]} is set too", hint="keep one of them")


def tokens_of_padded_rows(tokens: int | None, packing: str) -> Iterator[Fault]:
    if tokens is not None and packing != "concat":
        yield Fault(
            "train.tokens",
            f"with data.packing {packing} rows differ in length, so tokens do not say how many steps to take",
            hint="set train.steps or train.epochs, or data.packing: concat",
        )


def epochs_of_a_stream(mode: str, epochs: float | None) -> Iterator[Fault]:
    if mode == "stream" and epochs is not None:
        yield Fault(
            "train.epochs",
            "with data.mode stream nobody has counted how many blocks an epoch has",
            hint="set train.steps or train.tokens, or data.mode: prepared",
        )


def packing_of_a_stream(mode: str, packing: str) -> Iterator[Fault]:
    if mode == "stream" and packing != "concat":
        yield Fault(
            "data.packing",
            f"{packing} needs all documents at hand, and data.mode stream reads them as they come",
            hint="set data.packing: concat, or data.mode: prepared",
        )


def loader_of_a_stream(mode: str, extra: Mapping[str, object]) -> Iterator[Fault]:
    if mode == "stream" and extra.get("dataloader_num_workers"):
        yield Fault(
            "train.extra.dataloader_num_workers",
            "with data.mode stream a thread of the rank itself reads ahead",
            hint="take it out of train.extra",
        )


def curve_of_a_schedule(schedule: str, extra: Mapping[str, object]) -> Iterator[Fault]:
    known = {"num_cycles"} if schedule == "cosine" else set()
    asked = extra.get("lr_scheduler_kwargs") or {}
    for name in asked if isinstance(asked, dict) else ():
        if name not in known:
            yield Fault(
                "train.extra.lr_scheduler_kwargs",
                f"train.schedule {schedule} takes no {name}",
                hint="cosine takes num_cycles; linear and constant take nothing",
            )


def overrides_from_scratch(init: str, overrides: Mapping[str, object]) -> Iterator[Fault]:
    if init == "pretrained" and overrides:
        yield Fault(
            "model.overrides",
            "pretrained weights have the shape they have",
            hint="set model.init: scratch, or take the overrides out",
        )


def tokenizer_of_pretrained(init: str, tokenizer: object) -> Iterator[Fault]:
    if init == "pretrained" and isinstance(tokenizer, Mapping):
        yield Fault(
            "model.tokenizer",
            "pretrained weights know only the ids of their own tokenizer",
            hint="set model.tokenizer: null, or model.init: scratch",
        )


def betas_below_one(betas: list[float]) -> Iterator[Fault]:
    for index, beta in enumerate(betas):
        if not 0 <= beta < 1:
            yield Fault(
                f"train.betas.{index}",
                f"expected a number from 0 up to, but not including, 1, got {beta:g}",
                hint="0.9 and 0.95 are usual for language models",
            )


def warmup_in_steps(warmup: float, steps: int | None) -> Iterator[Fault]:
    if warmup >= 1 and not float(warmup).is_integer():
        yield Fault(
            "train.warmup",
            f"from 1 on it is a number of steps, which {warmup:g} is not",
            hint="write a whole number of steps, or a fraction below 1",
        )
    elif steps is not None and warmup > steps:
        yield Fault(
            "train.warmup",
            f"{int(warmup)} steps of warmup do not fit in {int(steps)} steps of training",
            hint=f"write at most {int(steps)}, or a fraction below 1 such as 0.02",
        )


def cache_of_isolated_documents(isolate: bool, packing: str, extra: Mapping[str, object]) -> Iterator[Fault]:
    if isolate and packing != "pad" and extra.get("use_cache"):
        yield Fault(
            "train.extra.use_cache",
            "with a cache the documents of a row see each other, and data.isolate_documents keeps them apart",
            hint="take it out of train.extra: training has no use for a cache",
        )


def validation_fraction(validation: float | list[str]) -> Iterator[Fault]:
    if isinstance(validation, list):
        if not validation:
            yield Fault("data.validation", "the list of files is empty", hint="write 0 for no validation")
    elif not 0 <= validation < 1:
        yield Fault(
            "data.validation",
            f"expected a fraction from 0 up to, but not including, 1, got {validation:g}",
            hint="write 0.01 for one document in a hundred, 0 for none, or a list of files",
        )


def stopping_needs_validation(early_stopping: object, validation: float | list[str]) -> Iterator[Fault]:
    if early_stopping is not None and validation == 0:
        yield Fault(
            "train.early_stopping",
            "it watches eval_loss, and data.validation is 0",
            hint="set data.validation, or train.early_stopping: null",
        )


def skipping_a_stream(mode: str, *skipped: list[Any]) -> Iterator[Fault]:
    for name, given in zip(("steps", "documents"), skipped, strict=True):
        if mode == "stream" and given:
            yield Fault(
                f"data.skip.{name}",
                "a stream has no store to find banned text in",
                hint="set data.mode: prepared, or take it out of data.skip",
            )


OFFLOADS: Mapping[str, tuple[str, ...]] = {
    "auto": ("none", "optimizer", "parameters"),
    "ddp": ("none",),
    "zero1": ("none", "optimizer"),
    "zero2": ("none", "optimizer"),
    "zero3": ("none", "optimizer", "parameters"),
    "fsdp": ("none", "parameters"),
}
"""What each strategy can keep in CPU memory."""


def offload_of_a_strategy(strategy: str, offload: str) -> Iterator[Fault]:
    if offload not in OFFLOADS[strategy]:
        able = [name for name, can in OFFLOADS.items() if offload in can and name != "auto"]
        yield Fault(
            "train.offload",
            f"train.strategy {strategy} cannot keep the {offload} in CPU memory",
            hint=f"set train.strategy: {' or '.join(able)}, or train.offload: none",
        )


def source_names_differ(train: list[Any]) -> Iterator[Fault]:
    names = [source["name"] for source in train if isinstance(source, Mapping)]
    for index, name in enumerate(names):
        if name in names[:index]:
            yield Fault(
                f"data.train.{index}.name",
                f"two sources are called {name}",
                hint="give each source its own name, or put the files of both in one source",
            )


_NAMED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def names_in_modules(key: str, example: str) -> Callable[[list[str]], Iterator[Fault]]:
    def judge(names: list[str]) -> Iterator[Fault]:
        for index, name in enumerate(names):
            if _NAMED.fullmatch(name) is None:
                yield Fault(
                    f"{key}.{index}", f"expected module:name, got {name}", hint=f"write it as {example}"
                )

    return judge


_DOCUMENTED = "transformers documents the fields of TrainingArguments"


def extra_fields(extra: Mapping[str, Any]) -> Iterator[Fault]:
    for name, value in extra.items():
        path = f"train.extra.{name}"
        if name in SECRET:
            yield Fault(
                path, "it is a secret, and this file is copied to the run directory", hint=SECRET[name]
            )
        elif name in SET_BY_LAUNCHER:
            yield Fault(path, "launcher sets this TrainingArguments field itself", hint=SET_BY_LAUNCHER[name])
        elif name in FORMER:
            yield Fault(path, "TrainingArguments has no such field any more", hint=FORMER[name])
        elif name not in FREE:
            yield Fault(path, "TrainingArguments has no such field", hint=_nearest_field(name))
        elif not _is_of(FREE[name], value):
            expected = in_words(FieldInfo.from_annotation(FREE[name]))
            yield Fault(path, f"expected {expected}, got {shown(value)}", hint=_DOCUMENTED)


def _is_of(kind: Any, value: object) -> bool:
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _nearest_field(name: str) -> str:
    close = nearest(name, [*FREE, *SET_BY_LAUNCHER])
    free = [f"train.extra.{match}" for match in close if match in FREE]
    if free:
        return did_you_mean(free)
    return SET_BY_LAUNCHER[close[0]] if close else _DOCUMENTED


def env_holds_no_secret(env: Mapping[str, str]) -> Iterator[Fault]:
    for name, value in env.items():
        if is_secret(name.upper(), value):
            yield Fault(
                f"env.{name}",
                "it looks like a secret, and this file is copied to the run directory",
                hint=f"export {name} in the shell that starts launcher: ranks and jobs inherit it",
            )
        elif not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            yield Fault(
                f"env.{name}",
                "this cannot be the name of an environment variable",
                hint="letters, digits and underscores, not starting with a digit",
            )


def _files(files: object) -> list[str]:
    """Every path in `data.train` or `data.validation`, whichever of their forms they have."""
    if isinstance(files, str):
        return [files]
    if isinstance(files, Mapping):
        return _files(files["files"])
    return [path for entry in files for path in _files(entry)] if isinstance(files, list) else []


def paths_say_something(key: str) -> Callable[[object], Iterator[Fault]]:
    def judge(files: object) -> Iterator[Fault]:
        if "" in _files(files):
            yield Fault(
                key, "an empty path names no file", hint="name a file, a glob or a URL; or take it out"
            )
        for path in _files(files):
            if (wrong := no_pattern_in(path)) and not secret_in(path):  # it quotes the host
                yield Fault(key, f"{wrong[0]}: nothing can match it", hint=wrong[1])

    return judge


RUN_RULES = (
    Rule(tuple(f"train.{name}" for name in LENGTHS), one_length),
    Rule(("train.tokens", "data.packing"), tokens_of_padded_rows),
    Rule(("data.mode", "train.epochs"), epochs_of_a_stream),
    Rule(("data.mode", "data.packing"), packing_of_a_stream),
    Rule(("data.mode", "train.extra"), loader_of_a_stream),
    Rule(("train.schedule", "train.extra"), curve_of_a_schedule),
    Rule(("model.init", "model.overrides"), overrides_from_scratch),
    Rule(("model.init", "model.tokenizer"), tokenizer_of_pretrained),
    Rule(("data.train",), source_names_differ),
    Rule(("data.isolate_documents", "data.packing", "train.extra"), cache_of_isolated_documents),
    Rule(("data.validation",), validation_fraction),
    Rule(("data.train",), paths_say_something("data.train")),
    Rule(("data.validation",), paths_say_something("data.validation")),
    Rule(("train.betas",), betas_below_one),
    Rule(("train.warmup", "train.steps"), warmup_in_steps),
    Rule(("train.early_stopping", "data.validation"), stopping_needs_validation),
    Rule(("data.mode", "data.skip.steps", "data.skip.documents"), skipping_a_stream),
    Rule(("train.strategy", "train.offload"), offload_of_a_strategy),
    Rule(("train.metrics",), names_in_modules("train.metrics", "my_metrics:accuracy")),
    Rule(("train.callbacks",), names_in_modules("train.callbacks", "my_callbacks:MyCallback")),
    Rule(("train.extra",), extra_fields),
)
CLUSTER_RULES = (
    Rule(("env",), env_holds_no_secret),
    Rule(("gpu",), gpu_is_known),
    Rule(("launch", "gpus_per_node", "gpu"), needs_a_description),
    Rule(("launch", *SLURM_KEYS), slurm_unused),
    Rule(SLURM_KEYS, single_lines),
    Rule(("slurm.extra",), options_as_written),
)
