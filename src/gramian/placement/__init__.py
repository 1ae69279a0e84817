"""Ranks and shards: who holds which rows of a tensor, who works on it, and how all ranks stay of one mind."""

from __future__ import annotations

from gramian.placement.owners import assign, gather, scatter_
from gramian.placement.ranks import (
    World,
    agreed,
    all_reduce_sum,
    any_rank,
    exchange,
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
    "gather",
    "group_of",
    "in_step",
    "is_distributed",
    "is_sharded",
    "local",
    "local_ranges",
    "locals_of",
    "scatter_",
    "whole",
    "world",
    "write_whole_",
]
