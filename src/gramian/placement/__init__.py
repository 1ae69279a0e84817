"""Ranks and shards: which rows of a tensor each rank holds, which rank works on it, and how all ranks agree.

A rank is one process of `torch.distributed`. Everything here also runs in a single process without a process group.
"""

from __future__ import annotations

from gramian.placement.owners import assign, gather, scatter_, share_out
from gramian.placement.ranks import (
    World,
    agreed,
    all_reduce_sum,
    any_rank,
    exchange,
    exchange_bytes,
    exchange_json,
    is_distributed,
    world,
)
from gramian.placement.shards import group_of, is_sharded, local, local_ranges, locals_of, whole, write_whole_
from gramian.placement.steps import in_step

__all__ = [
    "World",
    "agreed",
    "all_reduce_sum",
    "any_rank",
    "assign",
    "exchange",
    "exchange_bytes",
    "exchange_json",
    "gather",
    "group_of",
    "in_step",
    "is_distributed",
    "is_sharded",
    "local",
    "local_ranges",
    "locals_of",
    "scatter_",
    "share_out",
    "whole",
    "world",
    "write_whole_",
]
