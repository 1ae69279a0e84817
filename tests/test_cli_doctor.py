"""`gramian` alone shows what one can do, and `gramian doctor` what is installed."""

from __future__ import annotations

import importlib.util
import json
import shlex
import tomllib
from importlib import metadata
from pathlib import Path

from typer.main import get_command

import gramian as gm
from gramian.cli import WELCOME, app, main
from gramian.cli.doctor import EXTRAS


def test_the_welcome_shows_commands_that_exist_with_their_options(capsys) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"gramian {gm.__version__}")
    commands = get_command(app).commands
    shown = [shlex.split(line.partition(" gramian ")[2]) for line in WELCOME.splitlines()[2:-2]]
    assert {words[0] for words in shown} == {"inspect", "train", "compress", "demo", "doctor"}
    for name, *words in shown:
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options
        assert name != "train" or "--steps" in words, "train refuses to run without a budget"
    assert all(len(line) <= 80 for line in WELCOME.splitlines())


def test_every_command_has_a_line_that_fits(capsys) -> None:
    assert main(["--help"]) == 0
    assert "..." not in capsys.readouterr().out.partition("Commands:")[2]


def test_doctor_tells_versions_and_extras(capsys, tmp_path) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert gm.__version__ in out
    assert all(f"[{extra}]" in out for extra in EXTRAS)
    assert main(["doctor", "--json", str(tmp_path / "d.json")]) == 0
    for name in ("no/such/folder.json", "d.txt"):
        assert main(["doctor", "--json", str(tmp_path / name)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["torch"] == metadata.version("torch")
    for extra, (_, module, _) in EXTRAS.items():
        assert (found["extras"][extra] is not None) == (importlib.util.find_spec(module) is not None)


def test_the_extras_are_those_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for_developers = {"test", "families", "coverage", "lint", "bench", "docs"}
    assert set(EXTRAS) == set(project["optional-dependencies"]) - for_developers
