"""The examples of the integrations run as a user runs them; each checks that its loss halves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples" / "integrations"
LIBRARIES = {"trainer": "transformers", "lightning_module": "lightning", "accelerate_loop": "accelerate"}


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(LIBRARIES)


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARIES)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    pytest.importorskip(LIBRARIES[name])
    command = [sys.executable, str(FOLDER / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "→" in done.stdout.splitlines()[-1]
