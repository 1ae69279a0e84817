"""Every example runs as a user runs it, passes its own checks on every topic, and draws a picture."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
ZH = EXAMPLES.parent / "docs" / "zh" / "4_vanishing_gradients.md"

# What each topic's text promises: a PASS line that starts with each of these.
TOPICS: dict[str, tuple[str, ...]] = {
    "1_inverse_regularization_optimization": (
        "inverse and solve", "gradient descent and the closed form", "SGD, ", "Adam, rate decayed",
        "Adam's formula and torch's after 300 steps", "predictions at 0.5, 0.8, 0.9",
        "λ = 1: gradient = −λ/(2m) sign θ", "λ = 300: |gradient| < λ/(2m) where θ = 0", "exactly singular",
        "pseudo-inverse", "damping → 0", "1e-6 apart: the solve", "1e-9 apart, damped", "one Newton step",
        "Gauss–Newton", "held-out: best λ of L2", "held-out: best λ of L1",
    ),
    "2_linear_algebra_and_descent": (
        "by hand and by autograd", "by hand and by central differences", "θ after 1,000 epochs",
        "measured by bisection, and 2/λmax", "at 1.01 of it", "the fastest rate of those tried", "standardized input",
        "constant rate: mini-batches", "a decaying rate", "the likeliest probability", "41 starts",
    ),
    "3_training_as_matrix_work": (
        "the minimizer is", "the sum itself, and torch", "im2col", "doubly block Toeplitz", "mean pooling is a matrix",
        "max pooling is", "h_t = tanh", "mean pooling over time", "max pooling over time", "‖Wᵏ‖ grows",
        "gm.linalg.matrix_power_scaled", "rank 3 of a digit", "doctor and physician", "relative error of bfloat16",
    ),
    "4_vanishing_gradients": (
        "∂L/∂W₁", "∂L/∂b₂", "depth 1000, isometric", "and the gain χ", "isometric: σ₁₆/σ₁", "log |det|",
        "log₁₀ of its norm", "the product's largest |eigenvalue|", "learning-rate decay: the ratio", "weight decay",
        "factorization has", "recurrence (a matrix's powers)", "Muon alone", "isometric, Adam", "isometric recurrence",
        "isometric, Muon",
    ),
    "5_toolbox": (
        "(A + B)C", "A * B, element by element", "(AB)ᵀ", "(AB)⁻¹", "IA = A", "diag(d)A", "rank of", "QR", "LU",
        "polar", "symmetric: S", "a rotation's eigenvalues", "normal: largest", "uniform, centered",
        "Gaussian with covariance",
        "21 of 64 dimensions", "optimal shrinkage", "Σx² → 2X, autograd", "tr(AX) → Aᵀ, differences",
        "log |det X|", "tr(AX⁻¹)", "xᵀAx", "error of Strassen", "density 0.1%",
    ),
}  # fmt: skip


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("[0-9]*.py")} == set(TOPICS)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOPICS)
def test_an_example_passes_its_own_checks(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=1000, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert not [line for line in lines if line.startswith("FAIL")]
    passed = [line.removeprefix("PASS").strip() for line in lines if line.startswith("PASS")]
    for topic in TOPICS[name]:
        assert any(line.startswith(topic) for line in passed), topic
    assert done.stderr == ""
    if name == ZH.stem:
        check_remedies(done.stdout)
    picture = tmp_path / f"{name}.png"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = matplotlib.image.imread(picture)
    assert len({tuple(color) for color in pixels.reshape(-1, pixels.shape[-1])[::7].tolist()}) > 10


CHANCE = 25  # per cent: a run on ten digits that ends below has learned nothing


def of_table(page: Path, heading: str) -> list[str]:
    """The last cells of the rows of the table below a heading."""
    part = page.read_text(encoding="utf-8").partition(heading)[2]
    rows = part[part.index("|-|") :].partition("\n\n")[0].splitlines()[1:]
    return [row.strip("| *").rpartition("|")[2].strip(" *%") for row in rows]


def check_remedies(printed: str) -> None:
    """The accuracies that the pages tell of the eleven runs at depth 30 are those of the run."""
    found = [float(value) for value in re.findall(r"accuracy +([\d.]+)%$", printed, re.MULTILINE)]
    for page, heading in ((EXAMPLES / "README.md", "The usual remedies"), (ZH, "## 对照实验")):
        for told, accuracy in zip(of_table(page, heading), found, strict=True):
            if told in ("chance", "随机水平"):
                assert accuracy < CHANCE, page.name
            else:
                assert accuracy == pytest.approx(float(told), abs=3), page.name


PASSING = ("lesson.close('x', 1.0, 1.1, 0.2)", "lesson.less('x', 1, 2)", "lesson.same('x', 'a', 'a')")
FAILING = (
    "lesson.close('x', 1.0, 1.1, 0.01)", "lesson.close('x', float('nan'), 1.1, 0.01)", "lesson.less('x', 2, 1)",
    "lesson.less('x', 1, float('nan'))", "lesson.same('x', 'a', 'b')",
)  # fmt: skip


@pytest.mark.parametrize(("checks", "word", "code"), [(PASSING, "PASS", 0), (FAILING, "FAIL", 1)], ids=["pass", "fail"])
def test_a_failed_check_is_a_failed_run(checks: tuple[str, ...], word: str, code: int, tmp_path: Path) -> None:
    script = "\n".join(["from _check import Lesson, plt", "lesson = Lesson('x', '')", *checks])
    command = [sys.executable, "-c", f"{script}\nlesson.finish(plt.figure())", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[: len(checks)] == [
        line for line in done.stdout.splitlines() if line.startswith(word)
    ]
