"""A file of another tool while it is read: what it said in launcher's keys, what was left, what is wrong.

Every leaf of the file ends in one of the three, so nothing is passed over in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from launcher.config.document import Document, Value, dotted
from launcher.config.faults import shown
from launcher.errors import Fault

AUTO = "auto"


@dataclass(frozen=True)
class Said:
    """`key` of the file says that `target`, one of our dotted keys or what leads to one, is `value`."""

    target: str
    value: Value
    key: str
    place: str


@dataclass(frozen=True)
class Left:
    """A key that was not taken over, or with a difference, and why."""

    key: str
    place: str
    why: str


@dataclass(frozen=True)
class NotDone:
    """A feature that launcher does not have. `off`: the values that do not ask for it."""

    what: str
    hint: str
    off: tuple[Value, ...] = (None, False, 0, "", [], {}, "none", "no", "NO", "No", "off")


Known = Mapping[str, str | NotDone]
"""Dotted key, or section of keys, to why it is not taken over; the nearest entry above a key counts."""


class OldFile:
    """One file, its leaves by dotted key; `canonical` maps a key as written to the name it is read under."""

    def __init__(self, document: Document, canonical: Callable[[str], str] = str) -> None:
        self.label = document.label
        self.said: list[Said] = []
        self.defaults: list[Said] = []
        self.left: list[Left] = []
        self.faults: list[Fault] = list(document.faults)
        self._document = document
        self._written = {canonical(dotted(path)): dotted(path) for path, _ in _leaves(document.value)}
        self._values = {canonical(dotted(path)): value for path, value in _leaves(document.value)}
        for key in [key for key, value in self._values.items() if value is None or value == {}]:
            self.take(key)
            self.leave(key, "it is empty")

    def has(self, key: str) -> bool:
        """Whether `key`, or a key under it, has not been read yet."""
        return any(name == key or name.startswith(f"{key}.") for name in self._values)

    def sections(self, *names: str) -> None:
        """Refuse what is written in place of a mapping of keys."""
        for name in names:
            value = self.take(name)
            if value is not None:
                self.refuse(
                    name, f"expected a mapping of keys, got {shown(value)}", "write its keys, or take it out"
                )

    def asks(self, section: str) -> bool:
        """Whether a key of `section` that has not been read yet holds anything."""
        return any(key.startswith(f"{section}.") and value for key, value in self._values.items())

    def take(self, key: str) -> Value:
        """The value of `key`, which counts as read from now on; None where there is none."""
        return self._values.pop(key, None)

    def say(self, target: str, value: Value, key: str) -> None:
        self.said.append(Said(target, value, self._name(key), self._place(key)))

    def default(self, target: str, value: Value, key: str) -> None:
        """`key` is not in the file, which then means `value`, unless another key or file says something."""
        self.defaults.append(Said(target, value, f"no {key}", self._place(key)))

    def leave(self, key: str, why: str) -> None:
        self.left.append(Left(self._name(key), self._place(key), why))

    def refuse(self, key: str, message: str, hint: str) -> None:
        self.faults.append(Fault(self._name(key), message, self._place(key), hint))

    def number(self, key: str, auto: str) -> float | None:
        """The number at `key`; None, and said, where it is no number, or auto (`auto`: what to do then)."""
        value = self.take(key)
        if value is None:
            return None
        if value == AUTO:
            self.leave(key, f"auto: {auto}")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(key, f"expected a number, got {shown(value)}", "write a number, or take the key out")
        else:
            return value
        return None

    def count(self, key: str, auto: str) -> int | None:
        """The whole number from 1 on at `key`, as `number`."""
        value = self.number(key, auto)
        if value is None:
            return None
        if value < 1 or not float(value).is_integer():
            self.refuse(key, f"expected a whole number from 1 on, got {value:g}", "write such a number")
            return None
        return int(value)

    def flag(self, key: str) -> bool | None:
        """The truth at `key`, in the words of YAML 1.1 too, which other tools read; None, and said, else."""
        value = self.take(key)
        if value is None or isinstance(value, bool):
            return value
        if str(value).lower() in {"yes", "true", "on", "no", "false", "off"}:
            return str(value).lower() in {"yes", "true", "on"}
        self.refuse(key, f"expected true or false, got {shown(value)}", "write true or false")
        return None

    def rest(self, known: Known) -> None:
        """Say of every key that has not been read why it is not taken over."""
        for key, value in list(self._values.items()):
            self.take(key)
            why = _nearest_above(key, known)
            if why is None:
                self.leave(key, "launcher does not know this key: see whether your run needs it")
            elif isinstance(why, str):
                self.leave(key, why)
            elif value in why.off:
                self.leave(key, f"it does not ask for what launcher does not have: {why.what}")
            else:
                self.refuse(key, f"launcher has no {why.what}", why.hint)

    def _name(self, key: str) -> str:
        return self._written.get(key, key)

    def _place(self, key: str) -> str:
        return self._document.place(self._name(key))


def _nearest_above(key: str, known: Known) -> str | NotDone | None:
    while key and key not in known:
        key = key.rpartition(".")[0]
    return known.get(key)


def _leaves(value: Value, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Value]]:
    if isinstance(value, dict) and (value or not at):
        for name, inner in value.items():
            yield from _leaves(inner, (*at, name))
    else:
        yield at, value
