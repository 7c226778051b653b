"""The names of the GPU catalogue, which a cluster file may give; `plan.hardware` has what each can do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from launcher.config.keys import did_you_mean, nearest
from launcher.errors import Fault

GPUS = (
    *("cpu", "t4-16gb", "v100-sxm-16gb", "v100-sxm-32gb", "a10-24gb", "l4-24gb", "l40s-48gb"),
    *("a100-sxm-40gb", "a100-sxm-80gb", "a100-pcie-40gb", "a100-pcie-80gb", "h100-sxm-80gb"),
    *("h100-pcie-80gb", "h200-sxm-141gb", "gh200-96gb", "b200-sxm-180gb"),
    *("rtx-3090-24gb", "rtx-4090-24gb", "rtx-5090-32gb"),
)


def gpu_is_known(gpu: str | Mapping[str, Any]) -> Iterator[Fault]:
    """A name that the catalogue lacks, and a description of one that it has."""
    if not isinstance(gpu, str):
        if (name := gpu["name"]) in GPUS:
            yield Fault(
                "gpu.name",
                f"{name!r} is in the catalogue, with its figures",
                hint=f"write gpu: {name}, or describe yours under another name",
            )
    elif gpu not in ("auto", *GPUS):
        close = nearest(gpu, GPUS) or [known for known in GPUS if known.startswith(f"{gpu.lower()}-")]
        known = did_you_mean(close) if close else f"the catalogue has {', '.join(GPUS)};"
        yield Fault(
            "gpu",
            f"{gpu!r} is not in the catalogue",
            hint=f"{known} or describe it by its memory and its peak, as "
            f"gpu: {{name: {gpu}, memory_gb: ..., bf16_tflops: ...}}",
        )
