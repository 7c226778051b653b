"""What a model really does in a pass: the masks it makes, its waits for the GPU, the graphs it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

WAITS: Final = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
"""PyTorch's marks of operators whose result the host must have before it goes on: a number, or a shape."""
MASKS: Final = (torch.bool, torch.uint8)
FETCHES: Final = frozenset(
    {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__, torch.Tensor.__repr__}
)
"""What takes a tensor's numbers to the host, besides `item` and its like, which PyTorch marks."""
MOVES: Final = frozenset({torch.Tensor.to, torch.Tensor.type})
HOST: Final = type(torch.FloatTensor)
"""Of the names by which `type` is told of a CPU's tensors."""
SOFTMAX: Final = frozenset({functional.softmax, torch.softmax, torch.Tensor.softmax})
OF_DDP: Final = ("_rebuild_buckets", "_inside_ddp_forward", "set_runtime_stats_and_log")
"""What a cut names where it is in DDP's own forward pass."""


@dataclass(frozen=True, slots=True)
class TracedPass:
    """Of one forward and backward pass: fused attentions, how many with a mask, those computed by hand, and
    waits for the GPU."""

    attentions: int
    masked: int
    by_hand: int
    waits: int


class _Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self.fetched: dict[int, torch.Tensor] = {}  # by where they lie; kept, so that no other comes there

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fetched = function is torch.ops.aten._local_scalar_dense.default and _place(args[0]) in self.fetched
        self.count += _waits(function, args) and not fetched
        return function(*args, **(kwargs or {}))

    def fetch(self, tensor: torch.Tensor) -> None:
        """The host gets all numbers of `tensor`. On a CPU, where they are already, nothing is dispatched."""
        self.count += _place(tensor) not in self.fetched
        self.fetched[_place(tensor)] = tensor


class _Calls(TorchFunctionMode):
    def __init__(self, waits: _Waits, tokens: int) -> None:
        super().__init__()
        self.waits, self.tokens = waits, tokens
        self.masks: list[bool] = []
        self.by_hand = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is functional.scaled_dot_product_attention:
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            self.masks.append(mask is not None)
        elif _fetches(function, args, kwargs):
            self.waits.fetch(args[0])
        found = function(*args, **kwargs)
        if function in SOFTMAX and found.shape[-2:] == (self.tokens, self.tokens):
            self.by_hand += 1
        return found


def _waits(function: Any, args: Any) -> bool:
    if function is torch.ops.aten.index.Tensor:  # marked for its masks; numbers tell the shape themselves
        return any(index is not None and index.dtype in MASKS for index in args[1])
    return not WAITS.isdisjoint(function.tags)


def _fetches(function: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """A device that is not named may be another tensor's, which on a CPU is the same one."""
    if function not in MOVES:
        return function in FETCHES
    named = (*args[1:2], kwargs.get("device"), kwargs.get("dtype"))
    host = any((isinstance(to, str) and to == "cpu") or isinstance(to, HOST) for to in named)
    return host and not kwargs.get("non_blocking")


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def watch(model: torch.nn.Module, inputs: Mapping[str, Any]) -> TracedPass:
    """One pass of the model as it is, on `inputs` with labels, watched. Its gradients are let go."""
    with _Waits() as waits, _Calls(waits, inputs["input_ids"].shape[-1]) as calls:
        loss = model(**inputs).loss
        # `loss.backward()` is a call that _Calls would be told of, and no longer of those within: the hooks'.
        torch.autograd.Variable._execution_engine.run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
    model.zero_grad()
    return TracedPass(len(calls.masks), sum(calls.masks), calls.by_hand, waits.count)


def compiled_so_far(what: str) -> str:
    """How many graphs torch.compile has made of `what`, in words: why so many, and whether from its cache.

    DDP's own forward pass, which it cuts before it comes to the model in there, has none. The model's graph
    it divides where a bucket of gradients is full, so that they are on their way while others are computed.
    """
    counters: Mapping[str, Mapping[str, int]] = torch._dynamo.utils.counters
    made, traced = counters["aot_autograd"], counters["stats"]["unique_graphs"]
    graphs = "one graph" if traced == 1 else f"{traced} graphs"
    cuts = [why for why in counters["graph_break"] if not any(name in why for name in OF_DDP)]
    why = ""
    if traced > 1 and cuts:
        others = f", and {len(cuts) - 1} more" if len(cuts) > 1 else ""
        why = f", cut for: {cuts[0].splitlines()[0]}{others}"
    elif made["total"] > traced:
        why = f", in {made['total']} pieces for DDP's buckets"
    cached = made["total"] == made["autograd_cache_hit"] > 0
    return f"{what} became {graphs}{why}{', from the cache' if cached else ''}"


@dataclass(frozen=True, slots=True)
class Graphs:
    """What torch.compile makes of a model: how many graphs, why they break, and attentions with a mask."""

    count: int
    breaks: list[str]
    masked: int


def compiled(model: torch.nn.Module, inputs: Mapping[str, Any]) -> Graphs:
    """The graphs of one training pass, traced and run without compiling them further."""
    torch._dynamo.reset()
    found = torch._dynamo.explain(model)(**inputs)
    torch._dynamo.reset()
    nodes = [node for graph in found.graphs for node in graph.graph.nodes]
    attentions = [node for node in nodes if node.target is functional.scaled_dot_product_attention]
    masked = sum(
        (node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")) is not None
        for node in attentions
    )
    breaks = [reason.reason.splitlines()[0] for reason in found.break_reasons]
    return Graphs(found.graph_count, breaks, masked)
