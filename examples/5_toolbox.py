"""The toolbox: the operations, decompositions, spectra and derivatives of matrices, each against an exact answer."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import Tensor

import gramian as gm
from _check import Lesson, plt

torch.set_default_dtype(torch.float64)
lesson = Lesson("5_toolbox", __doc__)
generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return gm.random.normal(*shape, generator=generator)


# --- operations -------------------------------------------------------------------------------------------------------

lesson.section("Sums, products, transposes, inverses")
A, B, C = normal(5, 5), normal(5, 5), normal(5, 5)
lesson.close("(A + B)C = AC + BC", (A + B) @ C, A @ C + B @ C, 1e-13)
by_entries = torch.stack([torch.stack([(A[i] * B[:, j]).sum() for j in range(5)]) for i in range(5)])
lesson.close("the matrix product is rows times columns", A @ B, by_entries, 1e-13)
lesson.less("A * B, element by element, is another product: apart by", 1.0, (A @ B - A * B).abs().max())
lesson.close("A * B commutes", A * B, B * A, 0.0)
lesson.less("AB does not: AB and BA are apart by", 1.0, (A @ B - B @ A).abs().max())
lesson.close("(AB)ᵀ = BᵀAᵀ", (A @ B).mT, B.mT @ A.mT, 1e-13)
lesson.close("(AB)⁻¹ = B⁻¹A⁻¹", gm.linalg.inv(A @ B), gm.linalg.inv(B) @ gm.linalg.inv(A), 1e-10)
eye, scales = torch.eye(5), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
lesson.close("IA = A", eye @ A, A, 0.0)
lesson.close("diag(d)A scales rows, A diag(d) columns", torch.diag(scales) @ A @ torch.diag(scales),
             scales[:, None] * A * scales, 1e-13)  # fmt: skip
inverted = gm.linalg.inv(torch.diag(scales))
lesson.close("the inverse of a diagonal matrix is diagonal", inverted, torch.diag(1 / scales), 1e-15)

lesson.section("Rank, QR, LU, orthogonal matrices")
low = normal(8, 2) @ normal(2, 6)
lesson.same("rank of an 8 × 2 times a 2 × 6", int(torch.linalg.matrix_rank(low)), 2)
lesson.same("rank of a sum is at most the sum of ranks",
            int(torch.linalg.matrix_rank(low + normal(8, 1) @ normal(1, 6))), 3)  # fmt: skip
Q, R = torch.linalg.qr(A)
lesson.close("QR: QR = A", Q @ R, A, 1e-13)
lesson.close("QᵀQ = I, R upper triangular", torch.cat([Q.mT @ Q - eye, R.tril(-1)]), torch.zeros(10, 5), 1e-13)
P, L, U = torch.linalg.lu(A)
lesson.close("LU with pivoting: PLU = A", P @ L @ U, A, 1e-13)
lesson.close("det A = ± the product of U's diagonal", torch.linalg.det(A).abs(), U.diagonal().prod().abs(), 1e-10)
swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
lesson.close("[[0, 1], [1, 0]] has no LU without a swap of its rows: P is", torch.linalg.lu(swap)[0], swap, 0.0)
polar = gm.linalg.polar(A)
lesson.close("polar: UVᵀ is orthogonal", polar.mT @ polar, eye, 1e-13)
distance = ((gm.linalg.svdvals(A) - 1).square().sum()).sqrt()
lesson.close("and at the distance √Σ(σᵢ − 1)² from A", (A - polar).norm(), distance, 1e-12)
signed = Q * R.diagonal().sign()
lesson.less("the nearest: nearer than the Q of QR", (A - polar).norm(), (A - signed).norm())
haar = gm.random.orthogonal(5, 5, generator=generator)
lesson.close("an orthogonal matrix keeps singular values", gm.linalg.svdvals(haar @ A), gm.linalg.svdvals(A), 1e-13)

lesson.section("Eigenvalues, symmetric and not")
S = A + A.mT
values, vectors = torch.linalg.eigh(S)
lesson.close("symmetric: S = VΛVᵀ with VᵀV = I", (vectors * values) @ vectors.mT, S, 1e-13)
lesson.close("trace and sum, determinant and product", torch.stack([S.trace(), torch.linalg.det(S)]),
             torch.stack([values.sum(), values.prod()]), 1e-10)  # fmt: skip
sizes = values.abs().sort(descending=True).values
lesson.close("singular values are |eigenvalues| there", gm.linalg.svdvals(S), sizes, 1e-12)
quarter = torch.linalg.eigvals(torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
lesson.close("a rotation's eigenvalues are ±i, its singular values 1", quarter.imag.sort().values, [-1.0, 1.0], 1e-14)
jordan = torch.diag(torch.ones(9), 1)
bent = jordan.clone()
bent[9, 0] = 1e-10
lesson.close("not symmetric: a change of 1e-10 moves eigenvalues by 1e-10^(1/10)",
             torch.linalg.eigvals(bent).abs().max(), 0.1, 1e-6)  # fmt: skip
moved = torch.linalg.eigvalsh(S + 1e-10 * (B + B.mT)) - values
change = 1e-10 * gm.linalg.svdvals(B + B.mT)[0]
lesson.less("symmetric: by no more than the change's norm (Weyl)", moved.abs().max(), change)

# --- random matrices --------------------------------------------------------------------------------------------------

lesson.section("Random matrices and their spectra")
n = 400
gaussian = normal(n, n) / math.sqrt(n)
flat = gm.random.uniform(n, n, generator=generator)  # U(0, 1): mean ½, variance 1/12
spread = (flat - 0.5) * math.sqrt(12 / n)
lesson.close("normal: largest singular value and 2", gm.linalg.svdvals(gaussian)[0], 2.0, 0.06)
lesson.close("uniform, centered and scaled: the same law", gm.linalg.svdvals(spread)[0], 2.0, 0.06)
top = gm.linalg.svdvals(flat)[:2]
lesson.close("uniform as drawn: its mean is one huge singular value, n/2", top[0] / (n / 2), 1.0, 0.01)
lesson.close("the others are the noise's, 2 √(n/12)", top[1] / (2 * math.sqrt(n / 12)), 1.0, 0.03)
circle = torch.linalg.eigvals(gaussian)
lesson.close("normal: eigenvalues fill the unit disc (Girko)", circle.abs().max(), 1.0, 0.08)
lesson.close("uniformly: the share within radius ½ is ¼", (circle.abs() < 0.5).double().mean(), 0.25, 0.04)
wigner = torch.linalg.eigvalsh((gaussian + gaussian.mT) / math.sqrt(2))
lesson.close("symmetric: the semicircle's edges ±2 (Wigner)", wigner[[0, -1]], [-2.0, 2.0], 0.06)
factor = torch.tril(normal(3, 3))  # any Gaussian vector is Lz + mean, z being standard normal
correlated = normal(100_000, 3) @ factor.mT
lesson.close("Gaussian with covariance LLᵀ: x = Lz", gm.linalg.second_moment(correlated), factor @ factor.mT, 0.05)
beta = 0.25
sample = torch.linalg.eigvalsh(gm.random.wishart(n, n, samples=int(n / beta), generator=generator))
edges = [(1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2]
lesson.close("second moment of pure noise, 4 samples a feature: not 1 but (1 ± √¼)²", sample[[0, -1]], edges, 0.05)


def marchenko_pastur(x: Tensor) -> Tensor:
    """Density of the eigenvalues of XᵀX/samples for ratio β."""
    return ((edges[1] - x) * (x - edges[0])).clamp_min(0).sqrt() / (2 * math.pi * beta * x)


grid = torch.linspace(edges[0], edges[1], 4001)
law = torch.cumulative_trapezoid(marchenko_pastur(grid), grid)
measured = torch.searchsorted(sample, grid[1:]) / n
lesson.less("largest distance of the two distribution functions", (law - measured).abs().max(), 0.02)

# --- dimension reduction and denoising --------------------------------------------------------------------------------

lesson.section("Singular values on 1,797 real digits: fewer dimensions, less noise")
clean = torch.as_tensor(load_digits().data)
centered = clean - clean.mean(0)
full = gm.linalg.pca(clean, 64)
streamed = gm.linalg.pca(clean.split(100), 64)
sigma = torch.linalg.svdvals(centered)
lesson.close("gm.linalg.pca's variances are σ²/(n − 1) of the centered data", full.explained_variance,
             sigma.square() / (len(clean) - 1), 1e-9)  # fmt: skip
lesson.close("streamed in batches of 100: the same", streamed.explained_variance, full.explained_variance, 1e-9)
share = full.explained_variance.cumsum(0) / full.explained_variance.sum()
k = int((share < 0.9).sum()) + 1
codes = (clean - full.mean) @ full.components[:k].mT
rebuilt = codes @ full.components[:k] + full.mean
lost = (rebuilt - clean).square().sum() / centered.square().sum()
lesson.close(f"{k} of 64 dimensions keep 90 %; what is lost is the rest", lost, 1 - share[k - 1], 1e-10)
_, _, uncentered = gm.linalg.svd_lowrank(clean, 1)
lesson.less("without centering the first direction is the mean: |cosine| is above", 0.99,
            abs(uncentered[:, 0] @ (clean.mean(0) / clean.mean(0).norm())))  # fmt: skip
noise = 4.0
noisy = clean + noise * normal(*clean.shape)
mean = noisy.mean(0)


def error(x: Tensor) -> float:
    """Root mean square distance to the clean pixels, which run from 0 to 16."""
    return (x - clean).square().mean().sqrt().item()


fixed = []
u, s, v = torch.linalg.svd(noisy - mean, full_matrices=False)
for rank in range(1, 65):
    fixed.append(error((u[:, :rank] * s[:rank]) @ v[:rank] + mean))
shrunk = gm.linalg.svd_shrink(noisy - mean, noise=noise) + mean
best_rank = fixed.index(min(fixed)) + 1
print(f"      error of the noisy images {error(noisy):.2f}, rank 5 {fixed[4]:.2f}, rank 40 {fixed[39]:.2f}")
lesson.less("optimal shrinkage against rank 5", error(shrunk), fixed[4])
lesson.less("against rank 40", error(shrunk), fixed[39])
lesson.less(f"and against the best rank, {best_rank}, which only the clean images tell", error(shrunk), min(fixed))
kept = int(torch.linalg.matrix_rank(shrunk - mean, rtol=1e-9))
edge = noise * (math.sqrt(len(clean)) + math.sqrt(64))
lesson.same("it keeps what is above the noise's edge σ(√m + √n)", kept, int((s > edge).sum()))

# --- derivatives ------------------------------------------------------------------------------------------------------

lesson.section("Matrix derivatives: the formula, autograd, central differences")
X = torch.eye(4) * 3 + normal(4, 4)
M, x = normal(4, 4), normal(4, 1)
inverse = gm.linalg.inv(X)
DERIVATIVES: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, Tensor]] = {
    "Σx² → 2X": (lambda z: z.square().sum(), X, 2 * X),
    "tr(AX) → Aᵀ": (lambda z: (M @ z).trace(), X, M.mT),
    "tr(XᵀAX) → (A + Aᵀ)X": (lambda z: (z.mT @ M @ z).trace(), X, (M + M.mT) @ X),
    "xᵀAx → (A + Aᵀ)x, and not 2Ax": (lambda z: (z.mT @ M @ z).sum(), x, (M + M.mT) @ x),
    "log |det X| → X⁻ᵀ": (lambda z: torch.linalg.slogdet(z)[1], X, inverse.mT),
    "tr(AX⁻¹) → −X⁻ᵀAᵀX⁻ᵀ": (lambda z: (M @ torch.linalg.inv(z)).trace(), X, -inverse.mT @ M.mT @ inverse.mT),
    "‖Xx‖² → 2Xxxᵀ": (lambda z: (z @ x).square().sum(), X, 2 * X @ x @ x.mT),
}


def central(f: Callable[[Tensor], Tensor], at: Tensor, h: float = 6e-6) -> Tensor:
    out = torch.zeros_like(at)
    for i in range(at.numel()):
        e = torch.zeros_like(at)
        e.view(-1)[i] = h
        out.view(-1)[i] = (f(at + e) - f(at - e)) / (2 * h)
    return out


for name, (f, at, formula) in DERIVATIVES.items():
    lesson.close(f"{name}, autograd", torch.func.grad(f)(at), formula, 1e-11)
    lesson.close(f"{name}, differences", central(f, at), formula, 1e-7)
direction = normal(4, 4)
change = torch.func.jvp(torch.linalg.inv, (X,), (direction,))[1]
lesson.close("d(X⁻¹) = −X⁻¹ dX X⁻¹", change, -inverse @ direction @ inverse, 1e-12)

# --- fast multiplication, sparse storage ------------------------------------------------------------------------------

lesson.section("Fast multiplication: one level of Strassen–Winograd against the library, float32, one thread")


def milliseconds(a: Tensor, b: Tensor, *functions: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
    """Median time of each function of a and b, taken in turns so that a busy moment hits all."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(5):
        for function, row in zip(functions, times, strict=True):
            begin = time.perf_counter()
            function(a, b)
            row.append(1e3 * (time.perf_counter() - begin))
    return [sorted(row)[2] for row in times]


strassen = partial(gm.linalg.matmul, method="strassen")
sizes, quotients = (64, 128, 256, 512, 1024, 2048), []
for size in sizes:
    a, b = normal(size, size).float(), normal(size, size).float()
    library, ours = milliseconds(a, b, torch.matmul, strassen)
    quotients.append(ours / library)
    print(f"      {size:5d}: library {library:8.3f} ms, Strassen {ours:8.3f} ms, {quotients[-1]:.2f} of it")
paying = [size for size, q in zip(sizes, quotients, strict=True) if q < 1]
print(f"      it pays here at: {', '.join(map(str, paying)) or 'none of these sizes'} (7/8 of the products at best)")
exact = a.double() @ b.double()
scale = a.norm() * b.norm()
library_error = (a @ b - exact).norm() / scale
strassen_error = (strassen(a, b) - exact).norm() / scale
u = 2.0**-24
lesson.less("error of Strassen, and its bound 18(k/4 + 6)u", strassen_error, 18 * (size / 4 + 6) * u)
lesson.less("the library's error is smaller", library_error, strassen_error)

lesson.section("Dense against sparse storage, 1,000 × 1,000 in float32")
warnings.filterwarnings("ignore", message="Sparse CSR")
width = 1000
right = normal(width, 8).float()
for density in (0.001, 0.01, 0.1, 0.5):
    mask = gm.random.uniform(width, width, generator=generator) < density
    dense = normal(width, width).float() * mask
    sparse = dense.to_sparse_csr()
    parts = (sparse.values(), sparse.col_indices(), sparse.crow_indices())
    held = sum(part.nbytes for part in parts)
    count = int(mask.sum())
    slow, fast = milliseconds(dense, right, torch.matmul)[0], milliseconds(sparse, right, torch.matmul)[0]
    print(f"      density {density:5.1%}: {held / dense.nbytes:6.1%} of the memory, {fast / slow:6.1%} of the time")
    formula = 12 * count + 8 * (width + 1)
    lesson.same(f"density {density:.1%}: bytes are 12 for each entry and 8 for each row", held, formula)
lesson.close("the products agree", sparse @ right, dense @ right, 1e-3)
lesson.less("break-even of the memory is a density of ⅓: bytes at 0.5 are above the dense", dense.nbytes, held)

# --- the picture ------------------------------------------------------------------------------------------------------

figure, axes = plt.subplot_mosaic(
    [["disc", "law", "error"], ["digits", "digits", "strassen"]], figsize=(13, 8), layout="constrained"
)
axes["disc"].plot(circle.real, circle.imag, ".", ms=3)
angle = torch.linspace(0, 2 * math.pi, 200)
axes["disc"].plot(angle.cos(), angle.sin(), "k", lw=1, label="unit circle")
axes["disc"].set(xlabel="real part", ylabel="imaginary part", title="Eigenvalues of a normal 400 × 400 matrix / √400")
axes["disc"].set_aspect("equal")
axes["disc"].legend(fontsize=7.5, loc="upper right")
axes["law"].hist(sample.numpy(), bins=40, density=True, color="#bcd2ea", label="measured")
axes["law"].plot(grid, marchenko_pastur(grid), color="#d1602a", label="Marchenko–Pastur, β = ¼")
axes["law"].axvline(1.0, color="k", ls=":", lw=1, label="true value of all")
axes["law"].set(xlabel="eigenvalue", ylabel="density", title="Second moment of noise: 1,600 samples, 400 features")
axes["law"].legend(fontsize=7.5)
axes["error"].plot(range(1, 65), fixed, "o-", ms=3, label="fixed rank")
axes["error"].axhline(error(shrunk), color="#3a8f5c", label=f"optimal shrinkage, {error(shrunk):.2f}")
axes["error"].axhline(error(noisy), color="#5f6b76", ls=":", label=f"noisy, {error(noisy):.2f}")
axes["error"].set(xlabel="rank", ylabel="root mean square error (pixels 0 to 16)", title="Denoising 1,797 digits")
axes["error"].legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.55, 0.95))
rank5 = (noisy - mean) @ v[:5].mT @ v[:5] + mean
gap = torch.full((8, 1), math.nan)
rows = []
for images in (clean, noisy, rank5, shrunk):
    rows.append(torch.cat([torch.cat([images[i].reshape(8, 8), gap], 1) for i in range(10)], 1))
sheet = torch.cat([torch.cat([row, torch.full((1, row.shape[1]), math.nan)]) for row in rows])
axes["digits"].imshow(sheet, cmap="gray_r", vmin=0, vmax=16)
axes["digits"].set_yticks([3.5, 12.5, 21.5, 30.5], ["clean", "noise, σ = 4", "rank 5", "shrinkage"])
axes["digits"].set_xticks([])
axes["digits"].grid(False)
axes["digits"].spines[:].set_visible(False)
axes["digits"].tick_params(left=False)
axes["digits"].set_title("Ten of them")
axes["strassen"].semilogx(sizes, quotients, "o-", label="measured")
axes["strassen"].axhline(1.0, color="k", ls=":", lw=1, label="the library")
axes["strassen"].axhline(7 / 8, color="#3a8f5c", ls="--", label="⅞, the products alone")
axes["strassen"].set_xticks(sizes, [f"{size:,}" for size in sizes])
axes["strassen"].minorticks_off()
axes["strassen"].set(xlabel="n, of n × n matrices", ylabel="time / library's time", ylim=(0, 4))
axes["strassen"].set_title("One level of Strassen on this machine")
axes["strassen"].legend(fontsize=7.5, loc="upper right")
lesson.finish(figure)
