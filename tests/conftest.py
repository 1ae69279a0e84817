"""Under the tests, the jaxtyping signatures of the modules that take tensors are checked at run time by beartype."""

from jaxtyping import install_import_hook

CHECKED = (
    "block", "capturing", "compression", "init", "inspection", "linalg", "operators", "optim", "prox", "random",
    "statistics",
)  # fmt: skip

install_import_hook([f"gramian.{name}" for name in CHECKED], "beartype.beartype")
