"""What is below the missed goals of `gramian bench linalg`: the products alone, at the rate of this machine's BLAS.

Each row times, in turns, a call, its peer, and the parts that its route cannot do without, on matrices of the same
shapes and with nothing around them: no projections, no tests of when to stop, no autograd, no copies. The sum of the
parts over the peer is a floor: no arrangement of the route reaches less. A goal below it is not reached by that route.

    OMP_NUM_THREADS=1 python benchmarks/linalg_floors.py     # about four minutes on one core

Writes `benchmarks/results/linalg_floors.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gramian import linalg, random
from gramian.bench import certificate_shares
from gramian.bench.machine import features
from gramian.bench.matrix_functions import MUON, muon_function
from gramian.bench.timing import computing
from gramian.linalg.engine import lapack, probes
from gramian.linalg.engine.krylov import forth_and_back
from gramian.linalg.engine.symmetric_products import halved

RESULTS = Path(__file__).parent / "results" / "linalg_floors.json"

Call = Callable[[], Any]


class Part(NamedTuple):
    """A product that a route needs so many times."""

    what: str
    times: int
    call: Call

    def all(self) -> None:
        """All of them in a row, so that what fits the cache is found there."""
        for _ in range(self.times):
            self.call()


class Task(NamedTuple):
    """A missed goal: the time of `ours` over that of `peer`; and the parts of each route to it."""

    name: str
    goal: float
    ours: Call
    peer: Call
    routes: dict[str, tuple[Part, ...]]


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norms() -> Iterator[Task]:
    """Block Lanczos: passes over A with 16 vectors, and one in float64 that measures what rounding did."""
    a, y, wide = (
        random.normal(2048, 2048, generator=torch.Generator().manual_seed(0)),
        _normal(16, 2048),
        _normal(17, 2048),
    )
    for digits, rtol in (("four", 1e-4), ("two", 1e-2)):
        steps = int(linalg.spectral_norm_ex(a, rtol=rtol)[1].steps)
        known = torch.linalg.qr(_normal(2048, 16 * steps)).Q.mT.contiguous()

        def projections(steps: int = steps, known: Tensor = known) -> None:
            for j in range(steps):
                rows = known[: 16 * (j + 1)]
                _ = (y @ rows.mT) @ rows

        lanczos = (
            Part("a pass over A with 16 vectors, forth and back", steps, lambda: forth_and_back(y[None], a[None])),
            Part("one in float64 with 17", 1, lambda: probes.twice(a[None], wide.double()[None])),
            Part("every block projected once against those before it", 1, projections),
        )
        yield Task(
            f"spectral_norm, n 2048, {digits} digits",
            0.08,
            lambda rtol=rtol: linalg.spectral_norm(a, rtol=rtol),
            lambda: torch.linalg.matrix_norm(a, 2),
            {"lanczos": lanczos},
        )


def lowrank() -> Iterator[Task]:
    """Two Krylov runs and a float64 pass; or a Gram matrix in 8 bits, and float64 products with twice the rank."""
    spectrum = torch.arange(1, 1025, dtype=torch.float64) ** -0.5
    a = random.with_spectrum(4096, 1024, spectrum=spectrum, generator=torch.Generator().manual_seed(0))
    y, wide, many = _normal(16, 1024), _normal(24, 1024), _normal(64, 1024)
    image, far = _normal(64, 4096), many.double()
    bytes_, part = torch.empty(4096, 1024, dtype=torch.int8), torch.empty(256, 1024)
    largest = float(a.abs().max())
    gram = (a.mT @ a).contiguous()
    definite = gram + torch.eye(1024)

    def to_bytes() -> None:
        for rows, out in zip(a.split(256), bytes_.split(256), strict=True):
            out.copy_(torch.mul(rows, 127 / largest, out=part).round_())

    def in_bytes() -> None:
        for start in range(0, 1024, 128):
            torch._int_mm(bytes_[:, start : start + 128].mT, bytes_[:, start:])

    def widened() -> None:
        for rows in a.split(256):
            _ = far @ rows.double().mT

    krylov = Part("a pass over A with 16 vectors, forth and back", 11, lambda: forth_and_back(y[None], a[None]))
    exact = Part("one in float64 with 24", 1, lambda: probes.twice(a[None], wide.double()[None]))
    by_gram = (
        Part("A to 8 bits", 1, to_bytes),
        Part("half of its Gram matrix", 1, in_bytes),
        Part("the Gram matrix times 64 vectors", 7, lambda: many @ gram),
        Part("their QR", 1, lambda: torch.linalg.qr(many.mT)),
        Part("a Cholesky factor of 1024², which bounds the rest", 1, lambda: lapack.cholesky(definite[None])),
        Part("A times 64 vectors in float64", 1, widened),
        Part("and back in float32", 1, lambda: image @ a),
    )

    def peer() -> Any:
        return torch.svd_lowrank(a, q=40, niter=4)

    routes = {"two Krylov runs": (krylov, exact), "a Gram matrix in 8 bits (not built)": by_gram}
    yield Task("rank 32 of 4096×1024, certified", 0.8, lambda: linalg.svd_lowrank(a, 32), peer, routes)
    yield Task(
        "the same, certify=False",
        0.8,
        lambda: linalg.svd_lowrank(a, 32, certify=False),
        peer,
        {"one Krylov run": (krylov._replace(times=7),)},
    )


def backward() -> Iterator[Task]:
    """Products of 512² in the eigenbasis: three for a root, of which symmetry saves a fourth, and five for polar."""
    a, b = _normal(512, 512), _normal(512, 512, seed=1)
    for name, (matrix, ours, torchs) in certificate_shares.pairs().items():
        count = 5 if name == "polar" else 3
        weights = _normal(512, 512, seed=2)
        yield Task(
            f"backward of {name}, n 512",
            0.6,
            certificate_shares.pullback(ours, matrix, weights),
            certificate_shares.pullback(torchs, matrix, weights),
            {"in the eigenbasis": (Part("a product of 512²", count, lambda: a @ b),)},
        )


def root() -> Iterator[Task]:
    """An eigendecomposition in float64, and half of a product."""
    m, _ = certificate_shares.matrices(1024, 1e6)
    x, out = _normal(1024, 1024), torch.empty(1024, 1024)
    wide = m.double()
    eigh = Part("`eigh` in float64", 1, lambda: torch.linalg.eigh(wide))
    product = Part("half of a float32 product", 1, lambda: halved(x, x.mT, out))
    yield Task(
        "inverse 4th root, n 1024, κ 1e6, to 1e-3",
        1.1,
        lambda: linalg.inv_root_ex(m, 4, rtol=1e-3),
        eigh.call,
        {"eigh64": (eigh, product)},
    )


def directions() -> Iterator[Task]:
    """Products of the batch in bfloat16: ours takes twelve; the least composition found takes eleven."""
    g = random.normal(64, 128, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    low = g.bfloat16()
    product = Part("a product of the batch in bfloat16", 12, lambda: torch.bmm(low, low))
    yield Task(
        "directions of 64 of 128², rms 0.1",
        0.17,
        lambda: linalg.polar_ex(g, rtol=0.1, certify=False)[0],
        lambda: torch.stack([muon_function(x, *MUON) for x in g]),
        {
            "its twelve products": (product,),
            "eleven, the least composition found": (product._replace(times=11),),
            "eight, by degree no polynomial needs less": (product._replace(times=8),),
        },
    )


def shares(n: int) -> Iterator[Task]:
    """What a certificate cannot do without: the matrix in float64, and thin products with 16 columns."""
    m, a = certificate_shares.matrices(n, 100.0)
    wide, thin = m.double(), _normal(16, n).double().mT
    needs: dict[str, tuple[int, Callable[..., Any]]] = {
        "inv": (3, lambda **o: linalg.inv_ex(a, **o)),
        "solve": (2, lambda **o: linalg.solve_ex(a, a[:, :1], **o)),
        "inv_root": (6, lambda **o: linalg.inv_root_ex(m, 4, **o)),
        "sqrtm": (4, lambda **o: linalg.sqrtm_ex(m, **o)),
    }
    for name, (count, call) in needs.items():
        bare = Part("the call with certify=False", 1, lambda call=call: call(certify=False))
        cast = Part("a cast to float64", 1, lambda: m.to(torch.float64))
        product = Part("a thin product in float64", count, lambda: probes.apply(wide[None], thin[None]))
        parts = (bare, cast, product)
        yield Task(f"certificate of {name}, n {n}", 1.1, call, bare.call, {"thin products": parts})


def measured(task: Task, repeats: int) -> dict[str, Any]:
    """The call, the peer, and every part, in milliseconds of the processor; and the ratios."""
    calls = {("", "ours"): task.ours, ("", "peer"): task.peer}
    for route, parts in task.routes.items():
        calls |= {(route, part.what): part.all for part in parts}
    names = {" ".join(key): call for key, call in calls.items()}
    times = {key: 1e3 * t.median for key, t in zip(calls, computing(names, repeats=repeats).values(), strict=True)}
    peer, floors = times["", "peer"], {}
    for route, parts in task.routes.items():
        total = sum(times[route, part.what] for part in parts)
        listed = {part.what: [part.times, round(times[route, part.what], 2)] for part in parts}
        floors[route] = {"ratio": round(total / peer, 3), "ms": round(total, 2), "parts": listed}
    ratio = round(times["", "ours"] / peer, 3)
    ms = {who: round(times["", who], 2) for who in ("ours", "peer")}
    return {"task": task.name, "goal": task.goal, "ratio": ratio, **ms, "floors": floors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", default="", help="tasks whose name contains this")
    args = parser.parse_args()
    tasks = [norms(), lowrank(), backward(), root(), directions(), shares(512), shares(256)]
    found = []
    for task in (one for group in tasks for one in group):
        if args.only not in task.name:
            continue
        found.append(row := measured(task, args.repeats))
        print(f"{row['task']}: {row['ours']} ms, {row['ratio']} of {row['peer']}; goal {row['goal']}")
        for route, floor in row["floors"].items():
            print(f"    floor by {route}: {floor['ratio']} ({floor['ms']} ms: {floor['parts']})", flush=True)
    if not args.only:
        RESULTS.write_text(json.dumps({"machine": features(), "tasks": found}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
