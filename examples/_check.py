"""Shared by the five examples: PASS lines that show both numbers, and a picture in a folder."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

COLORS = ("#2a6fbb", "#d1602a", "#3a8f5c", "#8a5aa8", "#b8860b", "#5f6b76", "#c2407a", "#138d90")


class Lesson:
    """One example's command line, checks and picture: a failed check prints FAIL, and `finish` then exits with 1."""

    def __init__(self, name: str, description: str) -> None:
        parser = argparse.ArgumentParser(description=description)
        folder = Path(__file__).resolve().parent / "out"
        parser.add_argument("--out", type=Path, default=folder, help="folder of the picture")
        self.name, self.out = name, parser.parse_args().out
        self.num_failed, self.start = 0, time.perf_counter()
        self.num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # at these sizes a second thread gains nothing
        torch.set_flush_denormal(True)  # denormal numbers become zero; otherwise they are a hundred times slower
        torch.manual_seed(0)  # torch's own layers draw their weights from the global generator
        plt.rcParams.update(
            {
                "figure.dpi": 110,
                "font.size": 9,
                "axes.titlesize": 10,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.grid": True,
                "grid.color": "#e6e6e6",
                "axes.axisbelow": True,
                "legend.frameon": False,
                "axes.prop_cycle": plt.cycler(color=COLORS),
            }
        )

    def section(self, title: str) -> None:
        print(f"\n{title}")

    def close(self, what: str, got: object, expected: object, within: float) -> None:
        """Print PASS where every element of `got` is within `within` of `expected`."""
        x, y = torch.as_tensor(got, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64)
        gap = (x - y).abs().max().item()
        self._report(gap <= within, what, f"{_show(x)} against {_show(y)}, apart by {gap:.1e} ≤ {within:.0e}")

    def less(self, what: str, smaller: float, larger: float) -> None:
        """Print PASS where smaller < larger."""
        self._report(float(smaller) < float(larger), what, f"{float(smaller):.6g} < {float(larger):.6g}")

    def same(self, what: str, got: object, expected: object) -> None:
        """Print PASS where the two are equal: counts, words, truth values."""
        self._report(got == expected, what, f"{got} against {expected}")

    def finish(self, figure: plt.Figure) -> None:
        """Save the picture and exit, with 0 if all passed."""
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"{self.name}.png"
        figure.savefig(path, bbox_inches="tight")
        print(f"\n{path}  ({time.perf_counter() - self.start:.1f} s)")
        sys.exit(1 if self.num_failed else 0)

    def _report(self, passed: bool, what: str, numbers: str) -> None:
        self.num_failed += not passed
        print(f"{'PASS' if passed else 'FAIL'}  {what}: {numbers}")


def _show(x: torch.Tensor) -> str:
    """Return up to three numbers in full, or the largest magnitude of more."""
    values = x.flatten().tolist()
    if len(values) <= 3:
        text = ", ".join(f"{v:.8g}" for v in values)
        return text if len(values) == 1 else f"({text})"
    return f"{'×'.join(map(str, x.shape))} numbers up to {x.abs().max():.4g}"
