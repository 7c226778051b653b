"""Write docs/reference/ from the schema and the commands themselves, so that it cannot go stale.

.venv/bin/python -m scripts.reference
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path

import typer.main
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from launcher.cli import app
from launcher.config.schema import ClusterConfig, RunConfig, Section

WIDTH = 100
REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference"


def main() -> None:
    REFERENCE.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (REFERENCE / name).write_text(text, encoding="utf-8")
        print(f"wrote docs/reference/{name}")


def pages() -> dict[str, str]:
    """File name to text of every page of the reference."""
    return {"configuration.md": configuration(), "commands.md": commands()}


def configuration() -> str:
    lines = ["# Every key", "", "Written by `scripts/reference.py` from `launcher/config/schema.py`.", ""]
    for title, model in (("run.yaml", RunConfig), ("cluster.yaml", ClusterConfig)):
        lines += [f"## {title}", "", "| key | default | meaning |", "|---|---|---|"]
        lines += [f"| `{key}` | {default} | {meaning} |" for key, default, meaning in rows(model, "")]
        lines.append("")
    return "\n".join(lines)


def rows(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    """Dotted key, default and meaning of every key below `section`."""
    for name, field in section.model_fields.items():
        inner = _section(field)
        if inner is not None:
            yield from rows(inner, f"{prefix}{name}.")
        else:
            meaning = (field.description or "").replace("|", "\\|")
            yield f"{prefix}{name}", _default(field), meaning


def _section(field: FieldInfo) -> type[Section] | None:
    annotation: object = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        value = field.default_factory()  # type: ignore[call-arg]
    elif field.default is PydanticUndefined:
        return "required"
    else:
        value = field.default
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{shown}`"


def commands() -> str:
    lines = ["# Every command", "", "Written by `scripts/reference.py` from what `-h` prints.", ""]
    for words, command in _walk(typer.main.get_command(app), ("launcher",)):
        settings = {"help_option_names": ["-h", "--help"], "terminal_width": WIDTH}
        context = command.make_context(" ".join(words), [], resilient_parsing=True, **settings)
        lines += [f"## {' '.join(words)}", "", "```", command.get_help(context).rstrip(), "```", ""]
    return "\n".join(lines)


def _walk(command: typing.Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], typing.Any]]:
    inner = getattr(command, "commands", {})
    if not inner or len(words) == 1:
        yield words, command
    for name, each in inner.items():
        yield from _walk(each, (*words, name))


if __name__ == "__main__":
    main()
