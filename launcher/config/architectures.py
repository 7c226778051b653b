"""The architectures whose closed form is known: what a config leaves out, and what its fields may be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from launcher.config.faults import shown
from launcher.config.presets import GPT2_FIELDS
from launcher.config.values import MOST

_LLAMA: Final[Mapping[str, Any]] = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "attention_bias": False,
    "mlp_bias": False,
}

DEFAULTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "gpt2": GPT2_FIELDS,
    "llama": _LLAMA,
    "mistral": {
        **_LLAMA,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 4096 * 32,
    },
    "qwen2": {
        **_LLAMA,
        "num_key_value_heads": 32,
        "intermediate_size": 22016,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
    },
    "qwen3": {
        **_LLAMA,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "intermediate_size": 22016,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
    },
}
"""What transformers takes for a field that a config leaves out; a test compares it with the installed one."""

_COUNTS = frozenset(
    {
        *("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"),
        *("max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "intermediate_size"),
    }
)
_MAY_BE_NULL = frozenset({"n_inner", "num_key_value_heads", "head_dim"})


def wrong_values(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each field of a config that is not what it must be, and what is wrong with it."""
    for name, default in DEFAULTS.get(config["model_type"], {}).items():
        value = config.get(name, default)
        expected = _expected(name, value, default)
        if expected is not None:
            yield name, f"expected {expected}, got {shown(value)}"


def _expected(name: str, value: object, default: object) -> str | None:
    """What the field takes, when `value` is not that; fields whose default says little take anything."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in _COUNTS:
        if isinstance(value, int) and value > MOST:
            return f"at most {MOST:,}"
        sound = isinstance(value, int) and number and value >= 1
        return None if sound or (value is None and name in _MAY_BE_NULL) else "a whole number from 1 on"
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, float):
        return None if number else "a number"
    return None


def uneven_heads(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What cannot be dealt out to attention heads, and what would do; of a config without `wrong_values`."""
    if config["model_type"] not in DEFAULTS:
        return
    fields = {**DEFAULTS[config["model_type"]], **config}
    width, heads = ("n_embd", "n_head") if "n_embd" in fields else ("hidden_size", "num_attention_heads")
    shared = "num_key_value_heads"
    if fields.get("head_dim") is None and fields[width] % fields[heads]:
        what = f"{width} {fields[width]} cannot be cut into {fields[heads]} heads ({heads})"
        yield what, f"make {width} a multiple of {heads}"
    if fields.get(shared) is not None and fields[heads] % fields[shared]:
        what = f"{fields[heads]} heads ({heads}) cannot share {fields[shared]} of keys and values ({shared})"
        yield what, f"make {heads} a multiple of {shared}"
