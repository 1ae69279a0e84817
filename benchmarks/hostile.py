"""Files that an attacker makes: what `gramian inspect` does with each, in how many seconds and how much memory.

    python benchmarks/hostile.py

Each is made here, and read by a process of its own, which is forked when Python, torch and gramian are loaded. The
seconds are those of the CPU for the file alone; the memory is the peak of the whole process. The result is a table in
Markdown. docs/measured/train.md quotes it.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from gramian.checkpoint.budgets import MOST_TENSORS
from gramian.cli import main

LIMIT_SECONDS, LIMIT_MB = 5.0, 500.0


def archive(pickled: bytes, how: int = zipfile.ZIP_STORED) -> bytes:
    """A file as `torch.save` writes it, around a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", how) as made:
        made.writestr("m/data.pkl", pickled)
        made.writestr("m/byteorder", "little")
        made.writestr("m/version", "3\n")
    return buffer.getvalue()


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def doubled(levels: int, tensor: bool) -> object:
    """Dicts that hold the next one twice: 2 ** levels names."""
    tree: object = {"w": torch.ones(4, 4)} if tensor else {}
    for _ in range(levels):
        tree = {"a": tree, "b": tree}
    return tree


def itself() -> object:
    tree: dict[str, object] = {"w": torch.ones(4, 4)}
    tree["model"] = tree["state_dict"] = tree["again"] = tree
    return tree


def nested(levels: int) -> bytes:
    return b"\x80\x02" + b"}X\x01\0\0\0a" * levels + b"}" + b"s" * levels + b"."


def copies(of: str, length: int, count: int) -> bytes:
    """A list of `length`, of which `count` copies are made by calls that copy: a square of the pickle's length."""
    module, name = of.rsplit(".", 1)
    start = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"q\x00" + b"](" + b"K\x01" * length + b"eq\x01("
    pairs = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"q\x00" + b"](" + b"K\x01K\x01\x86" * length + b"eq\x01("
    return (pairs if "Dict" in name or "dict" in name else start) + b"h\x00h\x01\x85R" * count + b"t."


def zeros_of_strides() -> bytes:
    return saved({"w": torch.zeros(1).expand(200_000, 200_000), "v": torch.ones(4, 4)})


def bomb() -> bytes:
    """Two gigabytes of pickle in two megabytes of zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as made:
        with made.open("m/data.pkl", "w", force_zip64=True) as member:
            member.write(b"\x80\x02")
            for _ in range(2048):
                member.write(b"]" * (1 << 20))
            member.write(b".")
        made.writestr("m/version", "3\n")
    return buffer.getvalue()


def header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def vector() -> bytes:
    """A safetensors header that claims four terabytes."""
    return header(b'{"w":{"dtype":"F32","shape":[1048576,1048576],"data_offsets":[0,4398046511104]}}') + bytes(1500)


def shared_by_many() -> dict[str, object]:
    """A dict without tensors under many names: a search of each would take the square of its length."""
    empty: dict[str, object] = {str(i): {} for i in range(30_000)}
    return {str(i): empty for i in range(30_000)}


def views(count: int) -> dict[str, torch.Tensor]:
    return {f"w{i}": shared[: i % 7 + 1] for i in range(count)}


def row(name: object) -> bytes:
    return b'"%b":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % str(name).encode()


CASES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "an ordinary file": ("m.pt", lambda: saved({"w": torch.ones(4, 4)})),
    "2²⁴ names in 2 kB": ("m.pt", lambda: saved(doubled(24, True))),
    "2²⁴ names of nothing": ("m.pt", lambda: saved(doubled(24, False))),
    "a state dict that contains itself": ("m.pt", lambda: saved(itself())),
    "strides of zero that claim 160 GB": ("m.pt", zeros_of_strides),
    "20,000 nested levels": ("m.pt", lambda: archive(nested(20_000))),
    "20,000 nested levels, a bare pickle": ("m.pkl", lambda: nested(20_000)),
    "2 GB of pickle in 2 MB of zip": ("m.pt", bomb),
    "20,000 copies of a list of 100,000": ("m.pt", lambda: archive(copies("builtins.list", 100_000, 20_000))),
    "20,000 copies of a set": ("m.pt", lambda: archive(copies("builtins.set", 100_000, 20_000))),
    "20,000 copies of a shape": ("m.pt", lambda: archive(copies("torch.Size", 100_000, 20_000))),
    "20,000 copies of an ordered dict": ("m.pt", lambda: archive(copies("collections.OrderedDict", 30_000, 20_000))),
    "an array of 10¹² bytes": (
        "m.pt",
        lambda: archive(b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\0\x10\xa5\xd4\xe8\0\x85R."),
    ),
    "ten million instructions": ("m.pt", lambda: archive(b"\x80\x02" + b"N0" * 5_000_000 + b"}.")),
    "a name of 1 MB before 50,000 others": (
        "m.pt",
        lambda: saved({"n" * (1 << 20): dict.fromkeys(map(str, range(50_000)), shared)}),
    ),
    "a dict of nothing under 30,000 names": ("m.pt", lambda: saved(shared_by_many() | {"w": shared})),
    "the same beside a model": ("m.pt", lambda: saved(shared_by_many() | {"model": {"w": shared}})),
    "a vector of 4 TB in 1.5 kB": ("m.safetensors", vector),
    "20,000 nested levels of JSON": ("m.safetensors", lambda: header(b"[" * 20_000 + b"]" * 20_000)),
    "a name of 450,000 parts": ("m.safetensors", lambda: header(b"{" + row("a." * 450_000) + b"}")),
    "a header of 300,000 names": (
        "m.safetensors",
        lambda: header(b"{" + b",".join(map(row, range(300_000))) + b"}"),
    ),
    "a storage that 50,000 tensors share": ("m.pt", lambda: saved(views(50_000))),
    "as many tensors as a file may name": ("m.pt", lambda: saved(views(MOST_TENSORS))),
    "as many names as a header may have": (
        "m.safetensors",
        lambda: header(b"{" + b",".join(map(row, range(MOST_TENSORS))) + b"}"),
    ),
}

shared = torch.ones(8)


def measured(path: Path) -> tuple[float, float, int, str]:
    """CPU seconds, the peak in MB, the exit code and the last line of `gramian inspect`, in a process of its own."""
    read, write = os.pipe()
    number = os.fork()
    if number == 0:
        # Bounds, so that a file that succeeds does no harm to this machine.
        resource.setrlimit(resource.RLIMIT_CPU, (15, 15))
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        os.dup2(write, 2)
        code = 3
        try:
            code = main(["inspect", str(path), "--quiet"])
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    with os.fdopen(read, errors="replace") as stream:
        text = stream.read()
    _, status, usage = os.wait4(number, 0)
    lines = text.strip().splitlines()
    told = lines[-1] if lines else ""
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, os.waitstatus_to_exitcode(status), told


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    only = parser.parse_args().only
    print("| file | bytes | CPU s | MB | exit code | what it says |\n|-|-|-|-|-|-|")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.pt")
        path.write_bytes(saved({"w": torch.ones(4, 4)}))
        main(["inspect", str(path), "--quiet"])  # what it imports is loaded before the processes are forked
    own = resource.getrusage(resource.RUSAGE_SELF)
    print(f"| Python, torch and gramian alone | | {own.ru_utime + own.ru_stime:.1f} | {own.ru_maxrss / 1024:.0f} | | |")
    bad = count = 0
    for name, (file, make) in CASES.items():
        if only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, file)
            path.write_bytes(make())
            size = path.stat().st_size
            seconds, memory, code, told = measured(path)
        over = seconds > LIMIT_SECONDS or memory > LIMIT_MB or code not in (0, 2)
        bad, count = bad + over, count + 1
        told = told.replace(folder + "/", "").replace("|", "\\|")[:120]
        print(f"| {name} | {size:,} | {seconds:.1f} | {memory:.0f} | {code}{' **over**' * over} | {told} |", flush=True)
    print(f"\n{count} files, {bad} over {LIMIT_SECONDS:g} s or {LIMIT_MB:g} MB")


if __name__ == "__main__":
    run()
