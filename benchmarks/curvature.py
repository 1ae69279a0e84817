"""The five leading Hessian eigenvalues: error and number of products, beside power iteration with deflation.

Power iteration is as in PyHessian (Yao et al., arXiv:1912.07145): 100 iterations for each eigenvalue at most, stopped
where it changes by less than 1e-3 of itself. The truth is `eigh` of the dense matrix, in float64.

    python benchmarks/curvature.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import gramian as gm

COUNT, TOLERANCE, ITERATIONS = 5, 1e-3, 100


def power_iteration(h: gm.operators.Curvature, generator: torch.Generator) -> Tensor:
    """Eigenvalues one after the other; each next vector is kept orthogonal to those found."""
    values, vectors = [], torch.zeros(h.shape[0], 0, dtype=h.dtype)
    for _ in range(COUNT):
        v = torch.randn(h.shape[0], generator=generator, dtype=h.dtype)
        value: float | None = None
        for _ in range(ITERATIONS):
            v = v - vectors @ (vectors.T @ v)
            v = v / (v.norm() + 1e-6)
            image = h.matvec(v)
            now = float(image @ v)
            v = image / (image.norm() + 1e-6)
            if value is not None and abs(value - now) / (abs(value) + 1e-6) < TOLERANCE:
                value = now
                break
            value = now
        assert value is not None
        values.append(value)
        vectors = torch.cat([vectors, v[:, None]], 1)
    return torch.tensor(values, dtype=h.dtype)


def cases() -> dict[str, tuple[nn.Module, list[tuple[Tensor, Tensor]]]]:
    torch.manual_seed(0)
    x, y = torch.randn(256, 16).double(), torch.randint(4, (256,))
    images = torch.randn(64, 1, 8, 8).double()
    mlp = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4)).double()
    trained = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4)).double()
    optimizer = torch.optim.Adam(trained.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(trained(x), y).backward()
        optimizer.step()
    cnn = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.GELU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(32, 16), nn.GELU(),
        nn.Linear(16, 4),
    ).double()  # fmt: skip
    return {"mlp": (mlp, [(x, y)]), "trained mlp": (trained, [(x, y)]), "cnn": (cnn, [(images, y[:64])])}


def main() -> None:
    print(f"{'network':12} {'n':>6} {'method':16} {'products':>8} {'worst relative error of five':>30}")
    for name, (model, batches) in cases().items():
        h = gm.operators.hessian(model, batches, gm.Objective.classification())
        n = h.shape[0]
        dense = h.matmat(torch.eye(n, dtype=h.dtype))
        values = torch.linalg.eigvalsh((dense + dense.T) / 2)
        truth = values[values.abs().argsort(descending=True)[:COUNT]]
        found = {"power iteration": lambda h=h: power_iteration(h, torch.Generator().manual_seed(0))}
        for rtol in (1e-3, 1e-6):
            found[f"gramian {rtol:g}"] = lambda h=h, rtol=rtol: gm.linalg.eigvalsh_top(h, COUNT, rtol=rtol)
        for method, run in found.items():
            before = h.num_products
            error = ((run() - truth) / truth).abs().max()
            print(f"{name:12} {n:6} {method:16} {h.num_products - before:8} {float(error):30.1e}")


if __name__ == "__main__":
    main()
