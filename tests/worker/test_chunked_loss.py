"""The chunked loss by itself against whole logits, and the models that keep their own loss."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from launcher.plan.fast import Fast
from launcher.worker.chunked_loss import (
    by_kernel,
    linear_cross_entropy,
    replaced_forward,
    use_chunked_loss,
)
from launcher.worker.collate import IGNORED
from tests.worker.parity import (
    LENGTH,
    NOTHING,
    VOCABULARY,
    another_head,
    batches,
    gpt2,
    llama,
    made,
    opt,
    phi,
    reference,
    run,
)

TOKENS, WIDTH, WORDS = 11, 5, 7


def given(dtype: torch.dtype, *, padding: int = 0) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(3)
    labels = torch.randint(0, WORDS, (TOKENS,), generator=draw)
    labels[[2, 7, 10]] = IGNORED
    made = {
        "hidden": torch.randn(TOKENS, WIDTH, generator=draw, dtype=torch.float64),
        "weight": torch.randn(WORDS, WIDTH, generator=draw, dtype=torch.float64),
        "bias": torch.randn(WORDS, generator=draw, dtype=torch.float64),
    }
    for name in ("weight", "bias") if padding else ():
        rows = torch.full((padding, *made[name].shape[1:]), 9.0, dtype=torch.float64)
        made[name] = torch.cat([made[name], rows])
    return {"labels": labels, **{name: each.to(dtype).requires_grad_() for name, each in made.items()}}


@pytest.mark.parametrize("rows", [1, 4, 11, 64])
@pytest.mark.parametrize("items", [None, 5])
@pytest.mark.parametrize("padding", [0, 3])
def test_in_double_precision_it_is_the_whole_cross_entropy(
    rows: int, items: int | None, padding: int
) -> None:
    ours, theirs = given(torch.float64, padding=padding), given(torch.float64)
    loss = linear_cross_entropy(**ours, items=items, vocabulary=WORDS, rows=rows)
    logits = theirs["hidden"] @ theirs["weight"].T + theirs["bias"]
    expected = functional.cross_entropy(logits, theirs["labels"], ignore_index=IGNORED, reduction="sum")
    expected = expected / (8 if items is None else items)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    (3 * loss).backward()  # type: ignore[no-untyped-call]
    (3 * expected).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(ours["hidden"].grad, theirs["hidden"].grad, rtol=1e-12, atol=1e-14)
    for name in ("weight", "bias"):
        torch.testing.assert_close(ours[name].grad[:WORDS], theirs[name].grad, rtol=1e-12, atol=1e-14)
        assert not ours[name].grad[WORDS:].any()


def test_its_gradients_are_those_of_finite_differences() -> None:
    tensors = given(torch.float64)

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(
            hidden, weight, bias, tensors["labels"], items=4, vocabulary=WORDS, rows=4
        )

    assert torch.autograd.gradcheck(loss, (tensors["hidden"], tensors["weight"], tensors["bias"]))


def test_a_likely_token_keeps_its_small_gradient_in_half_precision() -> None:
    """1 - p is not a difference of two rounded numbers: at p = 0.9995 bf16 has nothing between p and 1."""
    hidden = torch.tensor([[1.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[7.625], [0.0]], dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy(hidden, weight, None, torch.tensor([0]), items=1, vocabulary=2).backward()  # type: ignore[no-untyped-call]
    likelihood = torch.sigmoid(torch.tensor(7.625, dtype=torch.float64))
    assert weight.grad is not None
    assert float(weight.grad[0]) == pytest.approx(float(likelihood - 1), rel=5e-3)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_a_likely_token_keeps_its_small_gradient_in_fp32_however_large_its_logits(offset: float) -> None:
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[12.0], [0.0]]).add(offset).requires_grad_()
    linear_cross_entropy(hidden, weight, None, torch.tensor([0]), items=1, vocabulary=2).backward()  # type: ignore[no-untyped-call]
    likelihood = torch.sigmoid(torch.tensor(12.0, dtype=torch.float64))
    assert weight.grad is not None
    assert float(weight.grad[0]) == pytest.approx(float(likelihood - 1), rel=2e-2)


def test_an_unlikely_token_keeps_its_loss_in_fp32() -> None:
    """Its probability is none that fp32 has."""
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[500.0], [0.0]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, None, torch.tensor([1]), items=1, vocabulary=2)
    assert float(loss.detach()) == 500.0


def test_the_kernel_is_for_what_is_compiled_for_a_gpu_in_bf16_with_rows_that_no_product_pads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def logits(columns: int, dtype: torch.dtype = torch.bfloat16, *, is_cuda: bool = True) -> Any:
        return SimpleNamespace(shape=(4, columns), dtype=dtype, is_cuda=is_cuda)

    assert not by_kernel(logits(50304)), "nothing is compiled"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert by_kernel(logits(50304))
    assert not by_kernel(logits(50257))
    assert not by_kernel(logits(50304, torch.float32))
    assert not by_kernel(logits(50304, is_cuda=False))


def test_no_label_at_all_is_nan_as_the_stock_loss_and_moves_nothing_where_items_are_given() -> None:
    tensors = given(torch.float32) | {"labels": torch.full((TOKENS,), IGNORED)}
    assert linear_cross_entropy(**tensors, items=None, vocabulary=WORDS).isnan()
    loss = linear_cross_entropy(**tensors, items=9, vocabulary=WORDS)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0.0
    assert not tensors["weight"].grad.any()


def test_evaluation_makes_no_gradients() -> None:
    tensors = given(torch.float32)
    with torch.no_grad():
        loss = linear_cross_entropy(**tensors, items=None, vocabulary=WORDS)
    assert not loss.requires_grad


CHUNKED = Fast(chunked_loss=True)


@pytest.mark.parametrize("build", [gpt2, llama, phi, opt], ids=["tied", "untied", "with a bias", "decoder"])
def test_a_model_with_a_linear_head_returns_its_loss_without_logits(
    build: Callable[[], PreTrainedModel],
) -> None:
    model, fell_back = made(build, CHUNKED)
    assert fell_back == {}
    batch = batches()["pad"]
    assert model(**batch).logits is None
    model.zero_grad()
    found, expected = run(model, batch), reference(made(build, NOTHING)[0], batch)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.apart(expected) < 2e-6
    for asked in ({"output_hidden_states": True}, {"logits_to_keep": 4, "labels": None}):
        assert model(**batch | asked).logits is not None


def gemma() -> PreTrainedModel:
    """Scales its embeddings, within its body."""
    config = GemmaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    return GemmaForCausalLM(config)


def frozen(model: PreTrainedModel, part: str) -> PreTrainedModel:
    model.get_submodule(part).requires_grad_(requires_grad=False)
    return model


@pytest.mark.parametrize(
    "build",
    [
        gemma,
        lambda: gpt2().bfloat16(),
        lambda: frozen(llama(), "model"),
        lambda: frozen(llama(), "lm_head"),
    ],
    ids=["scaled embeddings", "bf16", "frozen body", "frozen head"],
)
def test_trying_a_model_of_any_kind_leaves_nothing_behind(build: Callable[[], PreTrainedModel]) -> None:
    model = build()
    model.loss_type = "ForCausalLM"
    random, trained = torch.get_rng_state(), [each.requires_grad for each in model.parameters()]
    assert use_chunked_loss(model, LENGTH) is None
    assert torch.equal(random, torch.get_rng_state())
    assert trained == [each.requires_grad for each in model.parameters()]
    assert all(each.grad is None and not each._backward_hooks for each in model.parameters())
    assert not any(each._forward_hooks or each._backward_hooks for each in model.modules())


def granite() -> PreTrainedModel:
    """Divides its logits."""
    config = GraniteConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, logits_scaling=4.0,
    )  # fmt: skip
    return GraniteForCausalLM(config)


def mixtral() -> PreTrainedModel:
    """Adds the loss of its routers."""
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2, output_router_logits=True,
    )  # fmt: skip
    return MixtralForCausalLM(config)


class OwnForward(GPT2LMHeadModel):
    def forward(self, input_ids: Any, labels: Any = None, **_: Any) -> Any:
        logits = self.lm_head(self.transformer(input_ids)[0])
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class Steps(GPT2LMHeadModel):
    """The stock forward pass, of which a subclass changes a step."""

    def forward(self, input_ids: Any, labels: Any = None, **_: Any) -> Any:
        hidden = self.transformer(**self.given(input_ids))[0]
        logits = self.logits(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, self.labels(labels), self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def given(self, input_ids: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}

    def logits(self, hidden: Any) -> Any:
        return self.lm_head(hidden)

    def labels(self, labels: Any) -> Any:
        return labels


class Doubled(Steps):
    """Its head is given something else than its body's output."""

    def logits(self, hidden: Any) -> Any:
        return self.lm_head(2 * hidden)


class Embedded(Steps):
    """Its body is given vectors."""

    def given(self, input_ids: Any) -> dict[str, Any]:
        return {"inputs_embeds": 2 * self.transformer.wte(input_ids)}


class Adapted(Steps):
    """Adds to its logits what is zero until it has learned (Hu et al. 2021, LoRA)."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.down = torch.nn.Linear(config.n_embd, 2, bias=False)
        self.up = torch.nn.Linear(2, config.vocab_size, bias=False)
        torch.nn.init.zeros_(self.up.weight)

    def logits(self, hidden: Any) -> Any:
        return self.lm_head(hidden) + self.up(self.down(hidden))


class Scaled(Steps):
    """Scales its logits, where they are, by what is 1 until it has learned."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def logits(self, hidden: Any) -> Any:
        return self.lm_head(hidden).mul_(self.scale)


class Slowed(torch.autograd.Function):
    """Hands on what it is given, and half of its gradient back."""

    @staticmethod
    def forward(_ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(_ctx: Any, outer: torch.Tensor) -> torch.Tensor:
        return outer / 2


class Detached(Steps):
    """Trains its head alone."""

    def logits(self, hidden: Any) -> Any:
        return self.lm_head(hidden.detach())


class Unrecorded(GPT2LMHeadModel):
    """The same, by running its body without gradients."""

    def forward(self, input_ids: Any, labels: Any = None, **_: Any) -> Any:
        with torch.no_grad():
            hidden = self.transformer(input_ids)[0]
        logits = self.lm_head(hidden)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class SlowBody(Steps):
    def logits(self, hidden: Any) -> Any:
        return self.lm_head(Slowed.apply(hidden))  # type: ignore[no-untyped-call]


class SlowLogits(Steps):
    def logits(self, hidden: Any) -> Any:
        return Slowed.apply(self.lm_head(hidden))  # type: ignore[no-untyped-call]


class SlowLoss(GPT2LMHeadModel):
    def forward(self, input_ids: Any, labels: Any = None, **_: Any) -> Any:
        outputs = super().forward(input_ids, labels=labels)
        if labels is not None:
            outputs.loss = Slowed.apply(outputs.loss)  # type: ignore[no-untyped-call]
        return outputs


class HookedBody(Steps):
    """A hook halves the gradient that its body is given."""

    def logits(self, hidden: Any) -> Any:
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient / 2)
        return self.lm_head(hidden)


class HookedView(Steps):
    """The same, where its body's output is looked at on the way."""

    def logits(self, hidden: Any) -> Any:
        seen = hidden[:]
        if seen.requires_grad:
            seen.register_hook(lambda gradient: gradient / 2)
        return self.lm_head(seen[:])


class LateLabels(Steps):
    """Learns nothing from the first tokens of a long row."""

    def labels(self, labels: Any) -> Any:
        late = torch.arange(labels.shape[1]) >= 8
        return labels if labels.shape[1] <= 8 else labels.masked_fill(~late, IGNORED)


def hooked() -> PreTrainedModel:
    """A hook caps its logits, which are far below the cap at first."""
    model = gpt2()
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits.clamp(-30, 30))
    return model


def backward_hooked() -> PreTrainedModel:
    """A hook of the head halves the gradient that it hands to the body."""
    model = gpt2()
    model.lm_head.register_full_backward_hook(lambda _module, inputs, _outputs: (inputs[0] / 2,))
    return model


def own_loss() -> PreTrainedModel:
    model = gpt2()
    model.loss_function = lambda logits, labels, **_: logits.float().mean()
    return model


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (granite, "changes its logits before the loss"),
        (mixtral, "adds to its loss"),
        (lambda: OwnForward(gpt2().config), "forward pass of its own"),
        (lambda: Doubled(gpt2().config), "changes its body's output"),
        (lambda: Embedded(gpt2().config), "forward pass of its own"),
        (lambda: Adapted(gpt2().config), "changes its logits before the loss"),
        (lambda: Scaled(gpt2().config), "changes its logits before the loss"),
        (lambda: LateLabels(gpt2().config), "changes its labels before the loss"),
        (lambda: Detached(gpt2().config), "changes a gradient"),
        (lambda: Unrecorded(gpt2().config), "changes a gradient"),
        (lambda: SlowBody(gpt2().config), "changes a gradient"),
        (lambda: SlowLogits(gpt2().config), "changes a gradient"),
        (lambda: SlowLoss(gpt2().config), "changes a gradient"),
        (lambda: HookedBody(gpt2().config), "changes a gradient"),
        (lambda: HookedView(gpt2().config), "changes a gradient"),
        (backward_hooked, "changes a gradient"),
        (hooked, "head has hooks"),
        (lambda: another_head(gpt2()), "no plain linear head"),
        (own_loss, "loss is its own"),
    ],
    ids=[
        "scaled logits", "another loss", "own forward", "other input", "vectors", "adapter", "own scale",
        "late labels", "detached body", "body without gradients", "slow body", "slow logits", "slow loss",
        "gradient's hook", "view's hook", "backward hook", "hook", "another head", "own loss",
    ],
)  # fmt: skip
def test_a_model_that_does_otherwise_keeps_its_own_loss_and_says_why(
    build: Callable[[], PreTrainedModel], why: str
) -> None:
    torch.manual_seed(0)
    model = build()
    model.loss_type = "ForCausalLM"
    batch = batches()["concat"]
    torch.manual_seed(5)
    before = model(**batch)
    said = use_chunked_loss(model, LENGTH)
    assert said is not None
    assert why in said
    assert replaced_forward(model) == set()
    torch.manual_seed(5)
    after = model(**batch)
    assert float(after.loss.detach()) == float(before.loss.detach())
    assert after.logits is not None
