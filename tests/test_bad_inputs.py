"""Wrong flags, files, tasks and folders: each is one line, exit code 2, and changes nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import bad_inputs
from gramian.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bad")
    bad_inputs.make(place)
    return place


def content(folder: Path) -> dict[str, tuple[int, int]]:
    """What is in a folder: names, sizes and times, apart from what Python keeps of modules."""
    found = {}
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in (*folders, *files):
            about = os.lstat(os.path.join(place, name))
            found[os.path.join(place, name)] = (about.st_size, 0 if name in folders else about.st_mtime_ns)
    return found


def test_there_are_three_hundred_and_more() -> None:
    assert len(bad_inputs.CASES) > 600


NAMES = [pytest.param(name, marks=pytest.mark.slow if place % 4 else ()) for place, name in enumerate(bad_inputs.CASES)]


def check(folder: Path, capfd, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    before = content(folder)
    code = main(arguments)
    err = capfd.readouterr().err
    assert code == 2, err
    lines = [line for line in err.splitlines() if line.startswith("gramian: ")]
    assert len([line for line in lines if not line.startswith("gramian: warning")]) == 1, err
    assert "Traceback" not in err
    assert all(letter.isprintable() for letter in err.replace("\n", "").replace("\r", ""))
    assert content(folder) == before, "nothing is written"


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_input_is_one_line(folder: Path, capfd, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    check(folder, capfd, monkeypatch, list(bad_inputs.CASES[name]))


def test_a_bad_environment_is_one_line(folder: Path, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    for variables in bad_inputs.ENVIRONMENTS.values():
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            check(folder, capfd, patch, bad_inputs.train())
