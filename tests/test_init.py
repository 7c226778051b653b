"""`launcher init --from`: old files in, a starter file out, and everything else said."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.config.load import load_cluster, load_run
from tests.config import old_files
from tests.conftest import Workplace


@pytest.fixture
def here(tmp_path: Path) -> Workplace:
    (tmp_path / "zero2.json").write_text(old_files.ZERO2_WITH_OFFLOAD)
    (tmp_path / "accelerate.yaml").write_text(old_files.DEEPSPEED_WITH_A_JSON)
    (tmp_path / "fsdp.yaml").write_text(old_files.FSDP2_ON_FOUR_NODES)
    return Workplace(tmp_path)


def test_a_run_file_and_a_cluster_file_from_both(here: Workplace) -> None:
    old = ("--from", "zero2.json", "--from", "accelerate.yaml")
    done = here.run("init", "run.yaml", "--preset", "gpt2-medium", *old)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "wrote run.yaml" in done.stderr
    assert (
        "not taken over: zero_optimization.allgather_bucket_size (zero2.json:23), "
        "zero_optimization.reduce_bucket_size (zero2.json:26)\n  launcher chooses bucket sizes" in done.stderr
    )
    assert "taken over, but: optimizer.params.weight_decay (zero2.json:10)" in done.stderr
    assert "cluster.nodes from accelerate.yaml:19 num_machines" in done.stderr
    loaded = load_run(here.folder / "run.yaml").config
    assert (loaded.model.name, loaded.train.strategy, loaded.train.batch_size) == (
        "gpt2-medium",
        "zero2",
        256,
    )
    assert (loaded.train.steps, loaded.train.tokens) == (5000, None)

    done = here.run("init", "cluster.yaml", "--cluster", *old)
    assert done.returncode == 0, done.stderr
    assert "train.strategy from zero2.json:20 zero_optimization.stage" in done.stderr
    cluster = load_cluster(here.folder / "cluster.yaml").config
    assert (cluster.nodes, cluster.gpus_per_node) == (2, 8)


def test_what_is_written_plans(here: Workplace) -> None:
    old = ("--from", "zero2.json", "--from", "accelerate.yaml")
    assert here.run("init", "run.yaml", *old).returncode == 0
    assert here.run("init", "cluster.yaml", "--cluster", *old).returncode == 0
    cluster = here.folder / "cluster.yaml"
    cluster.write_text(cluster.read_text().replace("gpu: auto", "gpu: h100-sxm-80gb"))
    done = here.run("plan", "run.yaml", "--cluster", "cluster.yaml")
    assert done.returncode == 0, done.stderr
    assert "micro-batch 4 x accumulation 4 x 16 ranks" in done.stdout


def test_conflicts_stop_it_and_nothing_is_written(here: Workplace) -> None:
    before = here.files()
    done = here.run("init", "run.yaml", "--from", "zero2.json", "--from", "fsdp.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: distributed_type: train.strategy would be fsdp, and zero2 by zero2.json:20" in done.stderr
    assert "error: fsdp_config.fsdp_offload_params: train.offload would be parameters" in done.stderr
    assert "error: train_batch_size: 256 is not 4 (zero2.json:3" in done.stderr
    assert "(zero2.json:2)" in done.stderr
    assert here.files() == before


def test_a_value_that_no_run_file_takes_is_told_where_it_stands(here: Workplace) -> None:
    (here.folder / "bad.json").write_text('{\n "optimizer": {"params": {"lr": 0}}\n}\n')
    done = here.run("init", "run.yaml", "--from", "bad.json")
    assert done.returncode == 2
    assert "optimizer.params.lr: as train.learning_rate: " in done.stderr
    assert "(bad.json:2)" in done.stderr
    assert not (here.folder / "run.yaml").exists()


def test_a_run_file_of_launchers_is_no_old_file(here: Workplace) -> None:
    assert here.run("init", "run.yaml").returncode == 0
    done = here.run("init", "other.yaml", "--from", "run.yaml")
    assert (done.returncode, "run.yaml: this is a run file of launcher's already" in done.stderr) == (2, True)
    assert not (here.folder / "other.yaml").exists()


def test_what_is_not_there_or_says_nothing(here: Workplace) -> None:
    done = here.run("init", "run.yaml", "--from", "gone.json", "--from", "none.yaml")
    assert done.returncode == 2
    assert "gone.json: no such file" in done.stderr
    assert "none.yaml: no such file" in done.stderr
    done = here.run("init", "cluster.yaml", "--cluster", "--from", "zero2.json")
    assert done.returncode == 2
    assert "zero2.json says nothing of a cluster" in done.stderr
    assert not (here.folder / "cluster.yaml").exists()
