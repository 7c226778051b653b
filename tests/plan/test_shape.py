"""The closed forms against the models that transformers really builds, on torch's meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from launcher.config.architectures import DEFAULTS
from launcher.config.presets import PRESETS
from launcher.plan.shape import flops_per_token, parameters, shape_of
from tests.plan.shapes import shape

ROTARY = ("llama", "mistral", "qwen2", "qwen3")


def built(fields: dict[str, Any]) -> torch.nn.Module:
    """The model as transformers makes it, without memory for its weights."""
    rest = {key: value for key, value in fields.items() if key != "model_type"}
    config = AutoConfig.for_model(fields["model_type"], **rest)
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def counted(fields: dict[str, Any]) -> int:
    return sum(parameter.numel() for parameter in built(fields).parameters())


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_the_presets_have_the_published_parameters(preset: str, published: int) -> None:
    assert parameters(shape(PRESETS[preset].config())) == published


def test_the_closed_form_counts_what_transformers_builds() -> None:
    fields = PRESETS["gpt2-medium"].config()
    assert parameters(shape(fields)) == counted(fields)


@settings(max_examples=12, deadline=None)
@given(
    layers=st.integers(1, 3),
    heads=st.integers(1, 4),
    head_size=st.sampled_from([2, 8, 10]),
    inner=st.none() | st.integers(1, 70),
    vocab=st.integers(2, 300),
    positions=st.integers(1, 64),
    tied=st.booleans(),
)
def test_any_gpt2(
    layers: int, heads: int, head_size: int, inner: int | None, vocab: int, positions: int, tied: bool
) -> None:
    fields = {
        "model_type": "gpt2",
        "n_layer": layers,
        "n_head": heads,
        "n_embd": heads * head_size,
        "n_inner": inner,
        "vocab_size": vocab,
        "n_positions": positions,
        "tie_word_embeddings": tied,
    }
    assert parameters(shape(fields)) == counted(fields)


@settings(max_examples=16, deadline=None)
@given(
    model_type=st.sampled_from(ROTARY),
    layers=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    head_size=st.sampled_from([4, 8]),
    intermediate=st.integers(1, 90),
    vocab=st.integers(2, 300),
    tied=st.booleans(),
)
def test_any_llama(
    model_type: str,
    layers: int,
    kv_heads: int,
    group: int,
    head_size: int,
    intermediate: int,
    vocab: int,
    tied: bool,
) -> None:
    fields = {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": kv_heads * group * head_size,
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }
    assert parameters(shape(fields)) == counted(fields)


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_fields_left_out_are_those_of_transformers(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type]()
    for field, value in DEFAULTS[model_type].items():
        if hasattr(config, field) and value is not None:
            assert getattr(config, field) == value, field
    written = shape(config.to_dict())
    assert shape({"model_type": model_type}) == written


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "bert"},
        {"model_type": "mamba", "hidden_size": 768},
        {"model_type": "gpt2", "add_cross_attention": True},
        {"model_type": "llama", "attention_bias": True},
        {"model_type": "llama", "mlp_bias": True},
    ],
)
def test_an_unknown_architecture_has_no_shape(config: dict[str, Any]) -> None:
    assert shape_of(config) is None


def matmul_flops(fields: dict[str, Any], block_size: int) -> int:
    """Multiply-adds x 2 of one forward pass over one block, counted by torch operator by operator."""
    rest = {key: value for key, value in fields.items() if key != "model_type"}
    config = AutoConfig.for_model(fields["model_type"], **rest)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, block_size, dtype=torch.long), use_cache=False)
    return int(counter.get_total_flops())


@pytest.mark.parametrize(
    "fields",
    [
        {
            "model_type": "gpt2",
            "n_layer": 3,
            "n_embd": 192,
            "n_head": 3,
            "vocab_size": 1000,
            "n_positions": 256,
        },
        {
            "model_type": "llama",
            "num_hidden_layers": 3,
            "hidden_size": 192,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "intermediate_size": 500,
            "vocab_size": 1000,
        },
    ],
    ids=["gpt2", "llama"],
)
def test_the_palm_count_is_three_forward_passes_as_torch_counts_them(fields: dict[str, Any]) -> None:
    counted_by_torch = 3 * matmul_flops(fields, 256) / 256
    # Biases and norms are in N, and no matrix multiplication: below one per cent at these widths.
    assert flops_per_token(shape(fields), 256) == pytest.approx(counted_by_torch, rel=0.01)
