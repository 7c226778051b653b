"""What makes a rank fast without changing what the stock model's weights mean or how it is saved."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch.backends import cuda
from transformers import AttentionInterface, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from launcher.plan.fast import Fast
from launcher.worker.chunked_loss import replace_forward, replaced_forward, use_chunked_loss
from launcher.worker.probe import attention, few_ids, on_trial
from launcher.worker.vocabulary import is_padded, pad_vocabulary

M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
"""Of mallopt(3)."""

CAUSAL: Final = "sdpa_causal"
"""What transformers is told the attention without a mask is called, while a model trains."""

NEEDS_A_MASK: Final = ("attention_mask", "position_ids", "past_key_values")
"""Inputs that say more than causal attention alone would see to."""

AUTOCAST: Final = ("_enter_autocast", "_exit_autocast")
"""What torch.compile writes into a graph for `with torch.autocast`."""

ATTENTION_KERNELS: Final[tuple[Callable[[], bool], ...]] = (
    cuda.flash_sdp_enabled,
    cuda.mem_efficient_sdp_enabled,
    cuda.math_sdp_enabled,
    cuda.cudnn_sdp_enabled,
)
"""PyTorch's switches, for CPUs too."""

GELU_CUBE: Final = 0.044715
GELU_SCALE: Final = 2 * math.sqrt(2 / math.pi)
"""Of tanh GELU, the scale twice, as for a sigmoid (Hendrycks and Gimpel 2016, section 2)."""


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


def set_matmul_precision(fast: Fast) -> None:
    """TF32 for fp32 matrix products on a GPU, or all of their 24 bits: never what a library left there."""
    torch.set_float32_matmul_precision("high" if fast.tf32 else "highest")


def cache_whole_graphs() -> None:
    """Have torch.compile keep what it traces and divides of a model, beside the kernels that it always keeps.

    By itself PyTorch 2.13 does so for no graph that has autocast or an autograd.Function in it. Both stand
    there with what they do, and the graph is the cache's key. Which attention kernels are switched on is not
    in it, so that goes in beside. Called when nothing more is switched: before the first step.
    """
    functorch.autograd_cache_allow_custom_autograd_functions = True
    kernels = "".join(str(int(switched_on())) for switched_on in ATTENTION_KERNELS)
    marked = {f"torch.amp.autocast_mode.{name}": f"{torch.__version__} {kernels}" for name in AUTOCAST}
    inductor.unsafe_marked_cacheable_functions = {**inductor.unsafe_marked_cacheable_functions, **marked}


def make_fast(model: PreTrainedModel, fast: Fast, *, block_size: int) -> dict[str, str]:
    """Take the model's own part of the planned paths. Returns those it cannot take, each with the reason.

    The model is whole and on the CPU, in rows of `block_size` tokens; the padding of its vocabulary stands
    already, or not at all.
    """
    fell_back: dict[str, str | None] = {}
    if fast.tanh_gelu and not use_tanh_gelu_kernel(model):
        fell_back["tanh_gelu"] = "the model has no gelu_new"
    if fast.chunked_loss:
        fell_back["chunked_loss"] = use_chunked_loss(model, block_size)
    if fast.causal_attention:
        fell_back["causal_attention"] = use_causal_attention(model, block_size)
    if fast.padded_vocabulary and not is_padded(model):
        fell_back["padded_vocabulary"] = pad_vocabulary(model)
    ask_nothing_of_the_host(model)
    return {name: why for name, why in fell_back.items() if why is not None}


def taken_by(model: PreTrainedModel) -> set[str]:
    """The paths that this very model takes, read from its modules and its forward pass."""
    modules = list(model.modules())
    found = replaced_forward(model)
    if model.config._attn_implementation != CAUSAL:
        found.discard("causal_attention")
    if is_padded(model):
        found.add("padded_vocabulary")
    eager = any(isinstance(module, NewGELUActivation) for module in modules)
    if not eager and any(isinstance(module, TanhGELU) for module in modules):
        found.add("tanh_gelu")
    return found


class TanhGELU(torch.nn.GELU):
    """PyTorch's one-kernel tanh GELU, where a model had an eager one."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name
        if torch.compiler.is_compiling():
            found: torch.Tensor = _BySigmoid.apply(input)  # type: ignore[no-untyped-call]
            return found
        return super().forward(input)


class _BySigmoid(torch.autograd.Function):
    """The same for torch.compile: 0.5 (1 + tanh u) is sigmoid(2u), which costs a GPU less than tanh.

    With the slope written out, as autograd would keep what is computed on the way.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return wide.mul(torch.sigmoid(_twice_inner(wide))).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inner = _twice_inner(wide)
        share, rest = torch.sigmoid(inner), torch.sigmoid(-inner)
        slope = GELU_SCALE * (1 + 3 * GELU_CUBE * wide * wide)
        return outer.mul(share + wide * share * rest * slope).to(outer.dtype)


def _twice_inner(x: torch.Tensor) -> torch.Tensor:
    """2 u, where u is what tanh GELU takes the tanh of."""
    return torch.mul(x, GELU_SCALE + GELU_SCALE * GELU_CUBE * x * x)


def use_tanh_gelu_kernel(model: PreTrainedModel) -> int:
    """Replace every eager `gelu_new` by PyTorch's one-kernel tanh GELU; returns how many.

    Both are 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) (Hendrycks and Gimpel, 2016). The eager
    form runs about eight kernels. The model's config keeps its name for the function.
    """
    replaced = 0
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(parent, name, TanhGELU())
                replaced += 1
    return replaced


def use_causal_attention(model: PreTrainedModel, block_size: int) -> str | None:
    """Have sdpa attend causally by its own flag, where stock transformers gives it a mask or asks for one.

    It does so whenever it is traced, and in eager mode it looks at the positions first, which waits for the
    GPU. Inputs that need a mask get the stock attention, mask and all. Returns why the model cannot, and then
    is as it was.
    """
    before = model.config._attn_implementation
    why = _other_than_causal(model, block_size)
    if why is not None:
        return why
    AttentionInterface.register(CAUSAL, sdpa_attention_forward)
    stock = model.forward

    def forward(self: Any, *args: Any, **inputs: Any) -> Any:
        if len(args) > 1 or any(inputs.get(name) is not None for name in NEEDS_A_MASK):
            with attention(self, before):
                return stock(*args, **inputs)
        return stock(*args, **inputs)

    ids = few_ids(model, block_size).expand(2, -1)
    try:
        with torch.no_grad(), on_trial(model):
            expected = model(input_ids=ids).logits
            with attention(model, CAUSAL):
                found = model(input_ids=ids).logits
    except Exception as error:  # noqa: BLE001 - a model of any kind, which then keeps its own attention
        return f"the model does not run without a mask: {error}"
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
        return "without a mask the model's logits are others"
    model.config._attn_implementation = CAUSAL
    replace_forward(model, forward, "causal_attention")
    return None


def _other_than_causal(model: PreTrainedModel, block_size: int) -> str | None:
    """Why a mask is more than causal, as far as the model's config says; None if it is not."""
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa":
        return f"the model's attention is {config._attn_implementation}"
    window = getattr(config, "sliding_window", None)
    if window and window < block_size:
        return f"the model attends to the last {window:,} tokens, and a block has {block_size:,}"
    if getattr(config, "attention_chunk_size", None) is not None:
        return "the model attends within chunks"
    if not getattr(config, "is_causal", True):
        return "the model attends both ways"
    return None


def ask_nothing_of_the_host(model: PreTrainedModel) -> None:
    """Leave out transformers' look for pad ids in each batch without a mask: it waits for the GPU."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.warn_if_padding_and_no_attention_mask = lambda *_: None  # type: ignore[method-assign]
