"""A model in shards: compressed with one part in memory, it becomes what it does as a whole."""

from __future__ import annotations

import errno
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gramian as gm
from gramian.cli import main
from gramian.compression.sharded.holding import as_bytes
from gramian.compression.sharded.journal import Journal, Remaining
from gramian.compression.sharded.losses import loss_of
from gramian.compression.sharded.passing import Item
from gramian.compression.sharded.sharded_plan import was_stopped
from gramian.compression.sharded.shards import OUTSIDE, Shards
from gramian.compression.sharded.spool import Spool
from gramian.compression.sharded.streaming import compress_shards
from gramian.compression.sharded.sweeping import Sweep
from gramian.errors import CheckpointError, InputError, UnsupportedError
from gramian.recording.onepass import captured
from test_compress_command import classes, hf_folder, language

transformers = pytest.importorskip("transformers")

NEXT = gm.Objective.next_token()


def llama(**options) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(num_hidden_layers=2, vocab_size=50, **sizes, **options)
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50)).eval()


def saved(folder: Path, model: Any) -> Path:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder / "dense", max_shard_size="8KB")
    return folder / "dense"


def batches(num: int) -> list[dict[str, torch.Tensor]]:
    made = [
        {"input_ids": torch.randint(0, 50, (4, 7)), "attention_mask": torch.ones(4, 7, dtype=torch.long)}
        for _ in range(num)
    ]
    made[1]["attention_mask"][2, 4:] = 0
    return made


@pytest.mark.parametrize("make", [llama, gpt2])
def test_two_sweeps_give_the_second_moments_of_one_pass(tmp_path: Path, make) -> None:
    model, given = make(), batches(3)
    shards, spool = Shards(saved(tmp_path, model)), Spool()
    whole = captured(model, given, NEXT, generator=torch.Generator().manual_seed(1))
    sweep = Sweep(shards, spool, NEXT)
    items = [Item(str(i), batch) for i, batch in enumerate(given)]
    assert list(sweep.forward(items)) == [OUTSIDE, *shards.blocks]
    sweep.outputs(items, torch.Generator().manual_seed(1))
    found = {}
    asked = {part: whole.blocks.keys() for part in (OUTSIDE, *shards.blocks)}
    for _, _, stats in sweep.backward(items, [], 1, asked):
        assert (stats.units, stats.loss, stats.fisher) == (whole.units, pytest.approx(whole.loss), whole.fisher)
        found |= stats.blocks
    assert found.keys() == whole.blocks.keys()
    for name, sites in whole.blocks.items():
        assert [site.key for site in sites] == [site.key for site in found[name]]
        for one, other in zip(sites, found[name], strict=True):
            for a, b in ((one.A, other.A), (one.G, other.G)):
                assert a is not None
                assert b is not None
                for x, y in zip(a.tensors(), b.tensors(), strict=True):
                    torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-6 * float(x.abs().max()))
    assert all(p.is_meta for p in shards.model.parameters())
    assert len(list(spool.folder.iterdir())) == 2 * len(items)  # what blocks are called with, and what came back last


@pytest.mark.parametrize(("make", "num"), [(llama, 9), (gpt2, 4)])
def test_a_folder_becomes_what_the_model_becomes(tmp_path: Path, make, num: int) -> None:
    import gramian.integrations.compressed  # noqa: F401

    model, given = make(), batches(num)
    folder = saved(tmp_path, model)
    whole = gm.compress(model, given, NEXT, keep=0.7)
    plan: Any = gm.compress(folder, given, NEXT, keep=0.7)
    assert plan.ranks == whole.ranks
    assert plan.reasons == whole.reasons
    assert plan.parameters == whole.parameters < 0.7 * whole.parameters_dense
    assert [plan.at(0.5).ranks, plan.at(0.9).ranks] == [whole.at(0.5).ranks, whole.at(0.9).ranks]
    assert any(plan.ranks.values())
    gm.save_compressed(plan, tmp_path / "small")
    small = type(model).from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        wanted, dense = whole.apply()(**given[1]).logits, model(**given[1]).logits
        torch.testing.assert_close(small(**given[1]).logits, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
        assert (wanted - dense).abs().max() > 1e-3 * dense.abs().max()
    assert sum(p.numel() for p in small.parameters()) == plan.parameters
    sums = [NEXT.loss(whole.apply(), batch) for batch in given]
    mean = sum(float(loss.detach()) for loss, _ in sums) / sum(float(units) for _, units in sums)
    assert loss_of(tmp_path / "small", given, NEXT) == pytest.approx(mean, rel=1e-5)
    spool = plan.spool.folder
    assert spool.exists()
    with pytest.raises(CheckpointError, match="holds weights already"):
        gm.save_compressed(plan, tmp_path / "small")
    del plan
    assert not spool.exists()


def test_a_run_that_was_stopped_goes_on_after_the_parts_that_are_done(tmp_path: Path) -> None:
    folder, scratch = saved(tmp_path, llama()), tmp_path / "small"
    scratch.mkdir()
    given, asked = batches(3), [f"model.layers.{i}.mlp.{side}_proj" for i in (0, 1) for side in ("up", "down")]
    told: list[tuple[float, str]] = []

    def tell(stage: str, share: float, remark: str) -> None:
        if stage == "Factor":
            told.append((share, remark))
            if remark.startswith(asked[0]) and len(told) == 3:
                raise KeyboardInterrupt

    whole = compress_shards(folder, given, NEXT, include=asked)
    with pytest.raises(KeyboardInterrupt):
        compress_shards(folder, given, NEXT, include=asked, scratch=scratch, tell=tell)
    assert [remark.split(",")[0] for _, remark in told] == [*asked[2:], asked[0]]
    assert [share for share, _ in told] == [0.25, 0.5, 0.75]
    assert all(remark.endswith(" left") for _, remark in told)
    assert was_stopped(scratch)
    plan = compress_shards(folder, given, NEXT, include=asked, scratch=scratch, tell=tell)
    assert told[3] == (0.0, "2 of 4 layers were done before")
    assert [remark.split(",")[0] for _, remark in told[4:]] == asked[:2]
    assert plan.ranks == whole.ranks
    for one, other in zip(plan.spectra, whole.spectra, strict=True):
        assert torch.equal(one.values, other.values)
        left, right = (each.spool.get(f"factors.{one.name}") for each in (plan, whole))
        assert all(torch.equal(left[name], right[name]) for name in right)
    (scratch / "model-00001-of-00003.safetensors").write_bytes(b"half")  # as if it was stopped here
    plan.write(scratch)
    del plan
    assert not list(scratch.glob("gramian-*"))
    assert not was_stopped(scratch)


def test_the_time_that_is_left_counts_layers_and_what_lies_between_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 100.0, 110.0, 140.0, 240.0, 250.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    remaining = Remaining({"a": 1, "b": 3, "c": 1}, 2)
    remaining.begin()
    assert remaining.after("a") == (0.2, "2 min 20 s")  # 4 × 10 s, and 100 s between
    assert remaining.after("b") == (0.8, "1 min 50 s")
    remaining.begin()
    assert remaining.after("c") == (1.0, "0.0 s")


def test_what_is_done_of_another_run_does_not_count(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "x")
    Journal({"losses": [1.5, 2.0]}, ["block"]).save(spool)
    assert Journal.found(spool, {"losses": [1.5, 2.0]}).parts == ["block"]
    assert Journal.found(spool, {"losses": [1.5, 2.25]}).parts == []
    other = Spool(tmp_path, "x")  # in use, so one of its own
    assert other.folder != spool.folder
    place = spool.folder
    spool.keep()
    del spool
    assert place.exists()
    again = Spool(tmp_path, "x")
    assert again.folder == place
    again.path("journal").write_bytes(b"torn")
    assert Journal.found(again, {"losses": [1.5, 2.0]}).parts == []
    again.close()
    assert not place.exists()


def test_no_more_than_one_part_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path, llama())
    live: list[Any] = []
    most = 0

    def load(self: Shards, name: str, like: nn.Parameter) -> torch.Tensor:
        nonlocal most
        found = before(self, name, like)
        live.append(weakref.ref(found.untyped_storage()))
        most = max(most, sum(one.nbytes() for ref in live if (one := ref()) is not None))
        return found

    before = Shards._load
    monkeypatch.setattr(Shards, "_load", load)
    plan: Any = gm.compress(folder, batches(3), NEXT)
    gm.save_compressed(plan, tmp_path / "small")
    block = plan.shards.bytes(plan.shards.blocks[0])
    assert most <= plan.shards.bytes(OUTSIDE) + block  # both at the very beginning, to see how blocks are called
    spooled = {s.name: plan.spool.bytes(f"factors.{s.name}") for s in plan.spectra}
    assert sum(spooled.values()) < 4 * plan.parameters_dense + 1000 * len(spooled)  # less than the weights, and headers


def test_the_memory_is_told_and_batches_are_cut_to_fit_it(tmp_path: Path) -> None:
    folder, given = saved(tmp_path, llama()), batches(3)
    told: list[str] = []
    plan = compress_shards(folder, given, NEXT, tell=lambda stage, share, remark: told.append(remark))
    assert told[0].startswith("3 batches of at most 4, peak")
    largest = max(as_bytes(row["peak"]) for row in plan.told)
    assert f"{largest / 1e9:.2f} GB" in told[0]
    told.clear()
    with pytest.raises(InputError, match=r"compress: memory=1.0 MB is less than .* its weights .*, second moments"):
        gm.compress(folder, given, NEXT, memory="1MB")
    whole = gm.compress(folder, given, NEXT, memory="100 GB")
    assert whole.ranks == plan.ranks
    assert [as_bytes(text) for text in (7, "2 MiB", "1.5kb")] == [7, 2 * 2**20, 1500]
    for wrong in ("four", "-1", 0, "1XB"):
        with pytest.raises(InputError, match="memory must be"):
            as_bytes(wrong)


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, scratch = saved(tmp_path, llama()), tmp_path / "scratch"
    scratch.mkdir()

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(CheckpointError, match=r"could not be written.*No space left"):
            gm.compress(folder, batches(3), NEXT, scratch=scratch)
    assert not list(scratch.iterdir())
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="free, and what waits there takes"):
        gm.compress(folder, batches(3), NEXT, scratch=scratch)


def test_what_cannot_be_read_by_blocks_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, llama())
    plan = gm.compress(folder, batches(3), NEXT)
    with pytest.raises(InputError, match="give keep"):
        plan.at(bits=4)
    with pytest.raises(InputError, match=r"gm.save_compressed\(plan, folder\)"):
        plan.apply()
    with pytest.raises(InputError, match="in place of the model"):
        gm.compress(llama(), batches(3), NEXT, memory="1GB")
    with pytest.raises(InputError, match="a folder needs batches and an objective"):
        gm.compress(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="hold no model"):
        gm.compress(folder, batches(3), NEXT)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UnsupportedError, match=r"is quantized \(gptq\)"):
        gm.compress(folder, batches(3), NEXT)
    two = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2, vocab_size=50, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(two).save_pretrained(tmp_path / "t5")
    pairs = [{"input_ids": torch.randint(1, 50, (2, 5)), "labels": torch.randint(1, 50, (2, 5))}] * 3
    with pytest.raises(UnsupportedError, match="Load it with from_pretrained"):
        gm.compress(tmp_path / "t5", pairs, gm.Objective.classification())


def test_the_command_with_a_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    hf_folder(tmp_path, language)
    args = ["compress", "hf", "--calibrate", "texts.txt", "--keep", "0.8", "--memory", "64GB", "--out"]
    assert main([*args, "small", "--json", "x.json"]) == 0
    told = json.loads((tmp_path / "x.json").read_text())
    dense, small = told["contenders"]
    assert dense["quality"] < small["quality"] < dense["quality"] + 1
    assert any("allowed 64GB, expected" in note for note in told["notes"])
    names = {file.name for file in (tmp_path / "small").iterdir()}
    assert {"config.json", "report.html", "tokenizer.json", "model.safetensors.index.json"} <= names
    assert not any(name.startswith("gramian-") for name in names)
    import gramian.integrations.compressed  # noqa: F401

    loaded = transformers.AutoModelForCausalLM.from_pretrained("small")
    assert sum(p.numel() for p in loaded.parameters()) == small["parameters"]
    capsys.readouterr()
    assert main([*args, "other", "--bits", "4"]) == 2
    assert "--memory takes --calibrate and --keep" in capsys.readouterr().err
    (tmp_path / "hf").rename(tmp_path / "old")
    hf_folder(tmp_path, classes)
    assert main([*args, "other"]) == 2
    assert "does not predict the next token" in capsys.readouterr().err
