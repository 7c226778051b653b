"""Who set a value, what it means, and every rendered line that carries it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel

from launcher.config.faults import at
from launcher.config.keys import did_you_mean, nearest
from launcher.errors import RequestError
from launcher.render.carries import places
from launcher.run.assemble import Assembly, rendered_files
from launcher.run.directory import run_directory


def explain_key(assembly: Assembly, key: str) -> list[dict[str, Any]]:
    """One entry for `key`; for a section, one for each key in it.

    A cluster's keys are written `cluster.KEY`. Raises RequestError for a key that does not exist.
    """
    directory = run_directory(assembly.run.config)
    files = {path.name: text for path, text in rendered_files(assembly, directory, None).items()}
    origins = {
        **assembly.run.origins,
        **{f"cluster.{name}": place for name, place in assembly.cluster.origins.items()},
    }
    keys = [name for name in origins if name == key or name.startswith(f"{key}.")]
    if not keys:
        near = [name for name in origins if name.endswith(f".{key}")] or nearest(key, origins)
        raise RequestError(
            f"{key} is not a key of run.yaml, nor (with `cluster.` before it) of cluster.yaml",
            hint=did_you_mean(near) if near else "`launcher explain RUN train` lists a section",
        )
    values = {
        **assembly.run.config.model_dump(mode="json"),
        "cluster": assembly.cluster.config.model_dump(mode="json"),
    }
    plan = assembly.plan.as_dict()
    return [
        {
            "key": name,
            "value": json.dumps(value := at(values, tuple(name.split("."))), ensure_ascii=False),
            "became": _became(name, plan) if value == "auto" else None,
            "set_by": origins[name],
            "meaning": _meaning(assembly, name),
            "places": [asdict(place) for place in places(name, files)],
        }
        for name in keys
    ]


def _became(key: str, plan: Mapping[str, Any]) -> str | None:
    """What the plan has in place of `auto`, where it has it under the same name."""
    name = key.rpartition(".")[2]
    found = next((part[name] for part in (plan, plan["batch"], plan["fast"]) if name in part), None)
    return None if found is None else json.dumps(found)


def _meaning(assembly: Assembly, key: str) -> str:
    """The description that stands with the field in the schema; inside an open section, the section's."""
    section: object = assembly.run.config
    parts = key.split(".")
    if parts[0] == "cluster":
        section, parts = assembly.cluster.config, parts[1:]
    meaning = ""
    for part in parts:
        if not isinstance(section, BaseModel):
            break
        meaning = type(section).model_fields[part].description or meaning
        section = getattr(section, part)
    return meaning
