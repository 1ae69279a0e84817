"""Holding: what a pass through a model in shards has in memory and on the disk at once, told before it starts."""

from __future__ import annotations

import math
import os
import re
import resource
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gramian.compression.calibration.targets import Target
from gramian.compression.calibration.wide import working
from gramian.compression.sharded.shards import OUTSIDE, Shards
from gramian.errors import InputError
from gramian.recording.recorder import MAX_DIM
from gramian.rows import Rows

__all__ = ["Holding", "as_bytes", "holding", "shown"]

SLACK = 1.2
"""What the allocator holds beside what is asked of it; at widths of 4,096 a thirtieth more than with 1.1 was seen."""
LOADED = 200_000_000
"""Code and buffers of libraries that come into memory while they are first used."""
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


@dataclass(frozen=True)
class Holding:
    """What a part of the model takes, in bytes.

    Args:
        part: its name.
        weights: its tensors.
        moments: A and G of its layers.
        update: what adding rows to one of these takes.
        sample: for each sample of a batch, what a pass with its backward pass keeps.
        factoring: the most that decompositions have beside the weights: moments, work space and factors.
        hidden: for each sample, what waits on the disk at each block.
    """

    part: str
    weights: int
    moments: int
    update: int
    sample: int
    factoring: int
    hidden: int

    def at(self, samples: int) -> int:
        """The most that is held with batches of so many samples."""
        waiting = self.moments // 2  # rows, in float32, until they are as many as they are wide
        passing = self.moments + waiting + self.update + samples * self.sample
        reading = self.weights  # once more, as the file's
        return int(SLACK * (self.weights + max(reading, passing, self.factoring + samples * self.sample))) + LOADED


def holding(shards: Shards, found: Sequence[Target], graph: int, tokens: int, width: int) -> list[Holding]:
    """What each part takes.

    Args:
        shards: the model.
        found: the layers that are factored.
        graph: bytes that a pass through a block keeps for its backward pass, for a sample.
        tokens: of a sample.
        width: bytes of a sample's hidden states.
    """
    rows = []
    for part in (OUTSIDE, *shards.blocks):
        layers = [target for target in found if shards.part_of(target.name) == part]
        sides = [(target.dense // target.block.shape[-1], target.block.shape[-1]) for target in layers if target.block]
        moments = [_moment(m) + _moment(n) for m, n in sides]
        factors = [4 * (m + n) * min(m, n) for m, n in sides]
        work = [_work(m, n) for m, n in sides]
        most = max((sum(moments[i:]) + work[i] + sum(factors[:i]) for i in range(len(sides))), default=0)
        update = 2 * max((_moment(side) for pair in sides for side in pair), default=0)
        # Scores of a head in the dtype of the criterion, their logarithms, probabilities and gradients.
        scores = 6 * 4 * tokens * max((len(p) for p in shards.parameters(OUTSIDE) if p.ndim > 1), default=0)
        sample = (scores if part == OUTSIDE else graph) + 3 * width
        rows.append(Holding(part, shards.bytes(part), sum(moments), update, sample, most, width))
    return rows


def _moment(dim: int) -> int:
    return 8 * (dim * dim if dim <= MAX_DIM else dim)


def _work(m: int, n: int) -> int:
    """Of the decomposition of an (m, n) matrix: the roots of both sides, W, and what is made of them."""
    short, size = min(m, n), working(m, n).itemsize
    roots = sum(_moment(dim) * working(dim).itemsize // 8 for dim in (m, n, n))  # of the inputs, with their inverse
    of_roots = 6 * max(_moment(m), _moment(n))
    eigen = 5 * 8 * short * short
    weighted = (size + 8 * (size < 8)) * m * n + 8 * short * short  # and once more in float64
    of_matrix = size * m * n + max(2 * size * m * n, weighted, eigen, 2 * size * (m + n) * short)
    return roots + max(of_roots, of_matrix)


def resident() -> int:
    """Bytes of memory that this process has now."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the largest so far, where no other is known
        return most if sys.platform == "darwin" else 1024 * most


def as_bytes(memory: int | float | str) -> int:
    """A number of bytes, or text such as `"4GB"`.

    Args:
        memory: either.

    Raises:
        InputError: it is neither, or not positive.

    >>> as_bytes("1.5 GB"), as_bytes(10)
    (1500000000, 10)
    """
    found = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)(i?)b?\s*", str(memory), re.IGNORECASE)
    try:
        assert found is not None
        factor = UNITS[found[2].lower()]
        factor = 1024 ** round(math.log(factor, 1000)) if found[3] and factor > 1 else factor
        value = int(float(found[1]) * factor)
    except (AssertionError, ValueError):
        value = 0
    if value <= 0:
        raise InputError(f"compress: memory must be a number of bytes, or text as '4GB', got {memory!r}")
    return value


def shown(num: int | float) -> str:
    """Bytes in words."""
    return f"{num / 1e9:.2f} GB" if num >= 1e8 else f"{num / 1e6:.1f} MB"


def fitting(parts: Sequence[Holding], base: int, memory: int | None, samples: int) -> int:
    """How many samples of a batch go through the model at once.

    Args:
        parts: from `holding`.
        base: bytes that the process has beside.
        memory: that it may have; `None` for as much as it takes.
        samples: of the largest batch.

    Raises:
        InputError: not even one sample fits.
    """
    if memory is None:
        return samples
    least = base + max(part.at(1) for part in parts)
    if least > memory:
        worst = max(parts, key=lambda part: part.at(1))
        raise InputError(
            f"compress: memory={shown(memory)} is less than {shown(least)}, of which {shown(base)} are there already, "
            f"and {worst.part or 'what is outside of the blocks'} needs {shown(worst.at(1))}: its weights "
            f"{shown(worst.weights)}, second moments {shown(worst.moments)}, decompositions {shown(worst.factoring)}"
        )
    return max(num for num in range(1, samples + 1) if base + max(part.at(num) for part in parts) <= memory)


def check_disk(folder: Path, needed: int) -> None:
    """Raises `InputError` where a disk has less free space than a spool will take."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"compress: {folder} has {shown(free)} free, and what waits there takes {shown(needed)}. Give another "
            "folder as scratch, or fewer batches"
        )


def told(parts: Sequence[Holding], base: int, samples: int) -> Rows:
    """One row for each kind of part: what it holds."""
    kinds = {
        part.part if part.part == OUTSIDE else "a block": part for part in sorted(parts, key=lambda p: p.at(samples))
    }
    return Rows(
        {
            "part": name or "outside of the blocks",
            "weights": shown(part.weights),
            "second moments": shown(part.moments),
            "a batch": shown(samples * part.sample),
            "factoring": shown(part.factoring),
            "peak": shown(base + part.at(samples)),
        }
        for name, part in kinds.items()
    )
