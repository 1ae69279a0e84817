"""What is installed: it leaves an installed torch alone, begins quickly, and its README can be shown anywhere."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gramian as gm
from dist import LINK, absolute, tracked, with_urls

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_no_requirement_replaces_an_installed_version_by_an_older_one() -> None:
    project = tomllib.loads(PROJECT)["project"]
    required = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    pinned = [r for r in required if re.search(r"==|<|~=|!=", r)]
    assert pinned == []
    assert [r for r in required if r.startswith("torch>") or r == "torch"] == ["torch>=2.9"]


@pytest.mark.parametrize("code", ["import gramian", "from gramian.cli import main; main([]); main(['--help'])"])
def test_what_needs_no_torch_does_not_import_it(code: str) -> None:
    code += "; import sys; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


LIBRARIES = {"transformers", "accelerate", "lightning", "tensorboard", "wandb", "mlflow", "peft"}
UNWANTED = {
    "gramian.linalg, gramian.random": {"numpy", "scipy", "matplotlib", "mpmath"},
    "gramian.checkpoint": {"safetensors"},
    "gramian.optim": {*LIBRARIES, "matplotlib", "scipy"},
    "gramian.integrations": LIBRARIES,
}
"""What must not be loaded beside torch once these modules are, one after the other."""


def test_an_import_loads_nothing_that_it_does_not_need() -> None:
    lines = ["import sys, torch, jaxtyping, einops", "before = set(sys.modules)"]
    for modules in UNWANTED:
        lines += [f"import {modules}", "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    for (modules, unwanted), loaded in zip(UNWANTED.items(), done.stdout.splitlines(), strict=True):
        assert "gramian" in loaded.split()
        assert not unwanted & set(loaded.split()), modules


def test_a_released_readme_has_no_link_that_leads_nowhere() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = [match[3] for match in LINK.finditer(readme)]
    assert linked
    assert [path for path in linked if not (ROOT / path.partition("#")[0]).exists()] == []
    released = absolute(readme, "https://host/gramian", gm.__version__)
    assert LINK.search(released) is None
    assert f"https://host/gramian/blob/v{gm.__version__}/docs/" in released


def test_a_release_has_its_addresses() -> None:
    urls = tomllib.loads(with_urls(PROJECT, "https://host/gramian"))["project"]["urls"]
    assert urls["Homepage"] == "https://host/gramian"


def test_the_changelog_begins_with_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+?),? ", changelog, re.MULTILINE)[0] == gm.__version__


def test_the_floors_that_are_drawn_are_those_that_are_checked() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = page.partition("## Floors")[2].split("```")[1].strip("\n")
    floors: list[set[str]] = []
    for line in drawn.splitlines():
        names = set(re.split(" {3,}", line.strip())[0].split())
        floors = [*floors[:-1], floors[-1] | names] if line.startswith(" ") else [*floors, names]
    (contract,) = tomllib.loads(PROJECT)["tool"]["importlinter"]["contracts"]
    assert floors == [set(re.findall(r"\w+", layer)) for layer in contract["layers"]]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git knows which files are the project's")
def test_only_sources_are_in_the_repository() -> None:
    """What a run leaves behind, a model or its numbers, is none of the project's files."""
    kinds = {
        ".py",
        ".md",
        ".json",
        ".png",
        ".txt",
        ".css",
        ".yml",
        ".yaml",
        ".typed",
        ".toml",
        ".js",
        ".in",
        ".html",
        "",
    }
    assert not [name for name in tracked() if Path(name).suffix not in kinds]
