"""The schema as keys: every dotted leaf, what a key takes in plain words, and the nearest valid name."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, TypeAlias, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from launcher.config.document import dotted
from launcher.config.schema import (
    CheckpointSection,
    ClusterConfig,
    RunConfig,
    Section,
    SkipSection,
    TrainSection,
)

Names: TypeAlias = tuple[str, ...]

_DURATION = "a number of steps, or a duration such as 30min"
_IN_WORDS: Mapping[tuple[type[Section], str], str] = {
    (SkipSection, "steps"): "a list of steps such as [120, 130-135]",
    (CheckpointSection, "every"): _DURATION,
    (TrainSection, "eval_every"): _DURATION,
}
_PLAIN: Mapping[object, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping of names to values",
    type(None): "null",
    None: "null",
}


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that this key always is; None for a leaf, and for a section that may be absent."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def leaves(model: type[Section], at: Names = ()) -> Iterator[tuple[Names, FieldInfo]]:
    """Every key that is not itself a section of keys, in the order of the schema."""
    for name, field in model.model_fields.items():
        section = section_of(field)
        if section is None:
            yield (*at, name), field
        else:
            yield from leaves(section, (*at, name))


def sections(model: type[Section], at: Names = ()) -> Iterator[tuple[Names, type[Section]]]:
    """Every section, the model itself first."""
    yield at, model
    for name, field in model.model_fields.items():
        section = section_of(field)
        if section is not None:
            yield from sections(section, (*at, name))


def nearest(word: str, names: Iterable[str], most: int = 3, alike: float = 0.65) -> list[str]:
    """The names that `word` may be a slip of, or the initials of (`lr`), the likeliest first."""
    import difflib

    folded = {name.lower(): name for name in names}
    initials = [name for name in folded.values() if "_" in name and word == _initials(name)]
    close = difflib.get_close_matches(word.lower(), list(folded), most, alike)
    return initials or [folded[match] for match in close]


def _initials(name: str) -> str:
    return "".join(part[:1] for part in name.split("_"))


def did_you_mean(names: Iterable[str]) -> str:
    """`did you mean a or b?`"""
    return f"did you mean {' or '.join(names)}?"


def where_it_belongs(model: type[Section], section: type[Section], parent: str, name: str) -> str:
    """What to write in place of the unknown key `name` of `section`, which stands at the dotted `parent`."""
    above, dot, last = name.rpartition(".")
    if dot and name in {dotted(leaf) for leaf, _ in leaves(model)}:
        return f"write {last} under {above}"
    if not parent and (elsewhere := _other_file(model, name)):
        return elsewhere
    homes = [at for at, other in sections(model) if name in other.model_fields]
    if homes:
        return "; ".join(f"{name} belongs {_inside(at)}: {dotted((*at, name))}" for at in homes)
    before = f"{parent}." if parent else ""
    close = nearest(name, section.model_fields)
    if close:
        return did_you_mean(before + match for match in close)
    everywhere = {key: dotted((*at, key)) for at, other in sections(model) for key in other.model_fields}
    far = nearest(name, everywhere, most=1, alike=0.8)  # misplaced and misspelt: only what is clear
    if far:
        return did_you_mean([everywhere[far[0]]])
    return f"{parent or 'the top level'} has {', '.join(section.model_fields)}"


def _other_file(model: type[Section], name: str) -> str | None:
    """Which of the two files a top-level key goes in, where it is not the one of `model`."""
    if model is RunConfig and name in {"cluster", *ClusterConfig.model_fields}:
        return "what describes the cluster goes in a file of its own, given with --cluster"
    if model is ClusterConfig and name in RunConfig.model_fields:
        return "it belongs in the run file"
    return None


def _inside(section: Names) -> str:
    return f"in {dotted(section)}" if section else "at the top level"


def takes(section: type[Section], name: str) -> str:
    """What the key `name` of `section` takes, in plain words."""
    return _IN_WORDS.get((section, name)) or in_words(section.model_fields[name])


def arms(field: FieldInfo) -> list[FieldInfo]:
    """The alternatives of a union, each with its own bounds; a field that is no union is its only one."""
    kind: object = field.annotation
    if get_origin(kind) in (Union, types.UnionType):
        return [FieldInfo.from_annotation(arm) for arm in get_args(kind)]
    return [field]


def inside(field: FieldInfo, step: str | int) -> list[FieldInfo]:
    """What may stand at `step` (an index or a key) inside a value of this field, for each alternative."""
    found: list[FieldInfo] = []
    for arm in arms(field):
        kind: object = arm.annotation
        section = section_of(arm)
        if section is not None:
            found += [inner for name, inner in section.model_fields.items() if name == step]
        elif isinstance(step, int) and get_origin(kind) in (list, tuple):
            found.append(FieldInfo.from_annotation(get_args(kind)[0]))
        elif isinstance(step, str) and get_origin(kind) is dict:
            found.append(FieldInfo.from_annotation(get_args(kind)[1]))
    return found


def in_words(field: FieldInfo) -> str:
    """What a field takes, in plain words: `a whole number from 1 on`, `auto, or true or false`."""
    alternatives = arms(field)
    if len(alternatives) > 1:
        return ", or ".join(in_words(arm) for arm in alternatives)
    kind: object = field.annotation
    origin, inner = get_origin(kind), get_args(kind)
    section = section_of(field)
    if section is not None:
        return "{" + ", ".join(section.model_fields) + "}"
    if origin is Literal:
        return str(inner[0]) if len(inner) == 1 else f"one of {', '.join(map(str, inner))}"
    if origin is list:
        return f"a list of {in_words(FieldInfo.from_annotation(inner[0]))}".replace("of one of", "out of")
    if origin is tuple:
        return f"a list of {len(inner)} numbers"
    return _PLAIN[origin or kind] + _bounds_in_words(field)


def _bounds_in_words(field: FieldInfo) -> str:
    low, above, below = (
        next((value for bound in field.metadata if (value := getattr(bound, name, None)) is not None), None)
        for name in ("ge", "gt", "lt")
    )
    if low is not None and below is not None and field.annotation is int:
        return f" from {low} to {below - 1}"
    if low is not None:
        return f" from {low} on"
    return f" above {above}" if above is not None else ""
