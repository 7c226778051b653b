"""Which fast paths a run takes: what `train.fast` allows, less what its data, precision or engine rules out.

What only the model itself can tell is left to the worker, which says so where a path does not hold.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Final

from launcher.config.schema import RunConfig
from launcher.plan.hardware import GPU
from launcher.plan.shape import Shape

MULTIPLE: Final = 64
"""What the vocabulary is padded to a multiple of, so that rows of logits begin where tensor cores like it."""

CHUNK: Final = 1 << 28
CPU_CHUNK: Final = 1 << 24
"""Logits held at once by the chunked loss: in fp32 1 GiB on a GPU, whose kernels are full well below it, and
64 MiB on a CPU."""

FEWEST_ROWS: Final = 256
"""Tokens in a chunk however large the vocabulary is: each chunk adds to a gradient as large as the head."""

ALIGNED: Final = 8
"""A row of logits is a multiple of so many, or torch.compile pads its products in bf16, which copies."""

SETTING: Final = "train.fast"
HEAD_IN_SHARDS: Final = "the head's weight is whole only in the head's own forward pass"


@dataclass(frozen=True, slots=True)
class Fast:
    """The fast paths that are taken, and for each that is not, why (`reasons`: empty for one that is)."""

    tanh_gelu: bool = False
    causal_attention: bool = False
    chunked_loss: bool = False
    padded_vocabulary: bool = False
    fused_adamw: bool = False
    tf32: bool = False
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def taken(self) -> list[str]:
        return [name for name in NAMES if getattr(self, name)]

    @property
    def off(self) -> dict[str, str]:
        """The paths that are not taken, each with the reason."""
        return {name: why for name, why in self.reasons.items() if why}

    def without(self, name: str, why: str) -> Fast:
        """The same but for `name`; a path that is off already keeps its own reason."""
        if not getattr(self, name):
            return self
        return replace(self, **{name: False}, reasons={**self.reasons, name: why})

    def _with(self, name: str) -> Fast:
        return replace(self, **{name: True}, reasons={**self.reasons, name: ""})

    def under(self, strategy: str) -> Fast:
        """The paths that hold where the model's state is shared as `strategy` says."""
        if strategy in ("zero3", "fsdp"):
            return self.without("chunked_loss", HEAD_IN_SHARDS)
        return self._with("chunked_loss") if self.reasons.get("chunked_loss") == HEAD_IN_SHARDS else self


NOTHING_FAST: Final = Fast()
NAMES: Final = tuple(each.name for each in fields(Fast) if each.name != "reasons")


def every_path() -> Fast:
    """What a run takes that rules nothing out."""
    return Fast(True, True, True, True, True, True)


def fast_paths(
    run: RunConfig,
    *,
    attention: str | None,
    vocabulary: int | None,
    precision: str,
    gpu: GPU,
    padded_before: bool | None,
) -> Fast:
    """What `run` takes under any strategy: see `Fast.under`.

    `attention` is what the model's config asks for, None where it does not; `vocabulary` its size where
    known. `padded_before`: whether the checkpoint that the run goes on from has a padded vocabulary, None
    where there is none.
    """
    asked = run.train.fast.model_dump()
    found = Fast(**asked, reasons={name: "" if on else SETTING for name, on in asked.items()})
    if attention not in (None, "sdpa"):
        found = found.without("causal_attention", f"the model's attention is {attention}")
    if run.data.packing != "concat" or run.data.isolate_documents:
        found = found.without("causal_attention", "padded or isolated documents need a mask")
    if precision == "fp16":
        found = found.without("chunked_loss", "fp16 gradients are scaled before they are made")
    if gpu.is_cpu:
        found = found.without("padded_vocabulary", "a CPU gains nothing")
        found = found.without("tf32", "a CPU has none")
    elif not gpu.supports_bf16:  # both came with the same generation
        found = found.without("tf32", f"{gpu.name} has none")
    elif precision == "fp32":
        found = found.without("tf32", "train.precision is fp32")
    if vocabulary is not None and vocabulary % MULTIPLE == 0:
        found = found.without("padded_vocabulary", f"{vocabulary:,} is a multiple of {MULTIPLE}")
    if run.train.extra.get("label_smoothing_factor"):
        found = found.without("chunked_loss", "train.extra.label_smoothing_factor")
    if "optim" in run.train.extra:
        found = found.without("fused_adamw", "train.extra.optim")
    return _as_before(found, padded_before)


def _as_before(found: Fast, padded: bool | None) -> Fast:
    """A checkpoint holds the padded table and its moments, so a run goes on as it began, wherever it does."""
    if padded is None or padded == found.padded_vocabulary:
        return found
    if not padded:
        return found.without("padded_vocabulary", "the run began without")
    return found._with("padded_vocabulary")


def trained_shape(shape: Shape, fast: Fast) -> Shape:
    """The shape of what is really held and multiplied: with the padding, where there is any."""
    return replace(shape, vocab=padded(shape.vocab)) if fast.padded_vocabulary else shape


def padded(vocabulary: int) -> int:
    """The next multiple of MULTIPLE."""
    return -(-vocabulary // MULTIPLE) * MULTIPLE


def one_kernel(vocabulary: int) -> bool:
    """Whether a compiled model's chunked loss in bf16 is one kernel of launcher's on a GPU.

    Where products copy, it was seen to hold all chunks at once, and is left out.
    """
    return vocabulary % ALIGNED == 0


def chunk_rows(vocabulary: int, *, on_cpu: bool) -> int:
    """Tokens whose logits the chunked loss holds at once: a power of two."""
    most = max(FEWEST_ROWS, (CPU_CHUNK if on_cpu else CHUNK) // vocabulary)
    return 1 << (most.bit_length() - 1)
