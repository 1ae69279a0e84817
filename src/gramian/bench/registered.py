"""A task of `gramian bench linalg` for every registered matrix function, against plain LAPACK in the same dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gramian import linalg, random
from gramian.bench.table import Measurement, Row
from gramian.bench.timing import computing
from gramian.linalg.engine.function import FUNCTIONS, MatrixFunction, Options, examples

SIZES = 8, 256
"""At the first nearly all is the calls around LAPACK's."""


def _task(label: str, function: MatrixFunction, options: Options, n: int) -> Callable[[int], Row]:
    def task(repeats: int) -> Row:
        spectrum = torch.logspace(0, -3, n, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        wide = random.with_spectrum(
            n, n, spectrum=spectrum, symmetric=function.symmetric, generator=generator, dtype=torch.float64
        )
        a = wide.float()
        certified = getattr(linalg, f"{function.name}_ex")
        if certified(a, **options(a))[0].isnan().any():  # no logarithm: eigenvalues are on the negative axis
            basis = random.with_spectrum(n, n, spectrum=spectrum**0.5, generator=generator, dtype=torch.float64)
            a = (basis @ torch.diag(spectrum) @ torch.linalg.inv(basis)).float()
        peer = "plain LAPACK"
        times = computing(
            {"gramian": lambda: certified(a, **options(a)), peer: lambda: function.plain(a, **options(a))},
            repeats=repeats,
        )
        exact = function.plain(a.double(), **options(a.double()))
        value, certificate = times["gramian"].result
        found = {"gramian": value, peer: times[peer].result}
        size = torch.linalg.norm(exact)
        errors = {name: float(torch.linalg.norm(x.double() - exact) / size) for name, x in found.items()}
        remark = f"{certificate.method_names[0]}; certified {float(certificate.error_bound):.1e}"
        remarks = {"gramian": remark, peer: ""}
        return Row(
            f"{label} {n}×{n}, κ 1e3",
            "‖X − f(A)‖ / ‖f(A)‖",
            tuple(Measurement(name, t.median, errors[name], remarks[name]) for name, t in times.items()),
        )

    return task


TASKS: dict[str, Callable[[int], Row]] = {
    f"{label}_{n}": _task(label, FUNCTIONS[name], options, n) for n in SIZES for label, name, options in examples()
}
"""Name of a task: its row, from a number of repeats."""
