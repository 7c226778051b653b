"""What a plan needs of the machine that it is to run on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.errors import MachineError
from launcher.run.machine import Machine
from launcher.run.preflight import check_host_memory
from tests.conftest import small_plan

MACHINE = Machine("node", 8, 64 << 30, (), None)


def test_what_is_offloaded_must_have_room_on_this_machine() -> None:
    plan = replace(small_plan(), device="cuda", offload="optimizer", host_memory=64 << 30)
    check_host_memory(plan, MACHINE)
    more = replace(plan, host_memory=65 << 30)
    with pytest.raises(MachineError, match=r"takes about 65.0 GiB .* which is 64.0 GiB"):
        check_host_memory(more, MACHINE)
    check_host_memory(replace(more, nodes=2), MACHINE)  # this machine need not be one of them
