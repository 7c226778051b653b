"""YAML and KEY=VALUE in, a checked configuration out, with where each value came from.

The file is read first and the overrides are laid over it in their order. A value of KEY=VALUE is
YAML; `null` clears a key, as if it had never been written. An override is the last word: one of
train.tokens, train.steps and train.epochs clears the other two where the file sets them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from launcher.config.document import Document, KeyPath, Value, dotted, parse, write
from launcher.config.faults import explain, shown, sound_parts
from launcher.config.keys import leaves
from launcher.config.rules import CLUSTER_RULES, LENGTHS, RUN_RULES, Rule, broken
from launcher.config.schema import ClusterConfig, RunConfig, Section
from launcher.config.secrets import is_private, secret_in, secrets_in
from launcher.errors import ConfigError, Fault

Config = TypeVar("Config", bound=Section)

DEFAULT = "default"


@dataclass(frozen=True)
class Loaded(Generic[Config]):
    """A checked configuration, and where each value came from.

    `origins` has every leaf key of the schema, and every key inside a leaf that is a mapping
    (`model.overrides.n_layer`): `run.yaml:12`, `override train.batch_size=7` or `default`.
    """

    config: Config
    origins: Mapping[str, str]


@dataclass(frozen=True)
class _Override:
    key: str
    value: Value
    place: str


def load_files(
    run: Path, overrides: Sequence[str], cluster: Path | None
) -> tuple[Loaded[RunConfig], Loaded[ClusterConfig]]:
    """As `load_run` and `load_cluster`. Raises ConfigError with every fault of both files."""
    try:
        loaded = load_run(run, overrides)
    except ConfigError as error:
        try:
            load_cluster(cluster)
        except ConfigError as other:
            raise ConfigError([*error.faults, *other.faults]) from error
        raise
    return loaded, load_cluster(cluster)


def load_run(path: Path, overrides: Sequence[str] = ()) -> Loaded[RunConfig]:
    """Read a run file and lay `overrides` (KEY=VALUE) over it. Raises ConfigError with every fault."""
    document = read_mapping(path)
    if _is_rather(ClusterConfig, RunConfig, document):
        raise ConfigError([Fault(document.label, "this is a cluster file", hint="give it with --cluster")])
    laid_over, faults = _overrides(overrides)
    cleared = _lengths_cleared(laid_over)
    return _load(RunConfig, document, [*cleared, *laid_over], faults, RUN_RULES)


def load_cluster(path: Path | None) -> Loaded[ClusterConfig]:
    """Read a cluster file; None: all defaults, this machine as found. Raises ConfigError with every fault."""
    if path is None:
        document = Document({}, (), "cluster", False, None)
    else:
        document = read_mapping(path, "`launcher init FILE --cluster` writes a starter file")
    if _is_rather(RunConfig, ClusterConfig, document):
        hint = "give it without --cluster, and with --cluster a file that says where to train"
        raise ConfigError([Fault(document.label, "this is a run file", hint=hint)])
    return _load(ClusterConfig, document, [], [], CLUSTER_RULES)


def _is_rather(other: type[Section], model: type[Section], document: Document) -> bool:
    """Whether the file has keys that only `other` has, and none that only `model` has."""
    keys = document.value.keys() if isinstance(document.value, dict) else set()
    names, others = set(model.model_fields), set(other.model_fields)
    return bool(keys & (others - names)) and not keys & (names - others)


def faults_in_run(text: str) -> tuple[Fault, ...]:
    """Every fault that `load_run` would find in a file that holds `text`."""
    try:
        _load(RunConfig, _mapping(parse(text, label="run.yaml")), [], [], RUN_RULES)
    except ConfigError as error:
        return error.faults
    return ()


def dump(config: Section) -> str:
    """YAML with every value written out, in the order of the schema; loading it gives an equal config."""
    return write(config.model_dump(mode="json"))


def differences(a: Config, b: Config) -> list[str]:
    """Dotted paths of the leaves whose values differ, in the order of the schema."""
    left, right = (dict(_flat(config.model_dump(mode="json"))) for config in (a, b))
    paths = [*left, *(path for path in right if path not in left)]
    return [dotted(path) for path in paths if _exactly(left, path) != _exactly(right, path)]


def _exactly(values: dict[KeyPath, Value], path: KeyPath) -> str | None:
    """The value as JSON, which tells 1 from true as Python does not."""
    return json.dumps(values[path], sort_keys=True) if path in values else None


def _flat(values: Value, at: KeyPath = ()) -> Iterator[tuple[KeyPath, Value]]:
    if isinstance(values, dict) and values:
        for name, value in values.items():
            yield from _flat(value, (*at, name))
    elif values != {}:
        yield at, values


def read_mapping(path: Path, hint: str = "`launcher init` writes a starter file") -> Document:
    """The mapping in a YAML or JSON file; `hint` is for one that is not there. Raises ConfigError."""
    name = path.name
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError([Fault(str(path), "no such file", hint=hint)]) from error
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        raise ConfigError([Fault(str(path), reason, hint="save it as UTF-8")]) from error
    except OSError as error:
        inside = path / "config.yaml"
        of_a_run = f"give the run's own file: {inside}" if inside.is_file() else None
        raise ConfigError([Fault(str(path), f"cannot be read: {error.strerror}", hint=of_a_run)]) from error
    document = parse(text, label=name)
    if document.value is None:
        raise ConfigError([Fault(name, "the file is empty", name, hint)])
    return _mapping(document)


def read_mappings(paths: Sequence[Path], hint: str) -> list[Document]:
    """The mappings in several files. Raises ConfigError with the faults of all of them."""
    documents: list[Document] = []
    faults: list[Fault] = []
    for path in paths:
        try:
            documents.append(read_mapping(path, hint))
        except ConfigError as error:
            faults.extend(error.faults)
    if faults:
        raise ConfigError(faults)
    return documents


def _mapping(document: Document) -> Document:
    if not isinstance(document.value, dict):
        reason = f"expected a mapping of keys, got {shown(document.value)}"
        hint = "write one `key: value` a line"
        raise ConfigError([Fault(document.label, reason, document.label, hint)])
    return document


_KEY_VALUE = "write it like train.batch_size=64, without spaces"


def _overrides(texts: Sequence[str]) -> tuple[list[_Override], list[Fault]]:
    overrides: list[_Override] = []
    faults: list[Fault] = []
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")) or secret_in(key):
            known = "..." if secret_in(text) else f"{key}=..." if equals else text
            place = f"override {known}"
            faults.append(
                Fault(
                    "..." if secret_in(text) else key or equals,
                    "expected KEY=VALUE with a dotted key",
                    place,
                    _KEY_VALUE,
                )
            )
            continue
        place = f"override {key}=" + ("..." if _may_hold_secret(key, value) else value)
        try:
            document = parse(value, label=place, lines=False, root=tuple(key.split(".")))
        except ConfigError as error:
            faults.extend(error.faults)
            continue
        faults.extend(document.faults)
        overrides.append(_Override(key, document.value, place))
    return overrides, faults


def _may_hold_secret(key: str, value: str) -> bool:
    """Messages repeat an override as given, except a secret, and a mapping or URL that may hold one."""
    in_url = "://" in value and any(mark in value for mark in "?@#;")
    return is_private(key) or in_url or secret_in(value) is not None or "{" in value or ": " in value


def _lengths_cleared(overrides: list[_Override]) -> list[_Override]:
    """The clearing of train.tokens, train.steps and train.epochs that an override of one of them brings."""
    lengths = [f"train.{name}" for name in LENGTHS]
    return [
        _Override(other, None, override.place)
        for override in overrides
        if override.key in lengths and override.value is not None
        for other in lengths
        if other != override.key
    ]


def _load(
    model: type[Config],
    document: Document,
    overrides: list[_Override],
    faults: list[Fault],
    rules: tuple[Rule, ...],
) -> Loaded[Config]:
    values = document.value
    assert isinstance(values, dict)
    for override in overrides:
        _assign(values, override)
    found: list[Fault] = []
    config: Config | None = None
    bad: set[KeyPath] = set()
    plain: Value = values
    try:
        # JSON mode because a YAML list is what strict pydantic calls a tuple only there.
        config = model.model_validate_json(json.dumps(values))
        plain = config.model_dump(mode="json")
    except ValidationError as error:
        found, bad = explain(model, values, error.errors(include_url=False))
    found += broken(rules, sound_parts(model, plain, bad))
    secrets = list(secrets_in(values))
    # What else is wrong with a secret would repeat it.
    found = [
        each for each in found if not any(_covers(secret.path, each.path) for secret in secrets)
    ] + secrets
    placed = [replace(fault, place=_place(fault.path, document, overrides)) for fault in found]
    every = [*document.faults, *placed, *faults]
    if every or config is None:
        raise ConfigError(sorted(every, key=lambda fault: _line(fault, document)))
    return Loaded(config, _origins(model, plain, document, overrides))


def _line(fault: Fault, document: Document) -> float:
    """Sorts faults as the file reads; those of no one line come first, those of overrides last."""
    place = fault.place or document.label
    if place == document.label:
        return 0
    line = place.removeprefix(f"{document.label}:")
    return int(line) if line.isdecimal() else float("inf")


def _assign(values: dict[str, Value], override: _Override) -> None:
    *sections, name = override.key.split(".")
    here = values
    for section in sections:
        deeper = here.get(section)
        if not isinstance(deeper, dict):
            if override.value is None:
                return
            deeper = here[section] = {}
        here = deeper
    if override.value is None:
        here.pop(name, None)
    else:
        here[name] = override.value


def _covers(key: str, other: str) -> bool:
    """Whether `key` is `other` or a section that `other` is in."""
    return other == key or other.startswith(key + ".")


def _place(key: str, document: Document, overrides: list[_Override]) -> str:
    """Where `key` was set, or else the nearest thing around it."""
    inside = None
    for override in reversed(overrides):
        if _covers(override.key, key):
            return override.place
        if _covers(key, override.key):
            inside = inside or override.place
    return inside if inside is not None and not document.has_section(key) else document.place(key)


def _origins(
    model: type[Section], plain: Value, document: Document, overrides: list[_Override]
) -> dict[str, str]:
    named = [dotted(path) for path, _ in leaves(model)]
    inner = [dotted(path) for path, _ in _flat(plain) if dotted(path) not in named]
    return {key: _origin(key, document, overrides) for key in [*named, *inner]}


def _origin(key: str, document: Document, overrides: list[_Override]) -> str:
    for override in reversed(overrides):
        if _covers(override.key, key) or _covers(key, override.key):
            return override.place
    return document.place(key) if document.has(key) else DEFAULT
