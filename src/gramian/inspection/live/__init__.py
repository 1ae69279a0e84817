"""`watch`: the checks of `inspect` inside the user's own training loop."""
