"""Write docs/reference/ from the schema and the commands themselves, so that it cannot go stale.

.venv/bin/python -m scripts.reference
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path

import typer.main
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from launcher.cli import app
from launcher.config.keys import arms, inside, section_of, takes
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
        lines += [f"## {title}", "", "| key | values | default | meaning |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in rows(model, "")]
        lines.append("")
    return "\n".join(lines)


def rows(section: type[Section], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """Dotted key, values, default and meaning of every key below `section`; `[]`: of each in a list."""
    for name, field in section.model_fields.items():
        if section_of(field) is None:
            meaning = (field.description or "").replace("|", "\\|")
            yield f"`{prefix}{name}`", takes(section, name), _default(field), meaning
        for mark, inner in _sections(field):
            yield from rows(inner, f"{prefix}{name}{mark}.")


def _sections(field: FieldInfo) -> Iterator[tuple[str, type[Section]]]:
    """Every section that may stand at a key, and what is written behind the key for it."""
    for arm in arms(field):
        for mark, each in (("", arm), *(("[]", item) for item in inside(arm, 0))):
            if (section := section_of(each)) is not None:
                yield mark, section


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
