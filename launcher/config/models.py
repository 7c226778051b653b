"""Which model a name means: a local folder, a preset or a Hub id, and what its config says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.config.architectures import uneven_heads, wrong_values
from launcher.config.faults import shown
from launcher.config.keys import did_you_mean, nearest
from launcher.config.presets import GPT2_FIELDS, GPT2_OTHER_NAMES, PRESETS, Preset
from launcher.config.schema import ModelSection, TokenizerFromCorpus
from launcher.errors import ConfigError, Fault, RequestError

CONFIG = "config.json"
ATTENTION = "attn_implementation"
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
"""What any model may be asked to attend with, though its config does not name it."""
HUB_TIMEOUT = 5.0  # seconds for the one question asked of the Hub

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    `folder` is the absolute local folder with its files, `hub_id` the repository to take them from; a
    preset from scratch needs neither. `config` has the fields of the transformers config, `model_type`
    included, with the overrides applied. `tokenizer` is an absolute folder, a Hub id, or how to train one.
    """

    name: str
    kind: Literal["preset", "folder", "hub"]
    folder: str | None
    hub_id: str | None
    config: dict[str, Any]
    tokenizer: str | TokenizerFromCorpus


def find_model(model: ModelSection) -> ModelSource:
    """Find `model.name`: a folder here, else a preset, else a repository on the Hub.

    Only the last asks the network, for at most about ten seconds, and for nothing but config.json.
    Raises RequestError where there is no such model, ConfigError for overrides it does not have.
    """
    folder = Path(model.name).expanduser()
    preset = PRESETS.get(model.name.removeprefix("openai-community/"))
    if (folder / CONFIG).is_file() or (preset is None and _is_path(model.name, folder)):
        return _from_folder(model, folder)
    if preset is not None:
        return _from_preset(model, preset)
    config = _read_config(_config_from_hub(model.name))
    return ModelSource(
        model.name,
        "hub",
        None,
        model.name,
        _overridden(config, model.overrides),
        _tokenizer(model, model.name),
    )


def find_trained(name: str) -> str:
    """The folder or Hub id of a model that is used as it is, with its own weights and tokenizer.

    Raises what `find_model` does, and RequestError for a folder without a tokenizer.
    """
    found = find_model(ModelSection(name=name, init="pretrained"))
    if found.folder is not None and not _holds_tokenizer(Path(found.folder)):
        raise RequestError(
            f"no tokenizer in {found.folder}: {_lacks(Path(found.folder), 'tokenizer.json')}",
            hint="give a folder that save_pretrained wrote both to; "
            "`launcher checkpoint export RUN_DIR` makes one of a checkpoint",
        )
    return found.folder or found.hub_id or name


def _holds_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _is_path(name: str, folder: Path) -> bool:
    """Whether a name can only be, or already is, a place on this machine: Hub ids have one slash at most."""
    return name[0] in "./~" or name.endswith("/") or "\\" in name or name.count("/") > 1 or folder.exists()


def _from_folder(model: ModelSection, folder: Path) -> ModelSource:
    absolute = folder.absolute()
    if not (absolute / CONFIG).is_file():
        raise RequestError(
            f"no model in {absolute}: {_lacks(absolute, CONFIG)}",
            hint="give the folder that holds config.json, a preset "
            f"({', '.join(PRESETS)}) or a Hub id such as user/model",
            key="model.name",
        )
    config = _read_config(absolute / CONFIG)
    return ModelSource(
        model.name,
        "folder",
        str(absolute),
        None,
        _overridden(config, model.overrides),
        _tokenizer(model, str(absolute)),
    )


def _lacks(folder: Path, wanted: str) -> str:
    if not folder.exists():
        return "there is no such folder"
    if not folder.is_dir():
        return "it is a file, not a folder"
    names = sorted(entry.name for entry in folder.iterdir())
    found = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"it has no {wanted}; it holds {found or 'nothing'}"


def _from_preset(model: ModelSection, preset: Preset) -> ModelSource:
    config = _overridden(preset.config(), model.overrides)
    tokenizer = _tokenizer(model, preset.hub_id)
    if model.init == "pretrained":
        return ModelSource(model.name, "hub", None, preset.hub_id, config, tokenizer)
    return ModelSource(model.name, "preset", None, None, config, tokenizer)


def _tokenizer(model: ModelSection, own: str) -> str | TokenizerFromCorpus:
    """The tokenizer to use: `own`, the model's, unless another one is asked for."""
    asked = model.tokenizer
    if asked is None or isinstance(asked, TokenizerFromCorpus):
        return asked or own
    folder = Path(asked).expanduser()
    if asked in PRESETS and not folder.is_dir():
        return PRESETS[asked].hub_id
    if not asked or _is_path(asked, folder):
        if not _holds_tokenizer(folder):
            raise RequestError(
                f"no tokenizer in {folder.absolute()}: {_lacks(folder, 'tokenizer.json')}",
                hint="give the folder that save_pretrained wrote, or a Hub id, in model.tokenizer",
                key="model.tokenizer",
            )
        return str(folder.absolute())
    return asked


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{path} cannot be read: {error}", hint="save the model again", key="model.name"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise RequestError(
            f"{path} is not a transformers config: it names no model_type",
            hint="give a model that transformers' save_pretrained wrote",
            key="model.name",
        )
    if config["model_type"] == "gpt2":
        config |= {own: config.pop(name) for name, own in GPT2_OTHER_NAMES.items() if name in config}
    return config


def _overridden(config: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the overrides applied. Raises ConfigError with every field that cannot be what it is."""
    is_gpt2 = config["model_type"] == "gpt2"
    known = GPT2_FIELDS if is_gpt2 else {name: None for name in config if name != "model_type"}
    known = {**known, ATTENTION: None}
    merged = {**config, **{name: value for name, value in overrides.items() if name in known}}
    faults = [_unknown_override(name, known, is_gpt2) for name in overrides if name not in known]
    faults += [
        Fault(f"model.overrides.{name}", wrong)
        if name in overrides
        else Fault("model.name", f"{name} of its config: {wrong}", hint=f"mend {CONFIG}")
        for name, wrong in wrong_values(merged)
    ]
    faults += _wrong_attention(overrides)
    if not faults:
        path = "model.overrides" if overrides else "model.name"
        faults = [Fault(path, wrong, hint=hint) for wrong, hint in uneven_heads(merged)]
    if faults:
        raise ConfigError(faults)
    return merged


def _unknown_override(name: str, known: Mapping[str, object], is_gpt2: bool) -> Fault:
    path = f"model.overrides.{name}"
    own = {**GPT2_OTHER_NAMES, "n_ctx": "n_positions"}.get(name) if is_gpt2 else None
    if own is not None:
        return Fault(path, "GPT-2 has another name for this field", hint=f"write {own}")
    close = nearest(name, known)
    hint = did_you_mean(close) if close else f"the config has {', '.join(known)}"
    return Fault(path, "the model's config has no such field", hint=hint)


def _wrong_attention(overrides: Mapping[str, Any]) -> Iterator[Fault]:
    value = overrides.get(ATTENTION, ATTENTIONS[0])
    if value not in ATTENTIONS:
        message = f"expected {', '.join(ATTENTIONS[:-1])} or {ATTENTIONS[-1]}, got {shown(value)}"
        yield Fault(f"model.overrides.{ATTENTION}", message)


def _config_from_hub(hub_id: str) -> Path:
    """Path of the repository's config.json in the Hub's cache. Raises RequestError where it cannot be had."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]

    download = "download it where there is a network (`hf download`), or give a local folder"
    reason = None
    try:
        # Asked first, because hf_hub_download alone tries an unreachable Hub again for half a minute.
        get_hf_file_metadata(hf_hub_url(hub_id, CONFIG), timeout=HUB_TIMEOUT)
    except HFValidationError as error:
        raise _no_such_model(hub_id, "it is no Hub id either") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            raise _no_such_model(hub_id, f"{constants.ENDPOINT} answered {status}") from error
        reason = f"{constants.ENDPOINT} answered {status}"
    except (OSError, TransportError) as error:
        reason = f"{constants.ENDPOINT} cannot be reached: {error}"
    try:
        return Path(hf_hub_download(hub_id, CONFIG, local_files_only=reason is not None))
    except LocalEntryNotFoundError as error:
        raise RequestError(
            f"no model {hub_id}: no folder of that name here, and {reason}",
            hint=f"{_presets_like(hub_id)} {download}".strip(),
            key="model.name",
        ) from error


def _no_such_model(hub_id: str, answer: str) -> RequestError:
    log_in = f"the presets are {', '.join(PRESETS)}; a private or gated repository needs `hf auth login`"
    return RequestError(
        f"no model {hub_id}: no folder of that name here, no preset, and {answer}",
        hint=_presets_like(hub_id) or log_in,
        key="model.name",
    )


def _presets_like(hub_id: str) -> str:
    close = nearest(hub_id.removeprefix("openai-community/"), PRESETS)
    return did_you_mean(close) if close else ""
