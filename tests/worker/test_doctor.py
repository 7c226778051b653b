"""A model made to fall off each fast path, one after another: each is caught, and a fast one is passed."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedModel

from launcher.config.presets import PRESETS
from launcher.config.schema import DataSection
from launcher.plan.fast import every_path
from launcher.worker.doctor import examine, main, short_copy
from launcher.worker.tracing import compiled_so_far
from tests.worker.parity import LENGTH, VOCABULARY, another_head, gpt2, llama, mistral

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = every_path()


def said(
    model: PreTrainedModel, data: Mapping[str, Any] = MappingProxyType({}), **off: bool
) -> dict[str, tuple[str, str]]:
    """State and finding, by check."""
    model.loss_type = "ForCausalLM"
    model.config.use_cache = False
    reasons = dict.fromkeys(off, "train.fast")
    return {
        str(check["name"]): (str(check["state"]), str(check["found"]))
        for check in examine(
            model,
            replace(FAST, **off, reasons=reasons),
            DataSection(train=["text"], block_size=LENGTH, **data),
        )
    }


def test_a_fast_model_passes_everything() -> None:
    assert set(said(gpt2()).values()) == {
        ("ok", "taken"),
        ("ok", "fused and causal, without a mask"),
        ("ok", "never waits for the GPU in a forward and backward pass"),
        ("ok", "one graph"),
    }


def eager() -> PreTrainedModel:
    return gpt2(attn_implementation="eager")


def talking() -> PreTrainedModel:
    """A layer that looks at its numbers: the GPU is waited for, and the graph breaks."""
    model = gpt2()

    def look(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> Any:
        return output * 0.5 if float(output.detach().sum()) > 1e9 else None

    model.get_submodule("transformer.h.0.mlp").register_forward_hook(look)
    return model


def masking() -> PreTrainedModel:
    """A layer that picks out some of its numbers: how many, the host must know."""
    model = gpt2()
    model.get_submodule("transformer.h.0.mlp").register_forward_hook(
        lambda _module, _inputs, output: output + output[output > 1e9].sum()
    )
    return model


def looking_back() -> PreTrainedModel:
    """A layer that looks at its gradient."""
    model = gpt2()

    def look(_module: torch.nn.Module, _inputs: Any, outer: Any) -> None:
        assert float(outer[0].sum()) < 1e9

    model.get_submodule("transformer.h.0.mlp").register_full_backward_hook(look)
    return model


def hooked(look: Callable[[Any], object]) -> Callable[[], PreTrainedModel]:
    """A layer that looks at its numbers in this way, or leaves them."""

    def build() -> PreTrainedModel:
        model = gpt2()
        model.get_submodule("transformer.h.0.mlp").register_forward_hook(
            lambda _module, _inputs, output: output * bool(look(output.detach().max()))
        )
        return model

    return build


def hooked_back(look: Callable[[Any], object]) -> Callable[[], PreTrainedModel]:
    """A layer that looks at its gradient in this way."""

    def build() -> PreTrainedModel:
        model = gpt2()

        def back(_module: torch.nn.Module, _inputs: Any, outer: Any) -> None:
            look(outer[0])

        model.get_submodule("transformer.h.0.mlp").register_full_backward_hook(back)
        return model

    return build


def by_hand() -> PreTrainedModel:
    """A layer whose attention is matrix products, a mask and a softmax."""
    model = gpt2()
    attention: Any = model.get_submodule("transformer.h.0.attn")

    def attend(hidden: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        query, key, value = attention.c_attn(hidden).split(hidden.shape[-1], dim=-1)
        scores = query @ key.mT / hidden.shape[-1] ** 0.5
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        return attention.c_proj(scores.masked_fill(future, -torch.inf).softmax(-1) @ value), None

    attention.forward = attend
    return model


def jamba() -> PreTrainedModel:
    """Layers of Mamba's, whose kernels are in packages that are not installed here."""
    fields = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
        "num_experts": 1, "num_experts_per_tok": 1, "mamba_d_state": 4, "mamba_dt_rank": 4,
    }  # fmt: skip
    return short_copy({"model_type": "jamba", **fields})


def refusing() -> PreTrainedModel:
    """A layer that runs on a GPU alone."""
    model = gpt2()

    def look(_module: torch.nn.Module, _inputs: Any) -> None:
        raise RuntimeError("no GPU")

    model.get_submodule("transformer.h.0.mlp").register_forward_pre_hook(look)
    return model


class WithoutPositions(GPT2LMHeadModel):
    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **more: Any) -> Any:
        if "position_ids" in more:
            raise TypeError("position_ids")
        return super().forward(input_ids=input_ids, labels=labels, **more)


def without_positions() -> PreTrainedModel:
    return WithoutPositions(gpt2().config)


@pytest.mark.parametrize(
    ("build", "check", "found"),
    [
        (llama, "train.fast.tanh_gelu", "falls back: the model has no gelu_new"),
        (eager, "train.fast.causal_attention", "falls back: the model's attention is eager"),
        (eager, "attention", "no fused attention: eager"),
        (mistral, "attention", "a dense mask in 2 of 2 layers"),
        (lambda: another_head(gpt2()), "train.fast.chunked_loss", "falls back: the model has no plain"),
        (lambda: another_head(gpt2()), "train.fast.padded_vocabulary", "falls back: the model has no plain"),
        (talking, "host", "waits for the GPU 1 times"),
        (masking, "host", "waits for the GPU 1 times"),
        (looking_back, "host", "waits for the GPU 1 times"),
        (hooked(lambda numbers: numbers.cpu().numpy() < 1e9), "host", "waits for the GPU 1 times"),
        (hooked(lambda numbers: numbers.to("cpu").tolist() < 1e9), "host", "waits for the GPU 1 times"),
        (hooked(lambda numbers: numbers.tolist() < 1e9), "host", "waits for the GPU 1 times"),
        (hooked(lambda numbers: np.asarray(numbers) < 1e9), "host", "waits for the GPU 1 times"),
        (hooked(lambda numbers: repr(numbers)), "host", "waits for the GPU 1 times"),
        (hooked_back(lambda gradient: gradient.cpu()), "host", "waits for the GPU 1 times"),
        (talking, "torch.compile", " graphs: "),
        (by_hand, "attention", "computed by hand in 1 of 2 layers"),
        (jamba, "kernels", "slower code runs instead: causal_conv1d_fn, selective_scan_fn"),
    ],
    ids=[
        "activation", "attention", "kernel", "window", "head", "vocabulary", "host", "mask", "backward",
        "numpy", "to", "list", "array", "printed", "backward to the host", "graph", "by hand", "package",
    ],
)  # fmt: skip
def test_what_falls_off_a_path_is_caught(
    build: Callable[[], PreTrainedModel], check: str, found: str
) -> None:
    state, told = said(build())[check]
    assert state == "warning"
    assert found in told


@pytest.mark.parametrize("build", [llama, hooked(lambda numbers: numbers.to(numbers.device) is not None)])
def test_what_does_not_wait_is_not_said_to(build: Callable[[], PreTrainedModel]) -> None:
    checks = said(build())
    assert checks["host"] == ("ok", "never waits for the GPU in a forward and backward pass")
    assert "kernels" not in checks


def test_layers_without_attention_are_not_missed() -> None:
    assert said(jamba())["attention"] == ("ok", "fused and causal, without a mask")


def test_a_model_without_attention_is_not_said_to_have_a_slow_one() -> None:
    mamba = short_copy(
        {"model_type": "mamba", "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
    )
    assert said(mamba)["attention"] == ("ok", "none in the layers that were tried")


def test_a_missing_kernel_comes_with_its_package() -> None:
    checks = examine(jamba(), FAST, DataSection(train=["text"], block_size=LENGTH))
    assert checks[-1]["remedy"] == "install causal_conv1d, mamba_ssm"


def test_a_kernel_that_is_missed_when_a_model_is_built_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {
        "model_type": "apertus", "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    asked = {"model": fields, "fast": asdict(FAST), "data": {"train": ["text"], "block_size": LENGTH}}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(asked)))
    assert main() == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])[0]
    assert (first["name"], first["found"].split(": ")[-1]) == ("kernels", "xIELU")


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (gpt2, "the model became one graph"),
        (talking, "the model became 6 graphs, cut for: Unsupported Tensor.item() call"),
    ],
    ids=["whole", "cut"],
)
def test_what_was_compiled_says_where_it_was_cut(build: Callable[[], PreTrainedModel], told: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build().train()
    model.loss_type = "ForCausalLM"
    model.config.use_cache = False
    ids = torch.arange(16)[None]
    compiled: Any = torch.compile(model, backend="eager")
    compiled(input_ids=ids, labels=ids)
    torch._dynamo.reset()
    assert compiled_so_far("the model").startswith(told)


def test_without_the_path_the_stock_model_has_a_mask_when_compiled() -> None:
    checks = said(gpt2(), causal_attention=False)
    assert checks["train.fast.causal_attention"] == ("ok", "off: train.fast")
    assert checks["attention, compiled"] == ("warning", "a dense mask in 2 layers")
    assert checks["host"][0] == "warning", "stock transformers looks for packed rows"


@pytest.mark.parametrize("data", [{"packing": "pad"}, {"isolate_documents": True}], ids=["pad", "isolated"])
def test_rows_are_the_run_s_own(data: Mapping[str, Any]) -> None:
    checks = said(gpt2(), data, causal_attention=False)
    assert checks["attention"] == ("warning", "a dense mask in 2 of 2 layers")


def test_a_model_that_training_refuses_is_told_so() -> None:
    state, told = said(refusing())["loss"]
    assert (state, told) == (
        "missing",
        "model.name: GPT2LMHeadModel does not run with input_ids and labels alone: no GPU",
    )


def test_a_model_that_does_not_take_the_rows_is_told_so() -> None:
    checks = said(without_positions(), {"isolate_documents": True}, chunked_loss=False)
    state, told = checks["pass"]
    assert state == "warning"
    assert told.startswith("the model does not run here on rows of this data: ")
    assert "position_ids" in told


def test_sdpa_is_proposed_to_a_model_that_has_it() -> None:
    data = DataSection(train=["text"], block_size=LENGTH)
    for supported, remedy in ((True, "set attn_implementation: sdpa in model.overrides"), (False, None)):
        model = eager()
        model._supports_sdpa = supported
        checks = {check["name"]: check for check in examine(model, FAST, data)}
        assert checks["attention"]["remedy"] == remedy


def layers(fields: Mapping[str, Any]) -> int:
    return sum(name.endswith(".mlp") for name, _ in short_copy(fields).named_modules())


def test_a_large_model_is_tried_with_few_layers() -> None:
    assert layers({**PRESETS["gpt2"].config(), "n_embd": 48, "n_layer": 48}) == 2


GEMMA: Mapping[str, Any] = {
    "model_type": "gemma3_text", "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 12, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip


def test_each_type_of_layer_is_tried() -> None:
    """Of Gemma 3's layers the first five attend to a window, the sixth to all."""
    assert layers(GEMMA) == 6


def test_a_model_of_several_parts_is_shortened_where_its_text_is() -> None:
    text = {name: value for name, value in GEMMA.items() if name != "model_type"}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    copy = short_copy({"model_type": "gemma3", "text_config": text, "vision_config": vision})
    assert copy.config.get_text_config().num_hidden_layers == 6


def test_types_that_follow_from_the_number_of_layers_are_left_to_it() -> None:
    fields = {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 12}
    assert short_copy({"model_type": "mamba", **fields}).config.num_hidden_layers == 2


def test_a_model_that_cannot_be_built_is_said_to_be_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"model": {"model_type": "unheard-of"}, "fast": {}, "data": {"train": ["text"]}}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(asked)))
    assert main() == 0
    (check,) = json.loads(capsys.readouterr().out)
    assert (check["name"], check["state"]) == ("model", "missing")
    assert "unheard-of" in check["found"]
