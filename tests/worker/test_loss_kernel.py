"""The loss's kernel for GPUs, against PyTorch in double precision: on a GPU, and by Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Final

import pytest
import torch
from torch.nn import functional

from launcher.worker.chunked_loss import linear_cross_entropy
from launcher.worker.collate import IGNORED

has_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton comes with PyTorch for GPUs, and is for Linux"
)
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ROUNDING: Final = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
"""Of a gradient between -1 and 1."""


def check(rows: int, vocabulary: int, padding: int, dtype: torch.dtype, device: str) -> None:
    """Losses and gradients of random logits; one target is as good as impossible, and one all but sure."""
    from launcher.worker.loss_kernel import slopes_in_place

    draw = torch.Generator().manual_seed(rows)
    logits = (torch.randn(rows, vocabulary + padding, generator=draw) * 3).to(dtype)
    targets = torch.randint(vocabulary, (rows,), generator=draw)
    logits[0, targets[0]] = -50
    logits[1, targets[1]] = float(logits[1, :vocabulary].float().logsumexp(0)) + 7.6
    logits[:, vocabulary:] = 40
    known = logits[:, :vocabulary].double().requires_grad_()
    expected = functional.cross_entropy(known, targets, reduction="none")
    expected.sum().backward()  # type: ignore[no-untyped-call]
    found = logits.to(device)
    losses = slopes_in_place(found, targets.to(device), vocabulary).cpu()
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    slopes = found.cpu().double()
    torch.testing.assert_close(slopes[:, :vocabulary], known.grad, rtol=0, atol=ROUNDING[dtype])
    assert not slopes[:, vocabulary:].any()
    sure = slopes[1, targets[1]]
    assert known.grad is not None
    assert float(sure) == pytest.approx(float(known.grad[1, targets[1]]), rel=1e-2), "1 - p of a likely token"


@has_triton
def test_it_is_the_cross_entropy_s_gradient_by_triton_s_interpreter() -> None:
    """In a process of its own: Triton reads the variable where a kernel is made."""
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@has_triton
@pytest.mark.parametrize("generation", [80, 90, 100])
def test_triton_compiles_it_for_a_gpu_that_is_not_here(generation: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from launcher.worker.loss_kernel import BLOCK, WARPS, _kernel

    kinds = ("*bf16", "*i64", "*fp32", "i32", "i32", "i32", "constexpr")
    source = ASTSource(_kernel, dict(zip(_kernel.arg_names, kinds, strict=True)), {"block": BLOCK})
    target = GPUTarget("cuda", generation, 32)
    assert triton.compile(source, target=target, options={"num_warps": WARPS}).asm["cubin"]


@has_triton
def test_its_source_stands_by_itself_where_torch_compile_copies_it() -> None:
    from launcher.worker.loss_kernel import _kernel

    copied = f"import triton.language as tl\n{_kernel.src}"
    exec(compile(copied, "copied", "exec", dont_inherit=True), {})


@on_cuda
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_it_is_the_cross_entropy_s_gradient_on_a_gpu(dtype: torch.dtype) -> None:
    check(64, 50257, 47, dtype, "cuda")
    check(33, 1000, 0, dtype, "cuda")


@on_cuda
@pytest.mark.parametrize("columns", [1024, 1021])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_chunked_loss_on_a_gpu(compiled: bool, columns: int) -> None:
    """Compiled in the kernel, eager or with an odd number of columns by operators: in bf16, with labels left
    out and a padded vocabulary, against the stock loss of whole logits."""
    draw = torch.Generator().manual_seed(5)
    hidden = torch.randn(300, 64, generator=draw).cuda().requires_grad_()
    weight = (torch.randn(columns, 64, generator=draw) / 8).cuda().requires_grad_()
    labels = torch.randint(1000, (300,), generator=draw).cuda()
    labels[::7] = IGNORED

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, None, labels, items=None, vocabulary=1000, rows=128)

    with torch.autocast("cuda", torch.bfloat16):
        found = (torch.compile(loss, fullgraph=True) if compiled else loss)(hidden, weight)
    found.backward()  # type: ignore[no-untyped-call]
    ours = [each.grad.clone() for each in (hidden, weight) if each.grad is not None]
    hidden.grad = weight.grad = None
    expected = functional.cross_entropy(hidden @ weight[:1000].T, labels, ignore_index=IGNORED)
    expected.backward()  # type: ignore[no-untyped-call]
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=2e-3)
    theirs = [each.grad for each in (hidden, weight) if each.grad is not None]
    for mine, other in zip(ours, theirs, strict=True):
        assert float((mine - other).norm() / other.norm()) < 2e-2


if __name__ == "__main__":
    from launcher.worker import loss_kernel

    loss_kernel.BLOCK = 64  # type: ignore[misc]
    for kind in ROUNDING:
        check(9, 141, 9, kind, "cpu")
        check(5, 64, 0, kind, "cpu")
