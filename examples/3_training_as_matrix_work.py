"""Efficient training as matrix work: fits, convolutions, pooling, recurrence, images and text are matrix products."""

from __future__ import annotations

import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import gramian as gm
from _check import Lesson, plt

torch.set_default_dtype(torch.float64)
lesson = Lesson("3_training_as_matrix_work", __doc__)
generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return gm.random.normal(*shape, generator=generator)


# --- four points ------------------------------------------------------------------------------------------------------

lesson.section("X = [[1, 2], [2, 3], [3, 4], [4, 5]], y = [2, 3, 4, 5]")
X = torch.tensor([[1.0, 2.0], [2.0, 3.0], [3.0, 4.0], [4.0, 5.0]])
y = torch.tensor([2.0, 3.0, 4.0, 5.0])
gram = gm.linalg.syrk(X)
w = gm.linalg.solve(gram, (X.mT @ y)[:, None])[:, 0]
lesson.close("the minimizer is y's own column", w, [0.0, 1.0], 1e-13)
hessian = 2 * gm.linalg.second_moment(X)
slow, fast = torch.linalg.eigvalsh(hessian)
print(
    f"      eigenvalues of the Hessian: {slow:.4f} and {fast:.2f}; κ = {fast / slow:.0f}, edge 2/λmax = {2 / fast:.4f}"
)


def descend(rate: float, num_steps: int) -> Tensor:
    v = torch.zeros(2)
    for _ in range(num_steps):
        v = v - rate * 2 / 4 * X.mT @ (X @ v - y)  # X.mT @ …, a matrix product; X * … would be none
    return v


lesson.less("1,000 epochs at rate 0.01 leave ‖w − (0, 1)‖ above", 0.1, (descend(0.01, 1000) - w).norm())
lesson.close("20,000 do", descend(0.01, 20_000), w, 1e-9)
lesson.less("rate 0.05 is beyond the edge: ‖w‖ after 100 steps is above", 1e3, descend(0.05, 100).norm())
singles = sum(torch.outer(row, row) for row in X)
lesson.close("one product for the whole batch, and a sum of four outer ones", gram, singles, 0.0)

# --- convolution ------------------------------------------------------------------------------------------------------

lesson.section("Convolution as one matrix product: y[i, j] = Σ x[i + k, j + l] w[k, l]")
digits = torch.as_tensor(load_digits().images)
image, kernel = digits[0], normal(3, 3)
direct = torch.zeros(6, 6)
for i in range(6):
    for j in range(6):
        direct[i, j] = (image[i : i + 3, j : j + 3] * kernel).sum()
torchs = F.conv2d(image[None, None], kernel[None, None])[0, 0]
lesson.close("the sum itself, and torch", direct, torchs, 1e-12)
columns = F.unfold(image[None, None], 3)[0]  # im2col: each patch a column, (9, 36)
lesson.close("im2col: kernel row × patches", (kernel.reshape(1, 9) @ columns).reshape(6, 6), torchs, 1e-12)


def toeplitz(w: Tensor, size: int) -> Tensor:
    """The doubly block Toeplitz matrix of a valid k × k correlation on a size × size image."""
    k, out = len(w), size - len(w) + 1
    t = torch.zeros(out, out, size, size)
    for i in range(out):
        for j in range(out):
            t[i, j, i : i + k, j : j + k] = w
    return t.reshape(out * out, size * size)


T = toeplitz(kernel, 8)
lesson.close("doubly block Toeplitz matrix × image", (T @ image.flatten()).reshape(6, 6), torchs, 1e-12)
back = F.conv_transpose2d(torchs[None, None], kernel[None, None]).flatten()
lesson.close("its transpose is the backward pass", T.mT @ torchs.flatten(), back, 1e-11)
other = normal(3, 3)
full = F.conv2d(F.pad(kernel, [2] * 4)[None, None], other.flip(0, 1)[None, None])[0, 0]
twice = F.conv2d(F.conv2d(F.pad(image, [4] * 4)[None, None], kernel.flip(0, 1)[None, None]),
                 other.flip(0, 1)[None, None])[0, 0]  # fmt: skip
once = F.conv2d(F.pad(image, [4] * 4)[None, None], full.flip(0, 1)[None, None])[0, 0]
lesson.close("with the kernel flipped it is a convolution, which composes", twice, once, 1e-10)
lesson.less("unflipped (torch, and most texts) it is a correlation: they differ by", 1.0,
            (F.conv2d(image[None, None], kernel.flip(0, 1)[None, None])[0, 0] - torchs).abs().max())  # fmt: skip
conv = nn.Conv2d(2, 3, 3)
block = gm.blocks(conv).blocks[0]
x = normal(4, 2, 8, 8)
product = block.split() @ F.unfold(x, 3) + conv.bias.detach()[:, None]
lesson.close("channels and batches: gm.blocks' (out, in·k·k) matrix × patches", product.reshape(4, 3, 6, 6),
             conv(x).detach(), 1e-12)  # fmt: skip
norm, row_norm = gm.linalg.svdvals(T)[0], kernel.norm()
lesson.less("‖kernel as a row‖ is not the convolution's norm, which is larger here", row_norm, norm)
lesson.less("but within √(k·k) = 3 of it", norm, 3 * row_norm)
a = gm.capture(conv, [(x, torch.zeros(4))], lambda model, batch: model(batch[0]).square().mean())["weight"].A
patches = F.unfold(x, 3).mT.reshape(-1, 18)
lesson.close("gm.capture's A is the second moment of the patches", a.matrix[:18, :18],
             gm.linalg.second_moment(patches), 1e-6)  # fmt: skip

# --- pooling ----------------------------------------------------------------------------------------------------------

lesson.section("Pooling, of images and over time")
mean_matrix = torch.kron(
    torch.kron(torch.eye(4), torch.full((1, 2), 0.5)), torch.kron(torch.eye(4), torch.full((1, 2), 0.5))
)
lesson.close("mean pooling is a matrix", (mean_matrix @ image.flatten()).reshape(4, 4),
             F.avg_pool2d(image[None], 2)[0], 1e-13)  # fmt: skip
blocks_of = image.reshape(4, 2, 4, 2)
lesson.close("max pooling is the largest of each block", blocks_of.amax((1, 3)), F.max_pool2d(image[None], 2)[0], 0.0)
p, q = digits[1], digits[2]
pooled = [F.max_pool2d(z[None], 2)[0] for z in (p, q, p + q)]
lesson.less(
    "and no matrix: pool(p) + pool(q) and pool(p + q) differ by", 0.5, (pooled[0] + pooled[1] - pooled[2]).abs().max()
)

rnn = nn.RNN(3, 5, batch_first=True)
sequence = normal(2, 7, 3)
W_xh, W_hh = rnn.weight_ih_l0.detach(), rnn.weight_hh_l0.detach()
bias = (rnn.bias_ih_l0 + rnn.bias_hh_l0).detach()


def recur(inputs: Tensor) -> Tensor:
    """All states (batch, time, 5) from W_xh x_t + b, given for every t."""
    h, states = torch.zeros(2, 5), []
    for t in range(7):
        h = torch.tanh(h @ W_hh.mT + inputs[:, t])
        states.append(h)
    return torch.stack(states, 1)


states = recur(torch.stack([x_t @ W_xh.mT + bias for x_t in sequence.unbind(1)], 1))
output, _ = rnn(sequence)
lesson.close("h_t = tanh(W_hh h_(t−1) + W_xh x_t + b), and torch's RNN", states, output.detach(), 1e-14)
at_once = (sequence.reshape(14, 3) @ W_xh.mT + bias).reshape(2, 7, 5)
lesson.close("W_xh x_t of all steps as one product beforehand", recur(at_once), states, 1e-14)
lesson.close("mean pooling over time", states.mean(1), F.avg_pool1d(output.mT, 7)[..., 0].detach(), 1e-14)
lesson.close("max pooling over time", states.amax(1), F.max_pool1d(output.mT, 7)[..., 0].detach(), 1e-14)
output.retain_grad()
output.amax(1).sum().backward()
lesson.same("the gradient of a maximum goes to one time step for each unit", int((output.grad != 0).sum()), 2 * 5)

lesson.section("The recurrence's powers")
g = normal(32, 32) / 32**0.5
radius = torch.linalg.eigvals(g).abs().max()
lengths = torch.arange(1, 201)
curves = {}
for rho in (0.9, 1.0, 1.1):
    power, norms = torch.eye(32), []
    for _ in lengths:
        power = power @ (g * rho / radius)
        norms.append(torch.linalg.matrix_norm(power, 2))
    curves[f"spectral radius {rho}"] = torch.stack(norms)
    growth = (norms[-1] / norms[99]) ** 0.01
    lesson.close(f"‖Wᵏ‖ grows by the spectral radius per step, {rho}", growth, rho, 5e-3)
q = gm.random.orthogonal(32, 32, generator=generator)
curves["orthogonal"] = torch.stack([torch.linalg.matrix_norm(torch.linalg.matrix_power(q, int(k)), 2) for k in lengths])
lesson.close("an orthogonal W keeps every length for 200 steps", curves["orthogonal"][-1], 1.0, 1e-12)
early = curves["spectral radius 0.9"]
lesson.less("a radius below one may still grow first: ‖W‖ is", 1.0, early[0])
straight = torch.linalg.matrix_power(1.1 * q, 10_000).abs().max()
mantissa, log_scale = gm.linalg.matrix_power_scaled(1.1 * q, 10_000)
logarithm = log_scale + torch.linalg.matrix_norm(mantissa, 2).log()
lesson.same("(1.1 Q)¹⁰⁰⁰⁰ overflows", bool(straight.isfinite()), False)
expected = 1e4 * torch.tensor(1.1).log()
lesson.close("gm.linalg.matrix_power_scaled knows its logarithm, 10⁴ log 1.1", logarithm, expected, 1e-8)

# --- images and text as matrices --------------------------------------------------------------------------------------

lesson.section("An image and a text as matrices")
u, s, v = gm.linalg.svd_lowrank(image, 3)
tail = torch.linalg.svdvals(image)[3:]
lesson.close(
    "rank 3 of a digit: error is the rest of its singular values", (image - (u * s) @ v.mT).norm(), tail.norm(), 1e-10
)
texts = (
    "the doctor saw the patient", "the physician saw the patient", "the patient thanked the doctor",
    "the physician treated the patient", "the engine needs oil", "the car has an engine",
    "oil for the automobile engine", "the car and the automobile",
)  # fmt: skip
stop = {"the", "an", "has", "for", "and", "saw", "needs"}
documents = [[word for word in text.split() if word not in stop] for text in texts]
terms = sorted({word for document in documents for word in document})
counts = torch.tensor([[float(document.count(term)) for document in documents] for term in terms])
u, s, v = gm.linalg.svd_lowrank(counts, 2)
places = u * s


def cosine(table: Tensor, a: str, b: str) -> float:
    return F.cosine_similarity(table[terms.index(a)], table[terms.index(b)], dim=0).item()


lesson.close(
    "doctor and physician share no text: cosine of their rows", cosine(counts, "doctor", "physician"), 0.0, 0.0
)
lesson.less("in two dimensions they are neighbors", 0.95, cosine(places, "doctor", "physician"))
lesson.less("and doctor and engine are not", abs(cosine(places, "doctor", "engine")), 0.1)
lesson.close("the squared singular values are the eigenvalues of the terms' Gram matrix",
             s.square(), torch.linalg.eigvalsh(gm.linalg.syrk(counts))[-2:].flip(0), 1e-12)  # fmt: skip

# --- threads and bf16 -------------------------------------------------------------------------------------------------

lesson.section("Threads and bf16, as measured here")
a, b = normal(768, 768).float(), normal(768, 768).float()
reference = a.double() @ b.double()


def milliseconds(left: Tensor, right: Tensor) -> float:
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - begin)
    return 1e3 * sorted(times)[3]


rows = []
for count in sorted({1, lesson.num_threads}):
    torch.set_num_threads(count)
    for dtype in (torch.float32, torch.bfloat16):
        rows.append((count, dtype, milliseconds(a.to(dtype), b.to(dtype))))
torch.set_num_threads(1)
for count, dtype, ms in rows:
    print(f"      768³ in {str(dtype)[6:]:8s} on {count} thread{'s' if count > 1 else ''}: {ms:6.2f} ms")
# float32 rounds at each of 768 additions, at random; bf16 rounds the factors and the result once, and adds in float32.
for dtype, bound, formula in (
    (torch.float32, 768**0.5 * 2.0**-24, "√768 · 2⁻²⁴"),
    (torch.bfloat16, 3 * 2.0**-9, "3 · 2⁻⁹"),
):
    error = ((a.to(dtype) @ b.to(dtype)).double() - reference).norm() / reference.norm()
    lesson.less(f"relative error of {str(dtype)[6:]}, and {formula}", error, bound)

# --- the picture ------------------------------------------------------------------------------------------------------

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
limit = T.abs().max()
shown = left.imshow(T, cmap="RdBu_r", vmin=-limit, vmax=limit)
left.set(xlabel="input pixel (8 × 8)", ylabel="output pixel (6 × 6)", title="A 3 × 3 convolution is one 36 × 64 matrix")
left.grid(False)
figure.colorbar(shown, ax=left, shrink=0.6, label="weight")
for name, values in curves.items():
    middle.semilogy(lengths, values, label=name, ls="--" if name == "orthogonal" else "-")
middle.set(xlabel="time steps k", ylabel="‖Wᵏ‖₂", title="What a recurrence does to its state and gradient")
middle.legend(fontsize=7.5)
together: dict[tuple[float, float], list[str]] = {}
for term, place in zip(terms, places.abs(), strict=True):
    together.setdefault((round(place[0].item(), 2), round(place[1].item(), 2)), []).append(term)
for place, names in together.items():
    right.plot(*place, "o", ms=4, color="#2a6fbb")
    right.annotate(", ".join(names), place, xytext=(4, 4), textcoords="offset points", fontsize=8, rotation=35)
right.set(xlabel="first singular direction", ylabel="second", title="Words of eight texts, by the term matrix's SVD")
right.margins(0.15, 0.2)
lesson.finish(figure)
