"""What tests of a written run share."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.plan.orders import Orders, format_orders
from launcher.run.directory import RunDirectory, write_text
from tests.conftest import small_plan


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    """A run of two ranks and 20 steps, as it is written."""
    found = RunDirectory(tmp_path / "run")
    orders = Orders("0", "", small_plan(), model={}, weights=None, store=None, vocabulary=None)
    write_text(found.orders, format_orders(orders))
    return found
