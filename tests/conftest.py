"""Under the tests, the jaxtyping signatures of the modules that take tensors are checked at run time by beartype."""

from jaxtyping import install_import_hook

CHECKED = (
    "block", "compression", "gram", "init", "inspection", "layers", "layout", "linalg", "operators", "optim", "prox",
    "random", "recording", "statistics",
)  # fmt: skip

install_import_hook([f"gramian.{name}" for name in CHECKED], "beartype.beartype")
