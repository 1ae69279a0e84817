"""Under the tests, every jaxtyping signature of gramian is checked at run time by beartype."""

from jaxtyping import install_import_hook

install_import_hook("gramian", "beartype.beartype")
