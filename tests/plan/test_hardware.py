"""The catalogue: looked up by name, recognised by what NVML says, and sound in itself."""

from __future__ import annotations

import pytest

from launcher.config.gpus import GPUS
from launcher.plan.hardware import CATALOGUE, GPU, find_gpu, from_figures, from_nvml

MIB = 2**20

each_gpu = pytest.mark.parametrize(
    "gpu", [gpu for gpu in CATALOGUE.values() if gpu.name != "cpu"], ids=lambda gpu: gpu.name
)


@each_gpu
def test_an_entry_agrees_with_its_own_name(gpu: GPU) -> None:
    assert gpu.memory == int(gpu.name.rpartition("-")[2].removesuffix("gb")) * 10**9


@each_gpu
def test_figures_are_of_dense_arithmetic_in_base_units(gpu: GPU) -> None:
    rates = gpu.rates
    assert gpu.bandwidth is not None
    assert rates.fp16 is not None
    assert rates.fp32 is not None
    assert gpu.link is not None
    assert 1e11 < gpu.bandwidth < 1e13
    assert 0.01 < gpu.link / gpu.bandwidth < 0.25
    assert 1e12 < rates.fp32 < rates.fp16 < 5e15
    # Tensor cores multiply fp16 and bf16 at one rate and TF32 at half of it: a sparse figure would not fit.
    if rates.tf32 is not None:
        assert rates.bf16 == rates.fp16
        assert rates.fp16 / rates.tf32 == pytest.approx(2, rel=0.03)
    assert (rates.bf16 is not None) == gpu.supports_bf16


@pytest.mark.parametrize(
    ("nvml_name", "mebibytes", "expected"),
    [
        ("Tesla T4", 15360, "t4-16gb"),
        ("Tesla V100-SXM2-16GB", 16160, "v100-sxm-16gb"),
        ("Tesla V100-SXM2-32GB", 32510, "v100-sxm-32gb"),
        ("NVIDIA A10", 23028, "a10-24gb"),
        ("NVIDIA L4", 23034, "l4-24gb"),
        ("NVIDIA L40S", 46068, "l40s-48gb"),
        ("NVIDIA A100-SXM4-40GB", 40960, "a100-sxm-40gb"),
        ("A100-SXM4-40GB", 40536, "a100-sxm-40gb"),
        ("NVIDIA A100-SXM4-80GB", 81920, "a100-sxm-80gb"),
        ("NVIDIA A100-PCIE-40GB", 40960, "a100-pcie-40gb"),
        ("NVIDIA A100 80GB PCIe", 81920, "a100-pcie-80gb"),
        ("NVIDIA H100 80GB HBM3", 81559, "h100-sxm-80gb"),
        ("NVIDIA H100 PCIe", 81559, "h100-pcie-80gb"),
        ("NVIDIA H200", 143771, "h200-sxm-141gb"),
        ("NVIDIA GH200 480GB", 97871, "gh200-96gb"),
        ("NVIDIA B200", 183359, "b200-sxm-180gb"),
        ("NVIDIA GeForce RTX 3090", 24576, "rtx-3090-24gb"),
        ("NVIDIA GeForce RTX 4090", 24564, "rtx-4090-24gb"),
        ("NVIDIA GeForce RTX 5090", 32607, "rtx-5090-32gb"),
    ],
)
def test_what_nvidia_smi_prints_is_recognised(nvml_name: str, mebibytes: int, expected: str) -> None:
    found = from_nvml(nvml_name, mebibytes * MIB)
    assert found is not None
    assert found.name == expected


@pytest.mark.parametrize(
    ("nvml_name", "mebibytes"),
    [
        ("NVIDIA A10G", 23028),
        ("NVIDIA L40", 46068),
        ("NVIDIA H100 NVL", 95830),
        ("NVIDIA GeForce RTX 4090 D", 24564),
        ("NVIDIA GeForce RTX 3090 Ti", 24564),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 20096),
        ("NVIDIA H200", 71000),
        ("", 0),
    ],
)
def test_a_relative_is_not_taken_for_the_real_one(nvml_name: str, mebibytes: int) -> None:
    assert from_nvml(nvml_name, mebibytes * MIB) is None


def test_the_names_a_cluster_file_may_give_are_the_catalogue_s() -> None:
    assert tuple(CATALOGUE) == GPUS


def test_precision_that_the_hardware_has() -> None:
    cpu, t4, a100 = find_gpu("cpu"), find_gpu("t4-16gb"), find_gpu("a100-sxm-80gb")
    assert cpu.supports_bf16
    assert not t4.supports_bf16
    assert a100.supports_bf16


def test_peak_flops_by_precision() -> None:
    a100 = find_gpu("a100-sxm-80gb")
    assert [a100.peak_flops(precision) for precision in ("bf16", "fp16", "fp32")] == [312e12, 312e12, 19.5e12]
    assert find_gpu("t4-16gb").peak_flops("bf16") is None
    assert find_gpu("cpu").peak_flops("fp32") is None
    with pytest.raises(ValueError, match="fp8"):
        a100.peak_flops("fp8")


def test_a_gpu_that_the_catalogue_lacks_is_described_by_its_figures() -> None:
    known = find_gpu("a100-sxm-80gb")
    mine = from_figures("mine", memory_gb=80, bf16_tflops=312, bandwidth_gbs=2039, link_gbs=300)
    for figure in ("memory", "bandwidth", "link", "supports_bf16"):
        assert getattr(mine, figure) == getattr(known, figure)
    assert mine.peak_flops("bf16") == mine.peak_flops("fp16") == known.peak_flops("bf16")
    bare = from_figures("mine", memory_gb=24.5)
    assert bare.memory == 24_500_000_000
    assert (bare.bandwidth, bare.link, bare.peak_flops("bf16")) == (None, None, None)
