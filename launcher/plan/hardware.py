"""The GPU catalogue: what each kind can hold and do, as its maker publishes it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

GIGA: Final = 10**9
TERA: Final = 1e12

MEMORY_TOLERANCE: Final = 0.1
"""How far a driver's count of memory lies from the datasheet's: 6.9 % above (B200) to 1.4 % below (A10)."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Peak FLOP/s of dense matrix multiplication by number format, accumulated in fp32, without sparsity.

    None: the hardware does not multiply this format.
    """

    bf16: float | None
    fp16: float | None
    tf32: float | None
    fp32: float | None


@dataclass(frozen=True, slots=True)
class GPU:
    """One kind of GPU, or `cpu`.

    `memory` is in bytes, `bandwidth` (of that memory) and `link` in bytes/s, all with the datasheet's
    GB = 10^9 bytes; `link` is what one GPU sends to others of its node while it receives as much: NVLink
    where all GPUs of a node have it, else PCI Express. `capability` is the CUDA compute capability. All
    four are None for `cpu`, whose figures belong to the machine. `pattern` matches the whole of the name
    that NVML gives it.
    """

    name: str
    memory: int | None
    bandwidth: float | None
    link: float | None
    rates: Rates
    capability: tuple[int, int] | None
    pattern: str | None
    source: str

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"

    @property
    def supports_bf16(self) -> bool:
        """Ampere (8.0) brought bf16 to the tensor cores; on a CPU PyTorch computes it."""
        return self.capability is None or self.capability >= (8, 0)

    def peak_flops(self, precision: str) -> float | None:
        """Peak FLOP/s under `precision`: bf16, fp16 or fp32; None where it is not known.

        fp32 is IEEE fp32, PyTorch's default for matrix multiplication, rather than TF32.
        Raises ValueError for any other precision.
        """
        peaks = {"bf16": self.rates.bf16, "fp16": self.rates.fp16, "fp32": self.rates.fp32}
        if precision not in peaks:
            raise ValueError(f"unknown precision {precision!r}: expected one of {', '.join(peaks)}")
        return peaks[precision]


_NONE: Final = Rates(bf16=None, fp16=None, tf32=None, fp32=None)
_T4: Final = Rates(bf16=None, fp16=65 * TERA, tf32=None, fp32=8.1 * TERA)
_V100: Final = Rates(bf16=None, fp16=125 * TERA, tf32=None, fp32=15.7 * TERA)
_A10: Final = Rates(bf16=125 * TERA, fp16=125 * TERA, tf32=62.5 * TERA, fp32=31.2 * TERA)
_L4: Final = Rates(bf16=121 * TERA, fp16=121 * TERA, tf32=60 * TERA, fp32=30.3 * TERA)
_L40S: Final = Rates(bf16=362 * TERA, fp16=362 * TERA, tf32=183 * TERA, fp32=91.6 * TERA)
_A100: Final = Rates(bf16=312 * TERA, fp16=312 * TERA, tf32=156 * TERA, fp32=19.5 * TERA)
_H100_SXM: Final = Rates(bf16=989.4 * TERA, fp16=989.4 * TERA, tf32=494.7 * TERA, fp32=66.9 * TERA)
_H100_PCIE: Final = Rates(bf16=756 * TERA, fp16=756 * TERA, tf32=378 * TERA, fp32=51 * TERA)
_B200: Final = Rates(bf16=2250 * TERA, fp16=2250 * TERA, tf32=1100 * TERA, fp32=80 * TERA)
_RTX_3090: Final = Rates(bf16=71 * TERA, fp16=71 * TERA, tf32=35.6 * TERA, fp32=35.6 * TERA)
_RTX_4090: Final = Rates(bf16=165.2 * TERA, fp16=165.2 * TERA, tf32=82.6 * TERA, fp32=82.6 * TERA)
_RTX_5090: Final = Rates(bf16=209.5 * TERA, fp16=209.5 * TERA, tf32=104.8 * TERA, fp32=104.8 * TERA)


def _gpu(
    name: str,
    gigabytes: int,
    gigabytes_per_second: int,
    link: int,
    rates: Rates,
    capability: tuple[int, int],
    pattern: str,
    source: str,
) -> GPU:
    return GPU(
        name,
        gigabytes * GIGA,
        float(gigabytes_per_second * GIGA),
        float(link * GIGA),
        rates,
        capability,
        pattern,
        source,
    )


_PCIE_3, _PCIE_4, _PCIE_5 = 16, 32, 64
"""GB/s each way over 16 lanes (PCI-SIG, rounded as NVIDIA's datasheets do)."""


_A100_SHEET: Final = "NVIDIA A100 Tensor Core GPU datasheet"
_HOPPER_PAPER: Final = "NVIDIA H100 Tensor Core GPU Architecture (white paper) and H100 datasheet"

CATALOGUE: Final[Mapping[str, GPU]] = {
    gpu.name: gpu
    for gpu in (
        GPU("cpu", None, None, None, _NONE, None, None, "this machine"),
        _gpu("t4-16gb", 16, 320, _PCIE_3, _T4, (7, 5), "(Tesla )?T4", "NVIDIA T4 datasheet"),
        _gpu(
            "v100-sxm-16gb", 16, 900, 150, _V100, (7, 0), r"(Tesla )?V100-SXM\d-16GB", "NVIDIA V100 datasheet"
        ),
        _gpu(
            "v100-sxm-32gb", 32, 900, 150, _V100, (7, 0), r"(Tesla )?V100-SXM\d-32GB", "NVIDIA V100 datasheet"
        ),
        _gpu("a10-24gb", 24, 600, _PCIE_4, _A10, (8, 6), "A10", "NVIDIA A10 Tensor Core GPU datasheet"),
        _gpu("l4-24gb", 24, 300, _PCIE_4, _L4, (8, 9), "L4", "NVIDIA L4 Tensor Core GPU datasheet"),
        _gpu("l40s-48gb", 48, 864, _PCIE_4, _L40S, (8, 9), "L40S", "NVIDIA L40S datasheet"),
        _gpu("a100-sxm-40gb", 40, 1555, 300, _A100, (8, 0), r"A100-SXM\d-40GB", _A100_SHEET),
        _gpu("a100-sxm-80gb", 80, 2039, 300, _A100, (8, 0), r"A100-SXM\d-80GB", _A100_SHEET),
        _gpu("a100-pcie-40gb", 40, 1555, _PCIE_4, _A100, (8, 0), "A100-PCIE-40GB", _A100_SHEET),
        _gpu(
            "a100-pcie-80gb", 80, 1935, _PCIE_4, _A100, (8, 0), "A100 80GB PCIe|A100-PCIE-80GB", _A100_SHEET
        ),
        _gpu("h100-sxm-80gb", 80, 3350, 450, _H100_SXM, (9, 0), "H100 80GB HBM3", _HOPPER_PAPER),
        _gpu("h100-pcie-80gb", 80, 2000, _PCIE_5, _H100_PCIE, (9, 0), "H100 PCIe", _HOPPER_PAPER),
        _gpu(
            "h200-sxm-141gb",
            141,
            4800,
            450,
            _H100_SXM,
            (9, 0),
            "H200",
            "NVIDIA H200 Tensor Core GPU datasheet",
        ),
        _gpu(
            "gh200-96gb",
            96,
            4000,
            450,
            _H100_SXM,
            (9, 0),
            "GH200 (480|120)GB",
            "NVIDIA GH200 Superchip datasheet",
        ),
        _gpu(
            "b200-sxm-180gb",
            180,
            8000,
            900,
            _B200,
            (10, 0),
            "B200",
            "NVIDIA Blackwell Architecture Technical Brief (HGX B200) and DGX B200 datasheet",
        ),
        _gpu(
            "rtx-3090-24gb",
            24,
            936,
            _PCIE_4,
            _RTX_3090,
            (8, 6),
            "GeForce RTX 3090",
            "NVIDIA Ampere GA102 GPU Architecture (white paper)",
        ),
        _gpu(
            "rtx-4090-24gb",
            24,
            1008,
            _PCIE_4,
            _RTX_4090,
            (8, 9),
            "GeForce RTX 4090",
            "NVIDIA Ada GPU Architecture (white paper)",
        ),
        _gpu(
            "rtx-5090-32gb",
            32,
            1792,
            _PCIE_5,
            _RTX_5090,
            (12, 0),
            "GeForce RTX 5090",
            "NVIDIA RTX Blackwell GPU Architecture (white paper)",
        ),
    )
}


def find_gpu(name: str) -> GPU:
    """The catalogue's entry for a name that it has."""
    return CATALOGUE[name]


def from_figures(
    name: str,
    *,
    memory_gb: float,
    bf16_tflops: float | None = None,
    bandwidth_gbs: float | None = None,
    link_gbs: float | None = None,
) -> GPU:
    """A GPU that the catalogue lacks, by its maker's figures, all in the datasheet's units (10^9, 10^12).

    `link_gbs` is what one GPU sends to others of its node. Memory alone is enough to plan what fits; speed
    needs the others too. It is taken for Ampere, as every generation is that no measurement was fitted on.
    """
    peak = None if bf16_tflops is None else bf16_tflops * TERA
    return GPU(
        name,
        round(memory_gb * GIGA),
        None if bandwidth_gbs is None else bandwidth_gbs * GIGA,
        None if link_gbs is None else link_gbs * GIGA,
        Rates(bf16=peak, fp16=peak, tf32=None, fp32=None),
        (8, 0),
        None,
        "cluster.yaml",
    )


def from_nvml(name: str, memory: int) -> GPU | None:
    """The catalogue's entry for the GPU that NVML calls `name` and gives `memory` bytes, or None.

    The memory must agree too: the same name is given to slices and to special editions.
    """
    bare = name.removeprefix("NVIDIA ")
    for gpu in CATALOGUE.values():
        if gpu.pattern is None or gpu.memory is None:
            continue
        if re.fullmatch(gpu.pattern, bare) and abs(memory / gpu.memory - 1) < MEMORY_TOLERANCE:
            return gpu
    return None
