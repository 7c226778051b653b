"""The output layer and its cross-entropy some tokens at a time, so that a step's logits are never all there.

The loss of each token depends on its own logits alone, so each chunk's gradient is made beside its loss, in
the forward pass, and only what a weight and an input need is kept: as in Hsu et al. 2024, "Liger Kernel:
Efficient Triton Kernels for LLM Training", section 3.2, with PyTorch's own operators. Compiled for a GPU,
what lies between the products is one kernel (`worker/loss_kernel.py`). Liger's own is not used: its backward
pass compares a tensor with 1 on the host, which waits for the GPU each time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from types import MethodType
from typing import Any, Final

import torch
from torch.autograd.graph import Node, get_gradient_edge, saved_tensors_hooks
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from launcher.errors import TrainingError
from launcher.plan.fast import chunk_rows, one_kernel
from launcher.worker.collate import IGNORED
from launcher.worker.model import in_mode
from launcher.worker.probe import next_token_loss, on_trial, probe_ids
from launcher.worker.vocabulary import RealColumns, plain_head, real_columns

if find_spec("triton") is not None:
    from launcher.worker import loss_kernel

PROVED: Final = 128
"""Tokens that a model is tried with, and the live loss compared on."""

NOISE: Final[Mapping[str, float]] = {"fp32": 1e-4, "bf16": 1e-2}
"""How far rounding may move a loss, as a part of it."""

STOCK: Final = ("logits_to_keep", "shift_labels", "output_hidden_states", "output_attentions")
"""What a caller may ask a model for that only the stock forward pass gives."""

VIEWS: Final = {"AliasBackward0", "SliceBackward0", "ViewBackward0"}
"""What autograd calls the ways to look at a whole tensor again: its gradient goes back through as it is."""

Layout = tuple[int, torch.Size, tuple[int, ...], int]
"""Of a tensor: where it lies, how, and how often it was changed there."""


def use_chunked_loss(model: PreTrainedModel, block_size: int) -> str | None:
    """Have `model`, given labels, return its loss without logits. Returns why it cannot, and is as it was.

    Without labels the forward pass is the stock one. The gradients are those of `ForCausalLMLoss` on the
    stock logits, in the precision that the matrix products are computed in.
    """
    whys = []
    for body in (whole_body, decoder):
        whys.append(_other_than_plain(model, body(model), block_size))
        if whys[-1] is None:
            give_chunked_loss(model, body)
            return None
    return whys[0]


def whole_body(model: PreTrainedModel) -> torch.nn.Module:
    """All of the model but its head."""
    found: torch.nn.Module = model.base_model
    return found


def decoder(model: PreTrainedModel) -> torch.nn.Module:
    """What makes the head's input in a model that passes the rest of its body over, as OPT does."""
    found: torch.nn.Module = model.get_decoder()
    return found


def give_chunked_loss(
    model: PreTrainedModel, body: Callable[[PreTrainedModel], torch.nn.Module] = whole_body
) -> None:
    """The same for a model whose forward pass is known to be the stock one of its head on this body."""
    stock = model.forward

    def forward(self: Any, *args: Any, **inputs: Any) -> Any:
        if inputs.get("labels") is None or len(args) > 1 or _asks_for_more(inputs):
            return stock(*args, **inputs)
        labels, items = inputs.pop("labels"), inputs.pop("num_items_in_batch", None)
        hidden = body(self)(*args, **inputs)[0]
        head = self.get_output_embeddings()
        following = functional.pad(labels, (0, 1), value=IGNORED)[..., 1:].reshape(-1)
        loss = linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            head.weight,
            head.bias,
            following,
            items=items,
            vocabulary=real_columns(head),
        )
        return CausalLMOutputWithPast(loss=loss)

    replace_forward(model, forward, "chunked_loss")


def _asks_for_more(inputs: Mapping[str, Any]) -> bool:
    asked = (inputs.get(name) for name in STOCK)
    more = any(isinstance(each, torch.Tensor) or each for each in asked)
    return more or inputs.get("return_dict") is False


@torch.no_grad()
def prove_chunked_loss(
    model: PreTrainedModel, *, vocabulary: int, block_size: int, device: torch.device, precision: str
) -> str:
    """Compare the live model's own loss with that of all its logits, on its device and in its precision.

    Every rank calls it at once, as a sharded model needs. Its mode and the random generators are left as they
    were. Returns the one line that says they agree; raises TrainingError, with both, where they do not.
    """
    ids = probe_ids(min(PROVED, block_size), vocabulary=vocabulary, device=device)
    seeds = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    # DeepSpeed has the model itself compiled: two more graphs, which nothing would use again.
    with in_mode(model, training=False), seeds, torch.compiler.set_stance("force_eager"):
        found = model(input_ids=ids, labels=ids)
        whole = next_token_loss(model(input_ids=ids).logits, ids)
    told = f"{float(found.loss):.6g} by itself, {float(whole):.6g} from all logits"
    if found.logits is not None or not abs(float(found.loss - whole)) <= NOISE[precision] * float(whole):
        raise TrainingError(
            f"train.fast.chunked_loss: the loss is not that of the logits: {told}",
            hint="set train.fast.chunked_loss: false, and report this with plan.json and the rank's log",
        )
    return f"chunked loss: {told}"


def replace_forward(model: PreTrainedModel, forward: Any, *paths: str) -> None:
    """Give this one model another forward pass, of the same signature, that says which fast paths it is."""
    forward.__signature__ = inspect.signature(getattr(model.forward, "__func__", model.forward))
    forward.fast_paths = {*paths, *getattr(model.forward, "fast_paths", ())}
    model.forward = MethodType(forward, model)


def replaced_forward(model: PreTrainedModel) -> set[str]:
    """The fast paths of the forward pass that `model` really runs, under whatever it is wrapped in."""
    forward: Any = model.forward
    while forward is not None:
        if hasattr(forward, "fast_paths"):
            return set(forward.fast_paths)
        forward = getattr(forward, "__wrapped__", None)
    return set()


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    items: torch.Tensor | int | None,
    vocabulary: int,
    rows: int | None = None,
) -> torch.Tensor:
    """The summed cross-entropy of `hidden @ weight.T + bias` over `items`, or where None over the labels.

    `hidden` is [tokens, width], `weight` [at least `vocabulary`, width]: later rows take no part. `labels` is
    int64[tokens], IGNORED where there is none. `rows`: tokens in a chunk.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    counted = labels.ne(IGNORED)
    divisor = counted.sum() if items is None else items
    size = rows or chunk_rows(weight.shape[0], on_cpu=kind == "cpu")
    given = (hidden, weight, bias, labels, counted, dtype, vocabulary, size)
    with torch.autocast(kind, enabled=False):
        if torch.is_grad_enabled():
            total: torch.Tensor = _Summed.apply(*given)  # type: ignore[no-untyped-call]
        else:
            total, *_ = _sum(*given, gradients=False)
        return total / divisor


class _Summed(torch.autograd.Function):
    """The sum over all tokens, with the gradients made on the way."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> torch.Tensor:
        total, *gradients = _sum(*given, gradients=True)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> Any:
        hidden, weight, bias = ctx.saved_tensors
        return (
            hidden * outer.to(hidden.dtype),
            weight * outer.to(weight.dtype),
            None if bias is None else bias * outer.to(bias.dtype),
            *(None,) * 5,
        )


def _sum(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    counted: torch.Tensor,
    dtype: torch.dtype,
    vocabulary: int,
    rows: int,
    *,
    gradients: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The sum, and its gradients by hidden, weight and bias."""
    precise = torch.promote_types(dtype, torch.float32)
    cast, cast_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    total = torch.zeros((), dtype=precise, device=hidden.device)
    by_hidden = torch.empty_like(hidden) if gradients else None
    by_weight = torch.zeros_like(weight, dtype=precise) if gradients else None
    by_bias = torch.zeros_like(bias, dtype=precise) if gradients and bias is not None else None
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        here, real = hidden[part].to(dtype), counted[part, None]
        target = labels[part, None].clamp_min(0)
        logits = functional.linear(here, cast, cast_bias)
        losses = (_slopes_in_place if gradients else _losses)(logits, target, vocabulary, precise)
        total = total + torch.where(real, losses, 0).sum()
        if by_hidden is None or by_weight is None:
            continue
        slope = logits
        by_hidden[part] = torch.where(real, slope @ cast, 0)
        if by_weight.dtype == dtype:
            by_weight.addmm_(slope.t(), torch.where(real, here, 0))
        else:
            by_weight += slope.t() @ torch.where(real, here, 0)
        if by_bias is not None:
            by_bias += real[:, 0].to(dtype) @ slope
        del logits, slope  # or the next chunk's would be made beside them
    return (
        total,
        by_hidden,
        None if by_weight is None else by_weight.to(weight.dtype),
        None if by_bias is None or bias is None else by_bias.to(bias.dtype),
    )


def _likelihood(logits: torch.Tensor, vocabulary: int, precise: torch.dtype) -> torch.Tensor:
    """The logarithms of each row's probabilities. The columns that are padding are taken out of `logits`."""
    logits[:, vocabulary:] = -torch.inf
    return torch.log_softmax(logits, dim=1, dtype=precise)


def _losses(
    logits: torch.Tensor, target: torch.Tensor, vocabulary: int, precise: torch.dtype
) -> torch.Tensor:
    """The loss of each row, [rows, 1]."""
    return -_likelihood(logits, vocabulary, precise).gather(1, target)


def _slopes_in_place(
    logits: torch.Tensor, target: torch.Tensor, vocabulary: int, precise: torch.dtype
) -> torch.Tensor:
    """Make `logits` the gradient by them, their softmax less one at the target. Returns losses, [rows, 1]."""
    if by_kernel(logits):
        return loss_kernel.slopes_in_place(logits, target[:, 0], vocabulary)[:, None]
    if logits.dtype != precise:
        likelihood = _likelihood(logits, vocabulary, precise)
        losses = -likelihood.gather(1, target)
        torch.exp(likelihood, out=logits)
    else:
        losses = _softmax_in_place(logits, target, vocabulary)
    logits.scatter_(1, target, (-losses).expm1().to(logits.dtype))
    return losses


def by_kernel(logits: torch.Tensor) -> bool:
    """Whether launcher's kernel is for them. Who compiles for a GPU has Triton and its C compiler."""
    for_gpu = torch.compiler.is_compiling() and logits.is_cuda and logits.dtype == torch.bfloat16
    return for_gpu and one_kernel(logits.shape[1])


def _softmax_in_place(logits: torch.Tensor, target: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Make `logits` their softmax, without a second buffer as large. Returns losses, [rows, 1]."""
    logits[:, vocabulary:] = -torch.inf
    chosen, greatest = logits.gather(1, target), logits.amax(1, keepdim=True)
    torch.softmax(logits, 1, out=logits)
    # The likeliest token has at least 1 / vocabulary; the target's probability may underflow. What is left of
    # two logits comes first: the loss of a likely token is small beside them.
    return (greatest - chosen) - logits.amax(1, keepdim=True).log()


def _other_than_plain(model: PreTrainedModel, body: torch.nn.Module, block_size: int) -> str | None:
    """Why the model's loss is not the stock one of its head on this body's output; None if it is.

    Tried with a few tokens, as it trains and as it is evaluated: the body is given the ids themselves, the
    head the body's output, the loss function the head's and the labels, and the loss that is returned is the
    one it made. A model that scales or caps its logits, or adds another loss, or detaches its body, or has a
    forward pass of another kind, is seen, and keeps its own.
    """
    head = plain_head(model)
    if head is None:
        return "the model has no plain linear head"
    hooks = [*head._forward_pre_hooks.values(), *head._forward_hooks.values()]
    if not all(isinstance(hook, RealColumns) for hook in hooks):
        return "the model's head has hooks"
    if body is model or model.loss_function is not ForCausalLMLoss:
        return "the model's loss is its own"
    tokens = min(PROVED, block_size)
    ids = probe_ids(tokens, vocabulary=real_columns(head), device=head.weight.device)
    whys = [_passes_on(model, head, body, ids, training=training) for training in (True, False)]
    return whys[0] or whys[1]


@torch.enable_grad()
def _passes_on(
    model: PreTrainedModel,
    head: torch.nn.Linear,
    body: torch.nn.Module,
    ids: torch.Tensor,
    *,
    training: bool,
) -> str | None:
    """Why one pass hands on something else than the stock one does; None if it does not.

    What is handed on must be the very tensor, unchanged: another one of the same values may be another
    function of the weights, which are still what they began as. So must its gradient: autograd's record is
    read, and nothing kept for a backward pass.
    """
    seen: dict[str, tuple[torch.Tensor, Layout]] = {}

    def see(**tensors: torch.Tensor) -> None:
        seen.update({name: (tensor, _layout(tensor)) for name, tensor in tensors.items()})

    def loss_function(logits: torch.Tensor, labels: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        shifted = more.get("shift_labels")
        see(given=logits, told=labels if shifted is None else shifted)
        loss: torch.Tensor = ForCausalLMLoss(logits, labels, *args, **more)
        see(loss=loss)
        return loss

    def of_body(_module: torch.nn.Module, args: Any, more: Mapping[str, Any], output: Any) -> None:
        asked = more.get("input_ids", args[0] if args else None)
        if torch.is_grad_enabled():
            output[0].requires_grad_()  # so that a frozen body's shows which way its gradient would come
        see(body=output[0], **({} if asked is None else {"asked": asked}))

    def of_head(_module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        see(hidden=inputs[0], logits=output)

    hooks = [body.register_forward_hook(of_body, with_kwargs=True), head.register_forward_hook(of_head)]
    model.loss_function = loss_function
    labels = ids.clone()
    see(ids=ids, labels=labels)
    nothing = torch.empty(0)
    keep_nothing = saved_tensors_hooks(lambda _: nothing, lambda _: nothing)
    try:
        with on_trial(model, training=training), torch.random.fork_rng(devices=[]), keep_nothing:
            see(found=model(input_ids=ids, labels=labels).loss)
    except Exception as error:  # noqa: BLE001 - a model of any kind, which is then left alone
        return f"the model does not run with input_ids and labels alone: {error}"
    finally:
        del model._loss_function
        for hook in hooks:
            hook.remove()
    return _apart(seen)


def _apart(seen: Mapping[str, tuple[torch.Tensor, Layout]]) -> str | None:
    """What one pass changed on the way, by all that was seen in it; None if nothing."""
    if not {"asked", "hidden", "given"} <= seen.keys():
        return "the model has a forward pass of its own"
    for one, other, why in (
        ("ids", "asked", "the model changes its input before its body"),
        ("body", "hidden", "the model changes its body's output before the head"),
        ("logits", "given", "the model changes its logits before the loss"),
        ("labels", "told", "the model changes its labels before the loss"),
        ("loss", "found", "the model adds to its loss"),
    ):
        if seen[one][1] != seen[other][1]:
            return why
    for one, other in (("body", "hidden"), ("logits", "given"), ("loss", "found")):
        if not _hands_back(seen[other][0], seen[one][0]):
            return "the model changes a gradient between its body and its loss"
    return None


def _hands_back(found: torch.Tensor, made: torch.Tensor) -> bool:
    """Whether a gradient of `found`, which is `made`, comes to it as it is. A hook on a node of autograd's
    before `made` is not seen: Python cannot list them."""
    if found._backward_hooks or made._backward_hooks or not (found.requires_grad and made.requires_grad):
        return False
    node: Node | None = get_gradient_edge(found).node
    end = get_gradient_edge(made).node
    while node is not None and node is not end:
        node = node.next_functions[0][0] if node.name() in VIEWS else None
    if node is not end:
        return False
    outer = torch.ones_like(found)
    (back,) = torch.autograd.grad(found, made, outer, retain_graph=True)
    return torch.equal(back, outer)


def _layout(tensor: torch.Tensor) -> Layout:
    """Two tensors that are held at once are one and the same where this is."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor._version
