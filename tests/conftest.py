"""Under the tests, the signatures of the modules that take tensors are checked at run time (tests/signatures.py)."""

import os

import pytest
import torch
from hypothesis import settings

# Which method a matrix takes must not depend on the clock. Set before the import of the library.
os.environ.setdefault("GRAMIAN_COSTS", "default")

import signatures

CHECKED = (
    "block", "compression", "gram", "init", "inspection", "layers", "layout", "linalg", "operators", "optim", "prox",
    "random", "recording", "statistics",
)  # fmt: skip

signatures.install([f"gramian.{name}" for name in CHECKED])


# By default, hypothesis draws other examples in every run, and fails one that takes 0.2 s.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def global_generator() -> None:
    """What a test draws without a generator does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training runs write a checkpoint after every step."""
    from gramian.training import folder

    monkeypatch.setattr(folder, "EVERY_SECONDS", 0.0)
    monkeypatch.setattr(folder, "LARGEST_SHARE", float("inf"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of distribution come first, so that one of pytest-xdist's workers starts the ranks, and slow ones last.

    The zoo's mixture of experts has parameters of no known role, which optimizers warn of.
    """

    def place(item: pytest.Item) -> int:
        if hasattr(getattr(item, "module", None), "run_on_ranks"):
            return 0
        return 1 if item.get_closest_marker("slow") is None else 2

    items.sort(key=place)
    for item in items:
        if "mixture_of_experts" in item.name:
            item.add_marker(pytest.mark.filterwarnings("ignore:.*hidden parameters step by AdamW"))
