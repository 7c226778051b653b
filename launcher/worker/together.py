"""What ranks tell one another outside training: all meet, all tell, or all hear what rank 0 says.

One process alone is asked the same, and then there is nobody to wait for.
"""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def world_size() -> int:
    """As many ranks as there really are, whatever was planned."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def of_all_ranks(mine: T) -> list[T]:
    """What every rank gives, by rank."""
    parts = [mine] * world_size()
    if len(parts) > 1:
        dist.all_gather_object(parts, mine)
    return parts


def as_rank_0_has_it(mine: T) -> T:
    """What rank 0 gives; what the others give is not looked at."""
    told = [mine]
    if world_size() > 1:
        dist.broadcast_object_list(told, src=0)
    return told[0]
