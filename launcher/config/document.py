"""YAML as people mean it: plain values, the line each was written on, and the way back to text.

Numbers and booleans follow YAML 1.2: `3e-4` and `10e9` are numbers, only `true` and `false` are
booleans, `0123` is 123, and `24:00:00` and dates are text. JSON is YAML and is read as such.
Infinities and NaN are no numbers here: nothing a run is asked for can be one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import yaml

from launcher.errors import ConfigError, Fault

try:
    from yaml import CSafeLoader as _Base
except ImportError:
    from yaml import SafeLoader as _Base  # type: ignore[assignment]

Value: TypeAlias = "bool | int | float | str | list[Value] | dict[str, Value] | None"
KeyPath: TypeAlias = tuple[str | int, ...]

MOST_VALUES = 100_000  # aliases of aliases grow without bound; no real file comes near this
MOST_LEVELS = 100

_TAG = "tag:yaml.org,2002:"
_CORE_SCHEMA = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
)


class _Loader(_Base):
    """Knows the types of YAML 1.2 and no others, and its depth: the C reader would crash on a deep text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012
    depth = 0

    def descend_resolver(self, current_node: yaml.Node | None, current_index: object) -> None:
        self.depth += 1
        if self.depth > MOST_LEVELS and current_node is not None:
            problem = f"nested more than {MOST_LEVELS} levels deep"
            raise yaml.composer.ComposerError(None, None, problem, current_node.start_mark)

    def ascend_resolver(self) -> None:
        self.depth -= 1


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either YAML 1.1 or 1.2 would take for something other than text."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def write_text(self, text: str) -> yaml.ScalarNode:
        """YAML takes these three for line ends too, and folds them unless they are escaped."""
        style = '"' if any(character in text for character in "\x85\u2028\u2029") else None
        return self.represent_scalar(_TAG + "str", text, style=style)


_Dumper.add_representer(str, _Dumper.write_text)

for _name, _pattern, _first in _CORE_SCHEMA:
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)


@dataclass(frozen=True)
class Document:
    """What a text says: its value, the faults in how it says it, and where each part stands."""

    value: Value
    faults: tuple[Fault, ...]
    label: str
    lines: bool
    root: yaml.Node | None

    def place(self, key: str) -> str:
        """Where the dotted `key` is written, or else the nearest thing around it: `run.yaml:12`."""
        mark = self._find(key)[0]
        return self.label if mark is None or not self.lines else f"{self.label}:{mark.line + 1}"

    def has(self, key: str) -> bool:
        """Whether exactly `key` is written here."""
        return self._find(key)[1] is not None

    def has_section(self, key: str) -> bool:
        """Whether exactly `key` is written here, and holds keys."""
        return isinstance(self._find(key)[1], yaml.MappingNode)

    def _find(self, key: str) -> tuple[yaml.Mark | None, yaml.Node | None]:
        node, mark, rest = self.root, None, key
        while rest:
            found = _child(node, rest)
            if found is None:
                return mark, None
            mark, node, rest = found
        return mark, node


def _child(node: yaml.Node | None, rest: str) -> tuple[yaml.Mark, yaml.Node, str] | None:
    """The first entry of `node` that `rest` starts with, and what is left then; a name may hold dots."""
    entries: list[tuple[str, yaml.Mark, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        entries = [(str(name.value), name.start_mark, value) for name, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        entries = [(str(index), value.start_mark, value) for index, value in enumerate(node.value)]
    for name, mark, value in entries:
        if rest == name or rest.startswith(name + "."):
            return mark, value, rest[len(name) + 1 :]
    return None


def parse(text: str, *, label: str, lines: bool = True, root: KeyPath = ()) -> Document:
    """Read one YAML (or JSON) document.

    `label` names the text in places, followed by the line unless `lines` is false; `root` is the
    dotted path the whole text stands at. Text that is not YAML raises ConfigError with line and
    column; a key set twice is a fault in the result, so that it is reported beside all others.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        builder = _Builder(label, lines)
        value = None if node is None else builder.value(node, root)
    except yaml.MarkedYAMLError as error:
        raise ConfigError([_syntax_fault(error, text, label, lines, root)]) from error
    except (yaml.YAMLError, UnicodeError) as error:
        reason = "not YAML: it holds a character that text may not have"
        raise ConfigError([Fault(dotted(root) or label, reason, label)]) from error
    except RecursionError as error:
        reason = "an alias holds itself"
        raise ConfigError([Fault(dotted(root) or label, reason, label)]) from error
    return Document(value, tuple(builder.faults), label, lines, node)


def _syntax_fault(error: yaml.MarkedYAMLError, text: str, label: str, lines: bool, root: KeyPath) -> Fault:
    mark = error.problem_mark or error.context_mark
    place = label if mark is None or not lines else f"{label}:{mark.line + 1}:{mark.column + 1}"
    problem = error.problem or "it cannot be read"
    if "cannot start any token" in problem and re.search(r"^ *\t", text, re.MULTILINE):
        hint = "indent with spaces, not tabs"
    elif not lines:
        hint = "the value is read as YAML: put quotes around text that holds * & ! % @ or a colon and a space"
    else:
        hint = "look at the quotes, brackets, colons and indentation there and just before"
    return Fault(dotted(root) or label, f"not YAML: {problem}", place, hint)


def _integer(text: str) -> int:
    return int(text, 0) if text[:2] in {"0o", "0x"} else int(text)


_READ: Mapping[str, Callable[[str], Value]] = {
    "str": str,
    "null": lambda _: None,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "int": _integer,
    "float": float,
}


class _Builder:
    """Builds values out of nodes, and notes what is wrong with how they were written."""

    def __init__(self, label: str, lines: bool) -> None:
        self.label = label
        self.lines = lines
        self.faults: list[Fault] = []
        self.count = 0

    def value(self, node: yaml.Node, path: KeyPath) -> Value:
        self.count += 1
        if self.count > MOST_VALUES:
            raise ConfigError([Fault(self.label, f"holds more than {MOST_VALUES:,} values", self.label)])
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        self._fault(node, path, f"the tag {_shown(node.tag)} is not understood", "write a plain value")
        return None

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> Value:
        values: dict[str, Value] = {}
        lines: dict[str, int] = {}
        for key, child in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._fault(key, path, "a key is a name, not a list or a mapping", None)
            elif key.value in values:
                first = f", first on line {lines[key.value]}" if self.lines else ""
                self._fault(key, (*path, key.value), f"set twice{first}", "keep one of them")
            else:
                lines[key.value] = key.start_mark.line + 1
                values[key.value] = self.value(child, (*path, key.value))
        return values

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Value:
        text = str(node.value)
        try:
            value = _READ[node.tag.removeprefix(_TAG)](text)
        except (KeyError, ValueError):
            message = f"{text[:40]} does not fit the tag {_shown(node.tag)}"
            self._fault(node, path, message, "write a plain value, without a tag")
            return None
        if isinstance(value, float) and not math.isfinite(value):
            self._fault(node, path, f"{text[:40]} is not a finite number", "write a smaller number")
        return value

    def _fault(self, node: yaml.Node, path: KeyPath, message: str, hint: str | None) -> None:
        place = f"{self.label}:{node.start_mark.line + 1}" if self.lines else self.label
        self.faults.append(Fault(dotted(path) or self.label, message, place, hint))


def _shown(tag: str) -> str:
    return tag.replace(_TAG, "!!")


def dotted(path: Sequence[str | int]) -> str:
    """`("data", "train", 0)` as `data.train.0`."""
    return ".".join(str(step) for step in path)


def write(value: Value) -> str:
    """YAML text that `parse` (and any YAML 1.1 reader) gives back as an equal value, keys in their order."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=10**6
    )
    return text
