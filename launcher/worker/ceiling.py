"""What a large matrix product reaches on this very GPU: the ceiling that a model's speed is read against."""

from __future__ import annotations

import contextlib

import torch

from launcher.worker.step_times import stream_event

SIDE = 8192
"""`scripts/bench_gpu` multiplies matrices of the same size."""
MEASURED_SECONDS = 0.1
MOST_PRODUCTS = 20


def matmul_flops(dtype: torch.dtype) -> float | None:
    """FLOP/s of the product of two square matrices on the current GPU, with the settings that training has.

    Takes about MEASURED_SECONDS, three products at least; None where they do not fit beside the model. What
    it allocates is given back, and no random number is drawn that training would draw.
    """
    reached = None
    with contextlib.suppress(torch.OutOfMemoryError):
        reached = _measured(dtype)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return reached


def _measured(dtype: torch.dtype) -> float:
    source = torch.Generator("cuda").manual_seed(0)
    # Not zeros: a GPU draws less power for those, and is faster.
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=dtype, generator=source) for _ in range(2))
    product = a @ b  # loads and chooses the kernel
    once = _seconds(a, b, product, 1)
    products = max(1, min(MOST_PRODUCTS, int(MEASURED_SECONDS / once)))
    return 2.0 * SIDE**3 * products / _seconds(a, b, product, products)


def _seconds(a: torch.Tensor, b: torch.Tensor, product: torch.Tensor, times: int) -> float:
    begin, end = stream_event(), stream_event()
    torch.cuda.synchronize()
    begin.record()
    for _ in range(times):
        torch.mm(a, b, out=product)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
