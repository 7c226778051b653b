"""A real SLURM cluster for the tests in this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.slurm_cluster import Cluster, cluster, why_not
from scripts.slurm_drill import Place
from tests.conftest import lacks


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """Three idle nodes, for as long as the tests of this process run."""
    if (why := why_not()) is not None:
        lacks(why)
    with cluster() as made:
        yield made


@pytest.fixture
def place(slurm: Cluster, tmp_path: Path) -> Iterator[Place]:
    """A folder to submit from; every job of the test is gone afterwards."""
    (tmp_path / "corpus.txt").write_text("to be or not to be\nthat is the question\n" * 200, encoding="utf-8")
    yield Place(slurm, tmp_path, ["corpus.txt"])
    slurm.clear()
