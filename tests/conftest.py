"""Under the tests, the jaxtyping signatures of the modules that take tensors are checked at run time by beartype."""

import pytest
from jaxtyping import install_import_hook

CHECKED = (
    "block", "compression", "gram", "init", "inspection", "layers", "layout", "linalg", "operators", "optim", "prox",
    "random", "recording", "statistics",
)  # fmt: skip

install_import_hook([f"gramian.{name}" for name in CHECKED], "beartype.beartype")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The zoo's mixture of experts has parameters that no row of the table knows, which optimizers warn of."""
    for item in items:
        if "mixture_of_experts" in item.name:
            item.add_marker(pytest.mark.filterwarnings("ignore:.*hidden parameters step by AdamW"))
