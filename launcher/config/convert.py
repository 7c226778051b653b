"""What a DeepSpeed JSON and an accelerate YAML say together, as settings of launcher's own files.

Where two keys say different things, or one asks for what launcher does not do, that is a fault; whatever else
is not taken over is listed with the reason. Nothing is guessed, and nothing is passed over in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from launcher.config.document import Document, Value
from launcher.config.faults import shown
from launcher.config.from_accelerate import KNOWN as OF_ACCELERATE
from launcher.config.from_accelerate import read_accelerate
from launcher.config.from_deepspeed import KNOWN as OF_DEEPSPEED
from launcher.config.from_deepspeed import read_deepspeed
from launcher.config.load import faults_in_run
from launcher.config.old_file import Left, OldFile, Said
from launcher.config.presets import Setting, starter_run
from launcher.errors import ConfigError, Fault

Sayings = Mapping[str, Sequence[Said]]
"""Everything said of each target."""

_MARKS: Mapping[str, frozenset[str]] = {
    "accelerate": frozenset(
        {"distributed_type", "num_machines", "num_processes", "mixed_precision", "dynamo_backend", "use_cpu"}
        | {key.partition(".")[0] for key in OF_ACCELERATE}
    ),
    "DeepSpeed": frozenset(
        {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
        | {"gradient_clipping", "optimizer"}
        | {key.partition(".")[0] for key in OF_DEEPSPEED}
    ),
}
_INSTEAD: Mapping[str, str] = {
    "accumulation": "accumulation follows from train.batch_size, train.micro_batch and the ranks",
    "world": "it is used to work out train.batch_size: a run file names no machine",
    "deepspeed_file": "launcher writes DeepSpeed's file itself",
    "off.bf16": "train.precision names the one format there is",
    "off.fp16": "train.precision names the one format there is",
}
_ONE_RANK = "it is one rank: the cluster file's gpus_per_node says how many there are"
_NO_PRECISION = "the training arguments, or the model's own weights, said it: set train.precision"


@dataclass(frozen=True)
class Conversion:
    """`settings`, by dotted key (`train.strategy`, `cluster.nodes`), and what was not taken over.

    `origins` has the old key that each setting comes from.
    """

    settings: Mapping[str, Setting]
    origins: Mapping[str, Said]
    left: tuple[Left, ...]

    def of(self, section: str) -> dict[str, Setting]:
        """The settings of `train` or `cluster`."""
        return {key: each for key, each in self.settings.items() if key.startswith(f"{section}.")}

    def run(self, preset: str, name: str) -> str:
        """A starter run file with the settings of `train`. Raises ConfigError, placed in the old files."""
        text = starter_run(preset, name, _nested(self.of("train")))
        faults = [self._placed(fault) for fault in faults_in_run(text)]
        if faults:
            raise ConfigError(faults)
        return text

    def _placed(self, fault: Fault) -> Fault:
        """The fault at the old key that its value came from."""
        for key, said in self.origins.items():
            if fault.path == key or fault.path.startswith(f"{key}."):
                return replace(fault, path=said.key, place=said.place, message=f"as {key}: {fault.message}")
        return fault


def convert(documents: Sequence[Document]) -> Conversion:
    """What the files say together. Raises ConfigError with every conflict, each at its file and key."""
    files, faults = _read(documents)
    sayings: dict[str, list[Said]] = {}
    for said in (said for file in files for said in file.said):
        sayings.setdefault(said.target, []).append(said)
    faults += [fault for file in files for fault in file.faults]
    faults += _differing(sayings)
    faults += _precisions(sayings)
    faults += _files_not_given(sayings, documents)
    batch, batch_faults, left = _batch(sayings)
    faults += batch_faults
    if faults:
        raise ConfigError(faults)
    origins = {said[0].target: said[0] for said in sayings.values() if _is_ours(said[0].target)} | batch
    if "train.micro_batch" not in batch:
        origins.pop("train.micro_batch", None)
    if "train.precision" not in origins and (off := _no_half_precision(sayings)):
        origins["train.precision"] = off
    defaults = {said.target: said for file in files for said in file.defaults}
    origins = {**defaults, **origins}
    settings = {key: Setting(said.value, f"{said.place} {said.key}") for key, said in origins.items()}
    taken = {said.key for said in origins.values()}
    told = [
        Left(each.key, each.place, f"{_said(said[0])} says the same")
        for target, said in sayings.items()
        if target not in _INSTEAD
        for each in said[1:]
        if each.key not in taken
    ]
    instead = _INSTEAD if batch or "train.batch_size" in sayings else {**_INSTEAD, "world": _ONE_RANK}
    told += [
        Left(each.key, each.place, instead[target])
        for target, said in sayings.items()
        if target in instead
        for each in said
        if not (target == "world" and "cluster.gpus_per_node" in sayings and each.key == "num_processes")
    ]
    if not {"train.precision", "unknown.train.precision"} & {*origins, *sayings}:
        left = [*left, Left("no bf16, fp16 or mixed_precision", documents[0].label, _NO_PRECISION)]
    return Conversion(settings, origins, (*(each for file in files for each in file.left), *told, *left))


def _is_ours(target: str) -> bool:
    return target.startswith(("train.", "cluster."))


def _nested(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """train.extra's fields as one mapping, as a starter file has it."""
    extra = {
        key.removeprefix("train.extra."): s for key, s in settings.items() if key.startswith("train.extra.")
    }
    flat = {key: s for key, s in settings.items() if not key.startswith("train.extra.")}
    if extra:
        comment = ", ".join(each.comment for each in extra.values())
        flat["train.extra"] = Setting({name: each.value for name, each in extra.items()}, comment)
    return flat


def _read(documents: Sequence[Document]) -> tuple[list[OldFile], list[Fault]]:
    files: list[OldFile] = []
    faults: list[Fault] = []
    seen: dict[str, str] = {}
    for document in documents:
        kind = _kind(document)
        if isinstance(document.value, dict) and {"model", "data", "train"} <= document.value.keys():
            hint = "copy it: --from is for a DeepSpeed JSON or an accelerate YAML"
            faults.append(Fault(document.label, "this is a run file of launcher's already", hint=hint))
        elif kind is None:
            message = "neither a DeepSpeed JSON nor an accelerate YAML: it has none of their keys"
            faults.append(Fault(document.label, message, document.label, "name one of these files"))
        elif kind in seen:
            message = f"a second file of {kind}'s, beside {seen[kind]}"
            faults.append(Fault(document.label, message, document.label, "give the one that the run used"))
        else:
            seen[kind] = document.label
            files.append(read_deepspeed(document) if kind == "DeepSpeed" else read_accelerate(document))
    return files, faults


def _kind(document: Document) -> str | None:
    """Whose file it is: the one of whose keys it has the most."""
    keys = set(document.value) if isinstance(document.value, dict) else set()
    counts = {kind: len(keys & marks) for kind, marks in _MARKS.items()}
    kind = max(counts, key=lambda each: counts[each])
    return kind if counts[kind] else None


def _said(said: Said) -> str:
    return f"{said.place} {said.key}"


def _differing(sayings: Sayings) -> Iterator[Fault]:
    for target, said in sayings.items():
        for other in said[1:]:
            if other.value != said[0].value:
                values = f"{_plain(other.value)}, and {_plain(said[0].value)} by {_said(said[0])}"
                message = f"{target} would be {values}"
                yield Fault(other.key, message, other.place, "keep the one that the run used")


def _plain(value: Value) -> str:
    return value if isinstance(value, str) else shown(value)


def _precisions(sayings: Sayings) -> Iterator[Fault]:
    """accelerate asks for a precision that DeepSpeed's file says is off."""
    for said in sayings.get("train.precision", ()):
        for off in sayings.get(f"off.{said.value}", ()):
            if off.place.partition(":")[0] != said.place.partition(":")[0]:
                message = f"{said.value} is off, and on by {_said(said)}"
                yield Fault(off.key, message, off.place, "keep the one that the run used")


def _no_half_precision(sayings: Sayings) -> Said | None:
    """DeepSpeed trains in fp32 where it is told that bf16 or fp16 is off, and nothing of the other."""
    off = [*sayings.get("off.bf16", ()), *sayings.get("off.fp16", ())]
    if not off or "unknown.train.precision" in sayings:
        return None
    return replace(off[0], target="train.precision", value="fp32")


def _files_not_given(sayings: Sayings, documents: Sequence[Document]) -> Iterator[Fault]:
    if any(_kind(document) == "DeepSpeed" for document in documents):
        return
    for said in sayings.get("deepspeed_file", ()):
        message = f"the strategy is in {_plain(said.value)}, which was not given"
        yield Fault(said.key, message, said.place, "add it with another --from")


def _batch(sayings: Sayings) -> tuple[dict[str, Said], list[Fault], list[Left]]:
    """train.batch_size and train.micro_batch, by DeepSpeed's `_set_batch_related_parameters`."""
    first = {target: said[0] for target, said in sayings.items()}
    total, micro = first.get("train.batch_size"), first.get("train.micro_batch")
    factors = [each for each in (micro, first.get("accumulation"), first.get("world")) if each is not None]
    known = _product(factors)
    said_all = " x ".join(f"{each.value} ({_said(each)})" for each in factors)
    knows_steps = "unknown.accumulation" not in sayings  # where nothing is said, DeepSpeed accumulates over 1
    if total is None:
        if micro is None:
            return {}, [], []
        if "world" not in first or not knows_steps:
            why = "without the ranks and the accumulation it does not say train.batch_size: set both by hand"
            return {}, [], [Left(micro.key, micro.place, why)]
        return (
            {"train.batch_size": replace(micro, target="train.batch_size", value=known), **_as(micro)},
            [],
            [],
        )
    assert isinstance(total.value, int)
    if total.value % known or (len(factors) == 3 and total.value != known):
        hint = "make train_batch_size micro-batch x accumulation x ranks"
        asked = "is not" if len(factors) == 3 else "is no multiple of"
        return {}, [Fault(total.key, f"{total.value} {asked} {said_all}", total.place, hint)], []
    if micro is None and "world" in first and "unknown.train.micro_batch" not in sayings and knows_steps:
        micro = replace(total, target="train.micro_batch", value=total.value // known)
    return _as(micro), [], []


def _as(micro: Said | None) -> dict[str, Said]:
    return {} if micro is None else {"train.micro_batch": micro}


def _product(factors: Sequence[Said]) -> int:
    product = 1
    for factor in factors:
        assert isinstance(factor.value, int)
        product *= factor.value
    return product
