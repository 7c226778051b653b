"""The exception tree: every way launcher refuses, each with a message, a hint and an exit code.

    LauncherError
    ├── RequestError            2   what was asked for is wrong
    │   ├── ConfigError         2     in the YAML or an override: carries every fault found in one pass
    │   ├── DataError           2     in the text: carries the file and the place in it
    │   ├── StoreError          2     in a token store: damaged, or of another kind
    │   └── RunDirectoryError   2     in a run directory: another configuration, or not one at all
    ├── MachineError            3   this machine lacks something
    └── TrainingError           1   the run itself failed

`Interrupted` (130) is not an error of anybody's making, but ends a command the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

Counted = Literal["byte", "row"]


class LauncherError(Exception):
    """What is wrong, and (in `hint`) what to do about it. Printed without a traceback."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, key: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.key = key
        """The dotted key whose value is at fault, where one is."""

    @property
    def told(self) -> str:
        """The message, and below it the hint, where there is one."""
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message

    def place(self, origins: Mapping[str, str]) -> None:
        """Say where the key was set, now that `origins` (dotted key to place) is at hand."""
        origin = origins.get(self.key) if self.key else None
        if self.key is not None and origin is not None and origin != "default":
            said = self.key.removeprefix("cluster.") in f"{self.message} {origin}"
            self.message += f" ({origin})" if said else f" ({self.key}, {origin})"
            self.key = None


@contextmanager
def placed(origins: Mapping[str, str]) -> Iterator[None]:
    """An error raised inside says where its key was set; see `LauncherError.place`."""
    try:
        yield
    except LauncherError as error:
        error.place(origins)
        raise


class RequestError(LauncherError):
    """What was asked for is wrong."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong in a configuration.

    `path` is the dotted path (`train.batch_size`), `place` where the value was set
    (`run.yaml:12`, `override train.batch_size=7`), `hint` what to do.
    """

    path: str
    message: str
    place: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        where = f" ({self.place})" if self.place else ""
        return f"{self.path}: {self.message}{where}"


class ConfigError(RequestError):
    """Every fault of a configuration, found in one pass."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        if not faults:
            raise ValueError("a ConfigError needs at least one fault")
        super().__init__("\n".join(str(fault) for fault in faults))
        self.faults = tuple(faults)

    def place(self, origins: Mapping[str, str]) -> None:
        """Say where each fault that has no place yet was set."""
        places = {key: origin for key, origin in origins.items() if origin != "default"}
        self.faults = tuple(
            fault if fault.place else replace(fault, place=places.get(fault.path)) for fault in self.faults
        )


@contextmanager
def gathering(errors: list[LauncherError]) -> Iterator[None]:
    """An error raised inside is put with the others, so that what does not depend on it is tried too."""
    try:
        yield
    except LauncherError as error:
        errors.append(error)


def as_one(errors: Sequence[LauncherError]) -> LauncherError:
    """The only error as it is; several as one that carries all their faults."""
    if len(errors) == 1:
        return errors[0]
    faults: list[Fault] = []
    for error in errors:
        key = error.key or ""
        own = Fault(key, error.message.removeprefix(f"{key}="), hint=error.hint)
        faults += error.faults if isinstance(error, ConfigError) else [own]
    return ConfigError(faults)


class DataError(RequestError):
    """Something wrong in the text, with its place.

    `offset` counts bytes from the start of the (decompressed) file, or the rows of a table: `counted` says
    which. `line` counts from 1.
    """

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        line: int | None = None,
        offset: int | None = None,
        counted: Counted = "byte",
        hint: str | None = None,
        key: str | None = None,
    ) -> None:
        place = ""
        if file is not None:
            place = str(file) + (f":{line}" if line is not None else "")
            place += f", {counted} {offset}" if offset is not None else ""
        super().__init__(f"{place}: {message}" if place else message, hint=hint, key=key)
        self.reason = message
        self.file = file
        self.line = line
        self.offset = offset
        self.counted = counted

    def __reduce__(self) -> tuple[object, ...]:
        """Cross a process boundary with its place: the default would lose the keywords."""
        return _rebuild_data_error, (
            self.reason,
            self.file,
            self.line,
            self.offset,
            self.counted,
            self.hint,
            self.key,
        )


def _rebuild_data_error(
    message: str,
    file: str | None,
    line: int | None,
    offset: int | None,
    counted: Counted,
    hint: str | None,
    key: str | None,
) -> DataError:
    return DataError(message, file=file, line=line, offset=offset, counted=counted, hint=hint, key=key)


class StoreError(RequestError):
    """A token store that is damaged, incomplete or of another format version."""


class RunDirectoryError(RequestError):
    """A run directory that holds another configuration, or is not a run directory."""


class MachineError(LauncherError):
    """This machine lacks something the run needs."""

    exit_code = 3


class TrainingError(LauncherError):
    """The run itself failed."""

    exit_code = 1


class Interrupted(LauncherError):
    """Someone asked for it to stop."""

    exit_code = 130
