"""What makes a rank fast without changing what the stock model's weights mean or how it is saved."""

from __future__ import annotations

import ctypes
from typing import Final

import torch
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation

M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
"""Of mallopt(3)."""


def keep_freed_memory() -> None:
    """Have freed tensors on the CPU used again, rather than given back to the kernel and taken anew.

    glibc returns what is over 32 MiB as soon as it is freed, and the end of its heap too. Logits are
    larger than that, so each step would have every page of them faulted in and cleared again: 35,000
    page faults and a twelfth of the processor time of a small GPT-2's step. A C library without
    mallopt(3) is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_MMAP_THRESHOLD, 2**31 - 1)


def use_tanh_gelu_kernel(model: PreTrainedModel) -> int:
    """Replace every eager `gelu_new` by PyTorch's one-kernel tanh GELU; returns how many.

    Both are 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) (Hendrycks and Gimpel, 2016). The eager
    form runs about eight kernels. The model's config keeps its name for the function.
    """
    replaced = 0
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(parent, name, torch.nn.GELU(approximate="tanh"))
                replaced += 1
    return replaced
