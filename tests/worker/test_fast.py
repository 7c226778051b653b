"""Each fast path, and all of them, against the stock model: the same loss and gradients, only faster."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch.backends import cuda
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    EvalPrediction,
    FalconConfig,
    FalconForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers.activations import NewGELUActivation

from launcher.plan.fast import Fast
from launcher.worker.collate import stack
from launcher.worker.evaluate import evaluate
from launcher.worker.fast import (
    CAUSAL,
    TanhGELU,
    cache_whole_graphs,
    set_matmul_precision,
    taken_by,
    use_causal_attention,
    use_tanh_gelu_kernel,
)
from launcher.worker.vocabulary import take_out_padding
from tests.worker.parity import (
    ALL,
    LENGTH,
    NOTHING,
    ROWS,
    STILL,
    VOCABULARY,
    backward,
    batches,
    gpt2,
    llama,
    made,
    mistral,
    reference,
    run,
)

pytestmark = pytest.mark.usefixtures("one_thread")
each_model = pytest.mark.parametrize("build", [gpt2, llama])
each_batch = pytest.mark.parametrize("packing", ["concat", "pad", "isolated"])
ALONE = {
    "tanh_gelu": replace(NOTHING, tanh_gelu=True),
    "causal_attention": replace(NOTHING, causal_attention=True),
    "chunked_loss": replace(NOTHING, chunked_loss=True),
    "padded_vocabulary": replace(NOTHING, padded_vocabulary=True),
}


@each_batch
@pytest.mark.parametrize("fast", [*ALONE.values(), ALL], ids=[*ALONE, "all"])
@each_model
def test_loss_and_every_gradient_are_those_of_the_stock_model(
    build: Callable[[], PreTrainedModel], fast: Fast, packing: str
) -> None:
    batch = batches()[packing]
    for items in (None, torch.tensor(300)):
        ours = run(made(build, fast)[0], batch, items=items)
        stock = run(made(build, NOTHING)[0], batch, items=items)
        by_hand = reference(made(build, NOTHING)[0], batch, items=items)
        for theirs in (stock, by_hand):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
            assert ours.apart(theirs) < 2e-6


@each_batch
@each_model
def test_under_autocast_the_gradients_are_as_near_to_fp32_as_the_stock_model_s(
    build: Callable[[], PreTrainedModel], packing: str
) -> None:
    batch = batches()[packing]
    exact = reference(made(build, NOTHING)[0], batch)
    stock = run(made(build, NOTHING)[0], batch, bf16=True)
    ours = run(made(build, ALL)[0], batch, bf16=True)
    assert ours.loss == pytest.approx(exact.loss, rel=1e-3)
    assert 1e-4 < stock.apart(exact) < 0.05
    assert ours.apart(exact) < 1.2 * stock.apart(exact)


def test_a_model_in_half_precision_throughout_too() -> None:
    batch = batches()["concat"]
    exact = reference(made(gpt2, NOTHING)[0], batch)
    stock, ours = (made(gpt2, fast)[0].bfloat16() for fast in (NOTHING, ALL))
    found, theirs = run(ours, batch), run(stock, batch)
    assert {gradient.dtype for gradient in found.gradients.values()} == {torch.bfloat16}
    assert found.loss == pytest.approx(exact.loss, rel=3e-3)
    assert 1e-4 < theirs.apart(exact) < 0.1
    assert found.apart(exact) < 1.2 * theirs.apart(exact)


@each_model
def test_two_micro_batches_with_recomputation_add_up_as_in_the_stock_model(
    build: Callable[[], PreTrainedModel],
) -> None:
    found = []
    for fast in (ALL, NOTHING):
        model = made(build, fast)[0]
        model.activation_checkpointing_enable({"use_reentrant": False})
        two = (batches()[packing] for packing in ("concat", "pad"))
        found += [run(model, batch, items=torch.tensor(220)) for batch in two]
    assert found[1].loss == pytest.approx(found[3].loss, rel=1e-6)
    assert found[1].apart(found[3]) < 2e-6


@each_model
def test_without_labels_the_logits_are_the_stock_model_s(build: Callable[[], PreTrainedModel]) -> None:
    ours, stock = (made(build, fast)[0].eval() for fast in (ALL, NOTHING))
    with torch.no_grad():
        for batch in batches().values():
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            logits = ours(**inputs).logits
            assert logits.shape == (ROWS, batch["input_ids"].shape[1], VOCABULARY)
            torch.testing.assert_close(logits, stock(**inputs).logits, rtol=1e-5, atol=1e-6)
            loss, theirs = ours(**batch).loss, stock(**batch).loss
            assert float(loss) == pytest.approx(float(theirs), rel=1e-6)


def test_evaluation_gives_the_stock_loss_and_a_metric_the_stock_predictions() -> None:
    seen: list[Any] = []

    def metric(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {"right": float(np.equal(prediction.predictions, prediction.label_ids).mean())}

    rows = list(batches()["concat"]["input_ids"].numpy())
    found = []
    for fast in (ALL, NOTHING):
        about: dict[str, Any] = {"rank": 0, "world_size": 1, "micro_batch": 3, "block_size": LENGTH}
        about |= {"goes_on": lambda: True}
        model = made(gpt2, fast)[0]
        found.append(evaluate(model, rows, stack, **about, device=torch.device("cpu"), metrics=[metric]))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert (seen[0].predictions == seen[1].predictions).all()


def test_text_can_be_generated_while_it_trains() -> None:
    ours, stock = (made(gpt2, fast)[0].eval() for fast in (ALL, NOTHING))
    ids = batches()["concat"]["input_ids"][:2, :6]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])  # one prompt is padded on the left
    asked: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(ids, **asked), stock.generate(ids, **asked))
    assert ours.config._attn_implementation == CAUSAL, "as it was before"


@each_model
def test_what_is_saved_is_the_stock_model(build: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    model, _ = made(build, ALL)
    for parameter in model.parameters():
        parameter.data.mul_(1.01)
    batch = batches()["concat"]["input_ids"]
    with torch.no_grad():
        expected = model.eval()(batch).logits
    take_out_padding(model)
    model.save_pretrained(tmp_path)
    assert "causal" not in (tmp_path / "config.json").read_text()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert saved.get_output_embeddings().weight.shape[0] == VOCABULARY
    assert saved.config.vocab_size == VOCABULARY
    assert saved.config._attn_implementation == "sdpa"
    with torch.no_grad():
        torch.testing.assert_close(saved(batch).logits, expected, rtol=1e-5, atol=1e-6)


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that bring a number to the host, where a GPU would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function._schema.name in (
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::is_nonzero",
        )
        return function(*args, **(kwargs or {}))


def test_a_micro_batch_asks_nothing_of_the_host() -> None:
    counts, items = [], torch.tensor(124)
    for fast in (NOTHING, ALL):
        model, batch = made(gpt2, fast)[0], batches()["concat"]
        if fast is NOTHING:  # `make_fast` silences transformers' look for pad ids in any case
            for module in model.modules():
                module.__dict__.pop("warn_if_padding_and_no_attention_mask", None)
        with Waits() as waits:
            model(**batch, num_items_in_batch=items).loss.backward()
        counts.append(waits.count)
    assert counts[0] >= 2, "the stock model looks for pad ids and for packed rows"
    assert counts[1] == 0


@pytest.mark.parametrize(
    "build", [lambda: gpt2(**STILL), lambda: llama(attention_dropout=0.0)], ids=["gpt2", "llama"]
)
def test_compiled_it_is_one_graph_without_a_mask(build: Callable[[], PreTrainedModel]) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    batch, items = batches()["concat"], torch.tensor(300)
    model = made(build, ALL)[0]
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    ours = backward(model, compiled(**batch, num_items_in_batch=items).loss)
    assert len(graphs) == 1
    attention = [
        node.kwargs for node in graphs[0].graph.nodes if "scaled_dot_product_attention" in str(node.target)
    ]
    assert [(each["attn_mask"], each["is_causal"]) for each in attention] == [(None, True)] * 2
    theirs = reference(made(build, NOTHING)[0], batch, items=items)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
    assert ours.apart(theirs) < 2e-6


def test_the_cache_s_key_has_the_attention_kernels_that_are_switched_on() -> None:
    """Inductor's settings are in it, as it takes them; tests/test_compiled.py sees graphs found again."""

    def key() -> dict[str, Any]:
        cache_whole_graphs()
        return inductor.save_config_portable()

    with functorch.patch({}), inductor.patch({}):
        first = key()
        assert key() == first
        cuda.enable_flash_sdp(False)
        try:
            assert key() != first
        finally:
            cuda.enable_flash_sdp(True)
        assert key() == first


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
def test_compiled_the_activation_is_tanh_gelu_by_another_formula(dtype: torch.dtype, rounding: float) -> None:
    x = torch.linspace(-12, 12, 997, dtype=dtype).requires_grad_()
    outer = torch.linspace(-1, 2, 997, dtype=dtype)
    torch._dynamo.reset()
    written: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        written.extend(each.code for each in graph.modules() if isinstance(each, torch.fx.GraphModule))
        return aot_eager(graph, inputs)

    compiled: Any = torch.compile(TanhGELU(), backend=backend, fullgraph=True)
    found, expected = compiled(x), torch.nn.functional.gelu(x, approximate="tanh")
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)
    ours, theirs = (torch.autograd.grad(each, x, outer)[0] for each in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=rounding, atol=4 * rounding)
    assert "sigmoid" in "".join(written), "the other formula"
    assert "gelu" not in "".join(written)


@pytest.mark.parametrize(("tf32", "precision"), [(True, "high"), (False, "highest")])
def test_the_precision_of_products_is_the_plan_s_whatever_was_set(tf32: bool, precision: str) -> None:
    try:
        for before in ("medium", "high", "highest"):
            torch.set_float32_matmul_precision(before)
            set_matmul_precision(Fast(tf32=tf32))
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_paths_that_a_model_takes_are_read_from_it() -> None:
    for fast in (*ALONE.values(), ALL, NOTHING):
        model, fell_back = made(gpt2, fast)
        assert taken_by(model) == set(fast.taken) - {"fused_adamw"}
        assert fell_back == {}


def gelu_as_it_was(model: PreTrainedModel) -> None:
    for layer in model.get_submodule("transformer.h").children():
        layer.mlp.act = NewGELUActivation()  # type: ignore[union-attr]


def forward_as_it_was(model: PreTrainedModel) -> None:
    del model.forward


def attention_as_it_was(model: PreTrainedModel) -> None:
    model.config._attn_implementation = "sdpa"


def logits_as_they_were(model: PreTrainedModel) -> None:
    model.get_output_embeddings()._forward_hooks.clear()


@pytest.mark.parametrize(
    ("undo", "path"),
    [
        (gelu_as_it_was, "tanh_gelu"),
        (attention_as_it_was, "causal_attention"),
        (forward_as_it_was, "chunked_loss"),
        (logits_as_they_were, "padded_vocabulary"),
    ],
)
def test_a_path_that_was_undone_is_not_read_from_the_model(
    undo: Callable[[PreTrainedModel], None], path: str
) -> None:
    model, _ = made(gpt2, ALONE[path])
    undo(model)
    assert path not in taken_by(model)


def test_a_model_without_the_activation_is_left_alone_and_says_so() -> None:
    model, fell_back = made(llama, ALL)
    assert fell_back == {"tanh_gelu": "the model has no gelu_new"}
    assert taken_by(model) == {"causal_attention", "chunked_loss", "padded_vocabulary"}


def test_the_config_that_is_saved_still_names_the_function() -> None:
    model = gpt2()
    assert use_tanh_gelu_kernel(model) == 2
    assert model.config.activation_function == "gelu_new"


def qwen2_moe() -> PreTrainedModel:
    """Its config says 0 where it has no window."""
    config = Qwen2MoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    )  # fmt: skip
    assert config.sliding_window == 0
    return Qwen2MoeForCausalLM(config)


def falcon() -> PreTrainedModel:
    """Its own attention layer reads the mask's shape."""
    fields: dict[str, Any] = {"alibi": True, "new_decoder_architecture": False}
    return FalconForCausalLM(
        FalconConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, **fields
        )
    )  # fmt: skip


def eager() -> PreTrainedModel:
    return gpt2(attn_implementation="eager")


@pytest.mark.parametrize(
    ("build", "block_size", "why"),
    [
        (mistral, LENGTH, "attends to the last 8 tokens, and a block has 32"),
        (mistral, 8, None),
        (qwen2_moe, LENGTH, None),
        (eager, LENGTH, "attention is eager"),
        (falcon, LENGTH, "does not run without a mask"),
        (gpt2, LENGTH, None),
        (
            lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=2)),
            8,
            "",
        ),
    ],
    ids=["window", "short block", "no window", "eager", "needs one", "gpt2", "alibi"],
)
def test_attention_that_is_more_than_causal_keeps_its_mask(
    build: Callable[[], PreTrainedModel], block_size: int, why: str | None
) -> None:
    model = build()
    before = model.config._attn_implementation
    said = use_causal_attention(model, block_size)
    if why is None:
        assert said is None
        assert model.config._attn_implementation == CAUSAL
    else:
        assert said is not None
        assert why in said
        assert model.config._attn_implementation == before


def faults(statement: str) -> int:
    """Pages the kernel hands out while a process fills and frees a tensor of 64 MiB (16,384 pages) ten times,
    after `statement` and twenty such tensors."""
    program = f"""
import resource, torch
torch.set_num_threads(1)
{statement}
for _ in range(20):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives freed memory back at once")
def test_freed_memory_is_used_again() -> None:
    assert faults("pass") > 10 * 2**14 * 0.9
    assert faults("from launcher.worker.fast import keep_freed_memory; keep_freed_memory()") < 100
