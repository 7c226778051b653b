"""What is wrong with a value, in plain words: one fault for each thing to mend.

Pydantic finds the faults; its words, and its one message for each arm of a union, stay inside.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TypeAlias, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from launcher.config.document import KeyPath, Value, dotted
from launcher.config.keys import (
    arms,
    did_you_mean,
    in_words,
    inside,
    leaves,
    nearest,
    section_of,
    takes,
    where_it_belongs,
)
from launcher.config.schema import Section
from launcher.config.training_arguments import instead_of
from launcher.errors import Fault

Found: TypeAlias = tuple[KeyPath, ErrorDetails]  # a path inside a leaf's value, and what pydantic says of it


def explain(
    model: type[Section], values: Value, errors: Sequence[ErrorDetails]
) -> tuple[list[Fault], set[KeyPath]]:
    """The faults (with no place yet) behind pydantic's errors, and the paths of the keys they are in."""
    faults: list[Fault] = []
    bad: set[KeyPath] = set()
    in_leaf: dict[KeyPath, list[Found]] = defaultdict(list)
    for error in errors:
        section, path, rest = _split(model, error["loc"])
        field = section.model_fields.get(str(path[-1]))
        if field is None:
            faults.append(_unknown(model, section, path))
            continue
        bad.add(path)
        if section_of(field) is None or error["type"] == "missing":
            in_leaf[path].append((rest, error))
        else:
            faults.append(_not_a_section(field, at(values, path), path))
    for path, found in in_leaf.items():
        section, _, _ = _split(model, path)
        faults += _in_leaf(section, values, path, found)
    return faults, bad


def sound_parts(model: type[Section], values: Value, bad: set[KeyPath]) -> dict[str, Value]:
    """Every leaf outside `bad`, by dotted path: as it was written, or its default."""
    parts: dict[str, Value] = {}
    for path, field in leaves(model):
        if any(path[: len(wrong)] == wrong for wrong in bad):
            continue
        section = at(values, path[:-1])
        if isinstance(section, dict) and path[-1] in section:
            parts[dotted(path)] = section[path[-1]]
        elif not field.is_required():
            parts[dotted(path)] = field.get_default(call_default_factory=True)
    return parts


def at(values: Value, path: KeyPath) -> Value:
    """What stands at `path`; None where there is nothing."""
    here = values
    for step in path:
        if isinstance(here, dict) and isinstance(step, str):
            here = here.get(step)
        elif isinstance(here, list) and isinstance(step, int) and step < len(here):
            here = here[step]
        else:
            return None
    return here


def shown(value: Value) -> str:
    """A value as a message may show it: short, and without what a list or a mapping holds (a secret may)."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "a mapping"
    text = json.dumps(value, ensure_ascii=False)
    is_text = isinstance(value, str)
    if len(text) > 60:
        text = text[:56] + ('..."' if is_text else "...")
    return f"the text {text}" if is_text else text


def _split(model: type[Section], loc: KeyPath) -> tuple[type[Section], KeyPath, KeyPath]:
    """Pydantic's location as the section, the whole path of the key in it, and the rest inside its value."""
    section = model
    for depth, step in enumerate(loc[:-1], start=1):
        field = section.model_fields.get(str(step))
        deeper = section_of(field) if field is not None else None
        if deeper is None:
            return section, loc[:depth], loc[depth:]
        section = deeper
    return section, loc, ()


def _unknown(model: type[Section], section: type[Section], path: KeyPath) -> Fault:
    parent, name = dotted(path[:-1]), str(path[-1])
    foreign = instead_of(name) if parent == "train" else None
    return Fault(dotted(path), "unknown key", hint=foreign or where_it_belongs(model, section, parent, name))


def _not_a_section(field: FieldInfo, value: Value, path: KeyPath) -> Fault:
    hint = f"under it go {in_words(field)[1:-1]}" + ("" if field.is_required() else "; or leave it out")
    return Fault(dotted(path), f"expected a mapping of keys, got {shown(value)}", hint=hint)


def _in_leaf(section: type[Section], values: Value, path: KeyPath, found: list[Found]) -> list[Fault]:
    name = str(path[-1])
    field = section.model_fields[name]
    if any(error["type"] == "missing" and not rest for rest, error in found):
        return [Fault(dotted(path), "missing required key", hint=field.description)]
    chosen = _likeliest_arm(field, found)
    if any(error["type"] == "missing" and isinstance(rest[-1], int) for rest, error in chosen):
        chosen = []  # a list that is too short: its own fault, not one for each item it lacks
    faults = [
        _inside_leaf(field, values, path, rest, error)
        for rest, error in chosen
        if rest or error["type"] in _SPOKEN
    ]
    return faults or [_wrong_value([field], takes(section, name), at(values, path), path)]


def _likeliest_arm(field: FieldInfo, found: list[Found]) -> list[Found]:
    """The errors of the one alternative the value was meant for; none when no one alternative stands out.

    The alternative whose errors lie deepest agreed with most of the value's shape.
    """
    alternatives = [arm for arm in arms(field) if arm.annotation not in (None, type(None))]
    if len(alternatives) == 1 or any(not rest for rest, _ in found):
        return found
    by_arm: dict[str | int, list[Found]] = defaultdict(list)
    for rest, error in found:
        by_arm[rest[0]].append((rest[1:], error))
    ranked = sorted(by_arm.values(), key=_fit, reverse=True)
    if len(ranked) > 1 and _fit(ranked[0]) == _fit(ranked[1]):
        return []
    return ranked[0]


def _fit(found: list[Found]) -> tuple[int, bool, int]:
    took_the_type = any(error["type"] == "value_error" for _, error in found)
    return min(len(rest) for rest, _ in found), took_the_type, -len(found)


_SPOKEN = ("value_error", "too_short", "string_too_short")  # where a list of types says less than the error


def _inside_leaf(field: FieldInfo, values: Value, path: KeyPath, rest: KeyPath, error: ErrorDetails) -> Fault:
    whole = path + rest
    key, value, kind = dotted(whole), at(values, whole), error["type"]
    if kind == "extra_forbidden":
        return Fault(key, "unknown key", hint=_name_beside(_fields_at(field, rest[:-1]), whole))
    fields = _fields_at(field, rest)
    meaning = next((inner.description for inner in fields if inner.description), None)
    if kind == "missing":
        return Fault(key, "missing required key", hint=meaning)
    if kind == "value_error":
        return Fault(key, f"{error['ctx']['error']}, got {shown(value)}", hint=meaning)
    if kind in _SPOKEN:
        return Fault(key, "it is empty", hint=meaning)
    return _wrong_value(fields, " or ".join(in_words(inner) for inner in fields), value, whole)


def _fields_at(field: FieldInfo, rest: KeyPath) -> list[FieldInfo]:
    fields = [field]
    for step in rest:
        fields = [inner for outer in fields for inner in inside(outer, step)]
    return fields


def _name_beside(fields: list[FieldInfo], path: KeyPath) -> str | None:
    """Which key of the section at `path`'s parent was meant, or else which there are."""
    names = [
        name
        for field in fields
        for arm in arms(field)
        if (section := section_of(arm)) is not None
        for name in section.model_fields
    ]
    close = nearest(str(path[-1]), names)
    if close:
        return did_you_mean(dotted((*path[:-1], name)) for name in close)
    return f"{dotted(path[:-1])} has {', '.join(names)}"


def _wrong_value(fields: list[FieldInfo], words: str, value: Value, path: KeyPath) -> Fault:
    hint = _how_to_write(fields, words, value)
    meaning = next((field.description for field in fields if field.description), None)
    return Fault(dotted(path), f"expected {words}, got {shown(value)}", hint=hint or meaning)


def _how_to_write(fields: list[FieldInfo], words: str, value: Value) -> str | None:
    """The slip that the value looks like, and how to write what was meant."""
    kinds = {get_origin(arm.annotation) or arm.annotation for field in fields for arm in arms(field)}
    if value is None and fields and not fields[0].is_required():
        default = json.dumps(fields[0].get_default(call_default_factory=True))
        return f"leave the key out for its default, {default}"
    if isinstance(value, bool | int | float) and str in kinds and not kinds & {int, float}:
        return f'write it in quotes: "{json.dumps(value)}"'
    if not isinstance(value, str):
        return None
    if bool in kinds and value.lower() in {"yes", "on", "no", "off"}:
        return f"write {'true' if value.lower() in {'yes', 'on'} else 'false'}"
    digits = value.replace("_", "").strip()
    if kinds & {int, float} and _is_number(digits):
        return f"write {value} without quotes" if digits == value else f"write {digits}"
    if list in kinds and str not in kinds:
        return f"write it as a list: [{value}]"
    close = nearest(value, words.removeprefix("one of ").replace(", or ", ", ").split(", "), most=1)
    return did_you_mean(close) if close and " " not in close[0] else None


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and text.isascii()
    except ValueError:
        return False
