"""`python -m gramian`."""

from gramian.cli import program

program()
