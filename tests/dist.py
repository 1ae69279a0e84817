"""Builds the source distribution and the wheel in dist/, and tries both as a user does: `make dist`.

`make dist URL=https://…` is for a release: the package index shows the README, where links that are relative to the
repository lead nowhere. So they become links into the repository at that address, and the address is among the
project's. Needs `build`; what is tried is installed into new environments, of the Python that runs this.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
DATA = {".py", ".typed", ".html", ".css", ".js"}  # what a package may hold
URLS = {
    "Homepage": "",
    "Documentation": "/tree/main/docs",
    "Changelog": "/blob/main/CHANGELOG.md",
    "Issues": "/issues",
}
LINK = re.compile(r"(!?)(\[[^\]]*\])\((?!https?://|#)([^)\s]+)\)")


def absolute(readme: str, url: str, version: str) -> str:
    """The README with links into the repository at an address; pictures are linked as files.

    >>> absolute("[a](docs/a.md) ![b](b.png) [c](https://c)", "https://host/o/gramian", "1.0")
    '[a](https://host/o/gramian/blob/v1.0/docs/a.md) ![b](https://host/o/gramian/raw/v1.0/b.png) [c](https://c)'
    """
    return LINK.sub(lambda m: f"{m[1]}{m[2]}({url}/{'raw' if m[1] else 'blob'}/v{version}/{m[3]})", readme)


def with_urls(project: str, url: str) -> str:
    """The project's description with its addresses."""
    lines = "".join(f'{name} = "{url}{path}"\n' for name, path in URLS.items())
    return project.replace("[project.scripts]", f"[project.urls]\n{lines}\n[project.scripts]")


def call(*command: object, code: int = 0, where: Path = ROOT) -> str:
    """What a command prints; its exit code has to be `code`."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=where, check=False)
    if done.returncode != code:
        sys.exit(
            f"{' '.join(map(str, command))}: exit code {done.returncode}, wanted {code}\n{done.stdout}{done.stderr}"
        )
    return done.stdout + done.stderr


def tracked() -> list[str]:
    """The files that git knows: what lies about besides is no part of a distribution."""
    return call("git", "ls-files").splitlines()


def build(folder: Path, url: str) -> tuple[Path, Path]:
    """The source distribution of what git tracks, and the wheel that is built from it."""
    copy = folder / "copy"
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    if url:
        version = re.findall(r'__version__ = "(.+)"', (copy / "src/gramian/__init__.py").read_text())[0]
        (copy / "README.md").write_text(absolute((copy / "README.md").read_text(), url, version))
        (copy / "pyproject.toml").write_text(with_urls((copy / "pyproject.toml").read_text(), url))
    call(sys.executable, "-m", "build", "--outdir", folder / "dist", copy)
    return next((folder / "dist").glob("*.tar.gz")), next((folder / "dist").glob("*.whl"))


def check_files(sdist: Path, wheel: Path) -> None:
    """Nothing is missing and nothing stray."""
    with zipfile.ZipFile(wheel) as archive:
        names = [PurePosixPath(name) for name in archive.namelist()]
    stray = [str(n) for n in names if n.parts[0] != "gramian" and not n.parts[0].endswith(".dist-info")]
    stray += [str(n) for n in names if n.parts[0] == "gramian" and n.suffix not in DATA]
    assert not stray, f"stray files in the wheel: {stray}"
    package = {name.removeprefix("src/") for name in tracked() if name.startswith("src/gramian/")}
    assert package <= {str(n) for n in names}, f"missing in the wheel: {package - {str(n) for n in names}}"
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {name for name in tracked() if not name.startswith(".")}
    assert wanted <= inside, f"missing in the source distribution: {wanted - inside}"


def check_use(wheel: Path, folder: Path, torch: str) -> None:
    """The wheel in a new environment leaves the torch that is there, and works without extras."""
    venv.create(folder / "env", with_pip=True)
    programs = folder / "env" / ("Scripts" if sys.platform == "win32" else "bin")
    python, gramian = programs / "python", programs / "gramian"
    install = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    call(*install, torch)
    asked = "import importlib.metadata as m; print(m.version('torch'))"
    before = call(python, "-c", asked)
    call(*install, wheel)
    assert call(python, "-c", asked) == before, "torch was replaced"
    empty = folder / "empty"
    empty.mkdir()
    for words in ("", "--help", "--version", "doctor"):
        call(gramian, *words.split(), where=empty)
    told = call(gramian, "demo", where=empty, code=2)
    assert "pip install 'gramian[tasks]'" in told, told
    assert len(told.splitlines()) == 1, told
    script = "import gramian as gm, torch; m = torch.nn.Linear(8, 8); gm.inspect(m).save('r.html'); print(gm.blocks(m))"
    call(python, "-c", script, where=empty)
    assert [path.name for path in empty.iterdir()] == ["r.html"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="", help="The repository's address, for a release.")
    parser.add_argument("--torch", default="torch", help="The torch that is there before.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sdist, wheel = build(folder, options.url.rstrip("/"))
        check_files(sdist, wheel)
        check_use(wheel, folder, options.torch)
        (ROOT / "dist").mkdir(exist_ok=True)
        for file in (sdist, wheel):
            shutil.copy2(file, ROOT / "dist")
            print(f"dist/{file.name}  {file.stat().st_size / 1024:,.0f} KiB")


if __name__ == "__main__":
    main()
