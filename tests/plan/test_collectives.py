"""What ranks say to each other: against a ring's bytes, NCCL's own measure, and each strategy's."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.config.presets import PRESETS
from launcher.plan.collectives import DDP_BUCKET, LINK_SHARE, Pass, Wires, all_reduce, exposed, gather
from launcher.plan.shape import Shape, parameters, shape_of
from launcher.plan.states import Sharding

WIRES = Wires(8, 450e9, 50e9)
NO_TIME = Pass(0.0, 0.0)
PLENTY = Pass(1e3, 2e3)


def shape() -> Shape:
    found = shape_of(PRESETS["gpt2-xl"].config())
    assert found is not None
    return found


def spent(
    strategy: str,
    one: Pass,
    *,
    world_size: int = 8,
    accumulation: int = 1,
    precision: str = "bf16",
    checkpointing: bool = False,
) -> float:
    found = exposed(
        shape(),
        Sharding(strategy, world_size),
        WIRES,
        one,
        element=4 if precision == "fp32" else 2,
        precision=precision,
        accumulation=accumulation,
        again=1.0 if checkpointing else 0.0,
    )
    assert found is not None
    return found


def test_an_all_reduce_takes_what_a_ring_takes() -> None:
    wires = Wires(8, 300e9, None)
    # NCCL's own measure is the bus bandwidth, size x 2 (n - 1) / n over the time: 8 A100 reach about 230 GB/s
    # with large sizes (NVIDIA/nccl-tests), and less with one bucket at a time.
    seconds = all_reduce(2**30, 8, wires, DDP_BUCKET)
    assert seconds is not None
    assert 150e9 < 2**30 * 2 * 7 / 8 / seconds < 235e9
    assert all_reduce(2**30, 1, wires, DDP_BUCKET) == 0
    assert all_reduce(2**30, 16, wires, DDP_BUCKET) is None, "the network is not known"
    assert all_reduce(2**30, 16, replace(wires, network=25e9), DDP_BUCKET) == pytest.approx(
        2**30 * 2 * 15 / 16 / (0.8 * 200e9), rel=0.4
    )


@given(size=st.integers(1, 10**10), nodes=st.integers(1, 512), ranks=st.integers(1, 8))
def test_an_all_reduce_is_slower_over_more_ranks_and_a_slower_network(
    size: int, nodes: int, ranks: int
) -> None:
    def over(nodes: int, network: float) -> float:
        found = all_reduce(size, nodes * ranks, Wires(ranks, 450e9, network), DDP_BUCKET)
        assert found is not None
        return found

    assert over(nodes, 50e9) <= over(nodes + 1, 50e9)
    assert over(nodes, 50e9) <= over(nodes, 12.5e9)


def test_a_gather_takes_half_of_what_an_all_reduce_takes() -> None:
    wires = Wires(8, 300e9, None)
    whole, half = (found(2**34, 8, wires, 2**34) for found in (all_reduce, gather))
    assert whole is not None
    assert half == pytest.approx(whole / 2, rel=1e-3)
    assert gather(1, 1, wires, 1) == 0
    assert gather(1, 16, wires, 1) is None, "the network is not known"


@pytest.mark.parametrize(
    ("strategy", "precision", "accumulation", "checkpointing", "times"),
    [
        # Bytes over a ring for each parameter, by the source that `plan/collectives.py` names.
        ("ddp", "bf16", 4, False, 2 * 4),  # one all-reduce a step, in fp32
        ("zero1", "bf16", 4, False, 2 * 2 + 2),  # one all-reduce a step in bf16, and the new weights gathered
        ("zero2", "bf16", 4, False, 4 * 2 * 2 + 2),  # an all-reduce for each micro-batch
        ("zero3", "bf16", 4, False, 4 * (2 + 2 + 2)),  # gathered forward and backward, gradients scattered
        ("zero3", "bf16", 4, True, 4 * (2 + 2 + 2 + 2)),  # and gathered to compute a layer again
        ("fsdp", "bf16", 4, True, 4 * (2 + 2 + 4)),
        ("zero2", "fp32", 1, False, 2 * 4 + 4),
    ],
)
def test_each_strategy_sends_its_bytes(
    strategy: str, precision: str, accumulation: int, checkpointing: bool, times: int
) -> None:
    seconds = spent(
        strategy, NO_TIME, accumulation=accumulation, precision=precision, checkpointing=checkpointing
    )
    sent = times * parameters(shape()) * 7 / 8 / (LINK_SHARE * WIRES.link)
    # Latencies come on top: DDP's are 238 buckets'.
    assert sent < seconds < 1.5 * sent


def test_what_is_sent_while_layers_compute_is_hidden() -> None:
    for strategy in ("ddp", "zero2", "zero3", "fsdp"):
        assert spent(strategy, PLENTY) < 0.6 * spent(strategy, NO_TIME)
    # DeepSpeed's BF16_Optimizer sends when backward is over.
    assert spent("zero1", PLENTY) == spent("zero1", NO_TIME)
    assert spent("zero1", PLENTY, precision="fp16") < spent("zero1", NO_TIME, precision="fp16")


@given(
    strategy=st.sampled_from(("ddp", "zero1", "zero2", "zero3", "fsdp")),
    nodes=st.sampled_from((1, 2, 8, 64)),
    accumulation=st.integers(1, 4),
)
def test_more_nodes_and_more_micro_batches_never_talk_less(
    strategy: str, nodes: int, accumulation: int
) -> None:
    def over(nodes: int, accumulation: int) -> float:
        return spent(strategy, NO_TIME, world_size=8 * nodes, accumulation=accumulation)

    assert 0 < over(nodes, accumulation) <= over(2 * nodes, accumulation)
    assert over(nodes, accumulation) <= over(nodes, accumulation + 1)


def test_one_rank_has_nobody_to_talk_to() -> None:
    alone = replace(WIRES, ranks_per_node=1, network=None)
    for strategy in ("ddp", "zero1", "zero2", "zero3", "fsdp"):
        found = exposed(
            shape(),
            Sharding(strategy, 1),
            alone,
            NO_TIME,
            element=2,
            precision="bf16",
            accumulation=2,
            again=0.0,
        )
        assert found == 0
