"""What weights alone show: each planted trouble is found under its name, bad files give one line, ranks agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import gramian as gm
from gramian.checkpoint import save_tensors
from gramian.cli import main
from gramian.inspection.weights import of_files
from gramian.inspection.weights.matrix_rows import report_row
from gramian.inspection.weights.noise import Noise
from gramian.inspection.weights.spectra import describe
from gramian.report import Report


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def healthy(num_layers: int = 10) -> dict[str, torch.Tensor]:
    """Layers with structure: noise, and two directions above it."""
    tensors = {}
    for i in range(num_layers):
        spikes = normal(64, 2, seed=100 + i) @ normal(2, 64, seed=200 + i)
        tensors[f"layers.{i}.w.weight"] = normal(64, 64, seed=i) * 0.1 + 0.05 * spikes
    return tensors


def scaled(tensors: dict, name: str, factor: float) -> dict:
    return tensors | {name: tensors[name] * factor}


NAME = "layers.3.w.weight"
TROUBLES = {
    "unusual-size": lambda: scaled(healthy(), NAME, 50.0),
    "dominant-direction": lambda: healthy() | {NAME: normal(64, 64) * 0.01 + torch.ones(64, 64) * 0.1},
    "repeated-weights": lambda: healthy() | {NAME: healthy()["layers.1.w.weight"].clone()},
    "overflows-float16": lambda: healthy() | {NAME: healthy()[NAME] + 7e4 * (torch.arange(4096).view(64, 64) == 9)},
    "underflows-float16": lambda: scaled(healthy(), NAME, 1e-8),
    "many-zeros": lambda: healthy() | {NAME: healthy()[NAME] * (normal(64, 64, seed=7) > 0)},
    "like-noise": lambda: healthy() | {NAME: normal(64, 64) * 0.1},
    "rank-deficient": lambda: healthy() | {NAME: normal(64, 30) @ normal(30, 64, seed=1)},
    "factorable": lambda: healthy() | {NAME: normal(64, 10) @ normal(10, 64, seed=1)},
    "zero-weights": lambda: healthy() | {NAME: torch.zeros(64, 64)},
    "non-finite-weights": lambda: healthy() | {NAME: torch.full((64, 64), float("nan"))},
}  # fmt: skip


@pytest.mark.parametrize("code", TROUBLES)
def test_planted_trouble_is_found_where_it_is(tmp_path, code):
    save_file(TROUBLES[code](), tmp_path / "m.safetensors")
    report = gm.inspect(tmp_path / "m.safetensors")
    finding = next(f for f in report.findings if f.code == code)
    assert NAME in finding.where
    assert finding.evidence
    assert finding.cause
    assert Report.from_json(report.to_json()).layers == report.layers


def test_a_healthy_network_has_no_findings(tmp_path):
    save_file(healthy(), tmp_path / "m.safetensors")
    report = gm.inspect(tmp_path / "m.safetensors")
    assert not report.findings
    assert report.facts["matrices with structure above noise"] == "10 of 10"
    frame = report.to_dataframe()
    assert list(frame["above_noise"]) == [2] * 10


def test_a_tied_embedding_is_no_alarm(tmp_path):
    save_file({"embed.weight": normal(80, 32), "lm_head.weight": normal(80, 32)}, tmp_path / "m.safetensors")
    report = gm.inspect(tmp_path / "m.safetensors")
    assert [f.code for f in report.findings] == ["tied-weights"]
    assert report.status == "good"


def test_a_large_embedding_is_read_in_slices(tmp_path):
    w = torch.zeros(250_000, 8)
    w[:, 0] = 1.0
    w[:5000, 1] = torch.tensor([2.0, -2.0]).repeat(2500)
    save_file({"embed_tokens.weight": w}, tmp_path / "m.safetensors")
    layer = gm.inspect(tmp_path / "m.safetensors").layers[0]
    assert layer.spectral_norm == pytest.approx(250_000**0.5, rel=1e-5)
    assert layer.numerical_rank == 2


@pytest.mark.parametrize("quick", [False, True])
def test_names_with_html_are_escaped(tmp_path, quick):
    name = '<img src=x onerror="alert(1)">'
    save_file({f"{name}{i}": normal(20, 20, seed=i) for i in range(3)}, tmp_path / "m.safetensors")
    report = gm.inspect(tmp_path / "m.safetensors", quick=quick)
    report.save(tmp_path / "r.html")
    assert "<img src=x" not in (tmp_path / "r.html").read_text()


def sharded(folder: Path, files: dict[str, dict[str, torch.Tensor]]) -> Path:
    places = {}
    for file, tensors in files.items():
        save_file(tensors, folder / file)
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


BAD = {
    "truncated shard": (lambda folder: (folder / "b.safetensors").write_bytes(b"\x08\0\0"), "b.safetensors"),
    "missing shard": (lambda folder: (folder / "b.safetensors").unlink(), "files that are not there"),
    "index without a map": (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "index.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_shards_are_one_line(tmp_path, capsys, case):
    folder = sharded(tmp_path, {"a.safetensors": {"a": torch.eye(4)}, "b.safetensors": {"b": torch.eye(4)}})
    spoil, message = BAD[case]
    spoil(folder)
    assert main(["inspect", str(folder)]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gramian: ")]
    assert len(err) == 1
    assert message in err[0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["one", "--extract-lora", "4"], "needs --against"),
        (["one", "--against", "three"], "share no tensor"),
        (["one", "--layouts", "absent.json"], "cannot be read"),
        (["one", "--layouts", "bad.json"], "matches no matrix"),
        (["one", "--against", "four", "--extract-lora", "2", "--out", "absent/x"], "cannot write"),
    ],
)
def test_bad_options_are_one_line(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    w = {"a.weight": torch.eye(4)}
    for name, tensors in (("one", w), ("three", {"b": torch.eye(4)})):
        save_file(tensors, f"{name}.safetensors")
    save_file({"a.weight": normal(4, 4)}, "four.safetensors")
    (tmp_path / "bad.json").write_text('{"zzz": "o i -> o i"}')
    files = ("one", "three", "four")
    assert main(["inspect", *(f"{arg}.safetensors" if arg in files else arg for arg in args)]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gramian: ")]
    assert len(err) == 1
    assert message in err[0]


def test_the_command_compares_and_extracts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    base = healthy(3)
    save_file(base, "base.safetensors")
    save_file({k: v + 0.01 * normal(64, 3) @ normal(3, 64) for k, v in base.items()}, "tuned.safetensors")
    options = ["--against", "base.safetensors", "--extract-lora", "3", "--out", "lora", "--json", "r.json"]
    assert main(["inspect", "tuned.safetensors", *options]) == 0
    out = capsys.readouterr().out
    assert "rank-3 update" in out
    assert "Adapter of rank 3" in out
    assert max(len(line) for line in out.splitlines()) <= 80
    assert sorted(os.listdir("lora")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads(Path("r.json").read_text())["layers"][0]["relative_change"] > 0


def test_deep_names_stay_apart_in_80_columns(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"model.language_model.layers.{i}.self_attention.query_projection.weight" for i in range(12)]
    save_file({name: normal(20, 20, seed=i) for i, name in enumerate(names)}, tmp_path / "m.safetensors")
    assert main(["inspect", str(tmp_path / "m.safetensors"), "-q"]) == 0
    assert main(["inspect", str(tmp_path / "m.safetensors")]) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "20×20" in line]
    assert len(set(lines)) == 12


def test_what_ranks_send_each_other_arrives_bit_for_bit(monkeypatch):
    spectra = [describe(m) for m in (normal(80, 90), torch.zeros(3, 2), normal(4, 4) * float("inf"), normal(60, 5))]
    rows = {7 - i: [(report_row(f"é{i}", "Linear", "", s), s)] for i, s in enumerate(spectra)}
    monkeypatch.setattr(of_files.placement, "is_distributed", lambda: True)
    found = of_files._gather(rows)
    assert repr(found) == repr(rows)  # repr, since NaN differs from itself
    assert [type(s.noise) for _, s in found[7]] == [Noise]


@pytest.mark.slow
def test_ranks_share_the_work_and_agree(tmp_path):
    save_tensors(tmp_path / "m.safetensors", healthy(6) | {"big.weight": normal(300, 200)})
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, torch.distributed as dist, gramian as gm\n"
        "from gramian import placement\n"
        "dist.init_process_group('gloo', f'file://{sys.argv[2]}/meet', rank=int(sys.argv[3]), world_size=2)\n"
        "mine = placement.share_out([1.0] * 6 + [6.0])\n"
        "report = gm.inspect(sys.argv[1])\n"
        "open(f'{sys.argv[2]}/{dist.get_rank()}.json', 'w').write(report.to_json())\n"
        "open(f'{sys.argv[2]}/{dist.get_rank()}.mine', 'w').write(str(len(mine)))\n"
        "dist.destroy_process_group()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path / "m.safetensors"), str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)], env=environment) for rank in (0, 1)]
    assert [rank.wait(timeout=1000) for rank in ranks] == [0, 0]
    alone = gm.inspect(tmp_path / "m.safetensors")
    for rank in (0, 1):
        report = Report.from_json((tmp_path / f"{rank}.json").read_text())
        assert [layer.name for layer in report.layers] == [layer.name for layer in alone.layers]
        for a, b in zip(report.layers, alone.layers, strict=True):
            assert a.singular_values == pytest.approx(b.singular_values, rel=1e-9)
    assert sorted((tmp_path / f"{rank}.mine").read_text() for rank in (0, 1)) == ["1", "6"]


def test_directions_of_a_first_layer_are_images_and_of_an_embedding_tokens(tmp_path):
    picture = torch.zeros(8, 8)
    picture[2:4, 1:7] = 1.0
    save_file({"0.weight": torch.ones(20, 1) @ picture.view(1, 64) + 1e-3 * normal(20, 64)}, tmp_path / "m.safetensors")
    report = gm.inspect(tmp_path / "m.safetensors")
    image = torch.tensor(report.directions[0].image)
    assert float((image.abs() / image.norm() - picture / picture.norm()).abs().max()) < 1e-2
    report.save(tmp_path / "r.html")
    assert "Leading singular vectors" in (tmp_path / "r.html").read_text()

    folder = tmp_path / "hf"
    folder.mkdir()
    names = [f"<tok{i}>" for i in range(40)]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {name: i for i, name in enumerate(names)}}}))
    embedding = 1e-3 * normal(40, 16)
    embedding[7] += 5.0
    save_file({"embed.weight": embedding}, folder / "model.safetensors")
    report = gm.inspect(folder)
    assert "<tok7>" in {end[0] for end in report.directions[0].tokens}
    assert Report.from_json(report.to_json()).directions == report.directions
    report.save(tmp_path / "r.html")
    assert "<tok7>" not in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    "text", ["", "[]", '{"model": {"vocab": {"a": 999999999999}}}', '{"model": {"vocab": {"a": "b"}}}']
)
def test_a_broken_tokenizer_gives_no_tokens(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    save_file({"embed.weight": normal(40, 16)}, tmp_path / "model.safetensors")
    assert gm.inspect(tmp_path).directions == []


# ---- what is by design ----------------------------------------------------------------------------------------------


def uneven(kind: str, n: int, seed: int) -> torch.Tensor:
    """A matrix of full rank whose entries differ in size, so that the smallest singular values are far below rms."""
    if kind == "even":
        return normal(n, n, seed=seed)
    if kind == "rows":
        return normal(n, n, seed=seed) * torch.exp(2 * normal(n, 1, seed=seed + 1))
    if kind == "heavy tail":
        return normal(n, n, seed=seed) / normal(3, n, n, seed=seed + 1).square().mean(0).sqrt()  # Student, 3 degrees
    return 0.02 * normal(n, n, seed=seed) + normal(n, 1, seed=seed + 1) @ normal(1, n, seed=seed + 2)


@pytest.mark.parametrize("kind", ["even", "rows", "heavy tail", "one direction"])
@pytest.mark.parametrize("n", [64, 256])
def test_random_bfloat16_matrices_are_not_rank_deficient(tmp_path, kind, n):
    tensors = {f"w{k}.weight": uneven(kind, n, 10 * k).bfloat16() for k in range(4)}
    exact = [int(torch.linalg.matrix_rank(w.double())) for w in tensors.values()]
    assert exact == [n] * 4
    save_file(tensors, tmp_path / "m.safetensors")
    assert "rank-deficient" not in {f.code for f in gm.inspect(tmp_path / "m.safetensors").findings}


def test_the_rank_of_bfloat16_is_that_above_rounding():
    """Before, one floor for all ranks called two or three of 256 directions rounding in most random matrices."""
    ranks = [describe(normal(256, 256, seed=k).bfloat16()).numerical_rank for k in range(8)]
    assert sum(rank == 256 for rank in ranks) >= 6
    low = (normal(256, 200) @ normal(200, 256, seed=1)).bfloat16()
    assert describe(low).numerical_rank == 200


def adapter(folder: Path, b: float) -> Path:
    tensors = {}
    for k in range(3):
        start = f"base_model.model.layers.{k}.q_proj"
        tensors[f"{start}.lora_A.weight"] = normal(4, 64, seed=k)
        tensors[f"{start}.lora_B.weight"] = b * normal(64, 4, seed=10 + k)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    return folder


@pytest.mark.parametrize("b", [0.0, 1.0])
def test_the_products_of_an_adapter_have_the_rank_of_their_factors_by_design(tmp_path, b):
    report = gm.inspect(adapter(tmp_path, b))
    assert len(report.layers) == 3
    assert not report.findings
    assert any("has not been trained yet" in note for note in report.notes) == (b == 0)


class WithFactors(nn.Module):
    def __init__(self, trained: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(32, 32)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(32, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, 32, bias=False)})
        self.head = nn.Linear(32, 5)
        if not trained:
            nn.init.zeros_(self.lora_B["default"].weight)


@pytest.mark.parametrize("trained", [False, True])
def test_an_adapter_in_memory_may_start_at_zero(trained):
    report = gm.inspect(WithFactors(trained))
    assert "zero-weights" not in {f.code for f in report.findings}
    assert any("has not been trained yet" in note for note in report.notes) != trained


def severity(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> list[str]:
    save_file(tensors, tmp_path / "m.safetensors")
    return [f.severity for f in gm.inspect(tmp_path / "m.safetensors").findings if f.code == "zero-weights"]


def test_zero_is_a_warning_only_where_other_blocks_are_not_zero(tmp_path):
    blocks = {f"h.{k}.{part}.weight": normal(32, 32, seed=k) for k in range(4) for part in ("fc1", "fc2")}
    assert severity(tmp_path, blocks | {"classifier.weight": torch.zeros(5, 32)}) == ["info"]
    assert severity(tmp_path, blocks | {f"h.{k}.fc2.weight": torch.zeros(32, 32) for k in range(4)}) == ["info"]
    assert severity(tmp_path, blocks | {"pos_embed.weight": torch.zeros(50, 32)}) == ["info"]
    assert severity(tmp_path, blocks | {"h.2.fc2.weight": torch.zeros(32, 32)}) == ["warning"]
    assert severity(tmp_path, {name: torch.zeros(32, 32) for name in blocks}) == ["warning"]
