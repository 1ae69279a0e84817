"""`gramian compress`: the target is met or refused with the best that was reached, and bad input is one clear line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import gramian as gm
from gramian.cli import main
from gramian.compression.choosing import searching, speeds
from gramian.compression.choosing.clock import Race, race
from gramian.compression.choosing.deciding import decide
from gramian.compression.choosing.measuring import in_bfloat16, in_int8, num_bytes
from gramian.compression.choosing.target import Target
from gramian.compression.layers.quantized import Quantized
from gramian.errors import InputError
from gramian.report import to_text
from gramian.report.compression import Outcome
from gramian.report.contenders import Contender, Ratio
from zoo import ZOO

TASK = """
import dataclasses
import torch
import gramian as gm
from torch import nn

X = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
Y = (X[:, :4].sum(1) > 0).long() + 2 * (X[:, 4] > 0).long()

def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 4))
    step = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(40):
        step.zero_grad()
        nn.functional.cross_entropy(net(X[:128]), Y[:128]).backward()
        step.step()
    return net

def evaluate(net):
    scores = net(X[128:])
    loss = nn.functional.cross_entropy(scores, Y[128:])
    return {"accuracy": float((scores.argmax(-1) == Y[128:]).float().mean()), "loss": float(loss)}

def task():
    return gm.Task(model, gm.Objective.classification(), [(X[:128], Y[:128])], evaluate)

def but(**changes):
    return dataclasses.replace(task(), **changes)

def accuracy():
    return but(evaluate=lambda net: {"accuracy": evaluate(net)["accuracy"]})

def untrained():
    return but(model=lambda: nn.Sequential(nn.Linear(16, 4)))

def vectors():
    return but(model=lambda: nn.Sequential(nn.LayerNorm(16)))

def other_inputs():
    return but(model=lambda: nn.Sequential(nn.Linear(17, 4)))

def vector():
    return but(objective=lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1], reduction="none"))

class Unreached(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.bias = nn.Linear(16, 4), nn.Parameter(torch.zeros(4))
    def forward(self, x):
        return self.layer(x) if x.mean() > 100 else self.bias + x[:, :4]

def unreached():
    return but(model=Unreached)

def broken():
    return but(train_batches=[(torch.where(torch.arange(16) == 3, torch.nan, X[:128]), Y[:128])])

def silent():
    return but(evaluate=lambda net: {})

def undefined():
    return but(evaluate=lambda net: {"accuracy": float("nan")})

def thin():
    return but(model=lambda: nn.Sequential(nn.Linear(16, 1), nn.Linear(1, 4)))
"""


def quick(models, call, batch, seconds=0.0) -> Race:
    return race(models, call, batch, 0.0)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "task.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speeds, "race", quick)
    return tmp_path


def run(capsys, *args: str) -> tuple[int, str, str]:
    code = main(["compress", *args])
    out = capsys.readouterr()
    return code, out.out, out.err


def network(folder: Path):
    return gm.tasks.load(f"{folder}/task.py:task")


def test_a_share_is_kept_saved_and_told(folder, capsys) -> None:
    code, out, err = run(capsys, "task.py:task", "--keep", "0.5", "--out", "small", "--json", "x.json")
    assert code == 0, err
    assert {p.name for p in (folder / "small").iterdir()} == {"model.safetensors", "report.html", "report.json"}
    told = json.loads((folder / "x.json").read_text())
    assert told == json.loads((folder / "small/report.json").read_text())
    dense, small = told["contenders"][:2]
    assert small["parameters"] <= 0.5 * dense["parameters"]
    assert small["bytes"] == 4 * small["parameters"]
    assert [c["name"] for c in told["contenders"][2:4]] == ["bfloat16", "int8"]
    assert told["contenders"][2]["bytes"] == dense["bytes"] / 2
    task = network(folder)
    loaded = gm.load_compressed(nn.Sequential(*task.model()), folder / "small/model.safetensors").eval()
    assert task.evaluate(loaded)["accuracy"] == small["quality"]
    # The file is one that the other commands take with its task.
    assert main(["inspect", "small/model.safetensors", "--task", "task.py:task", "--quiet"]) == 0
    code, _, err = run(capsys, "small", "--task", "task.py:task", "--keep", "0.9", "--no-curve", "--quiet")
    assert code == 0, err
    assert told["better"] == "higher"
    assert small["others"].keys() == {"loss"}
    assert dense["others"]["loss"] == pytest.approx(task.evaluate(task.model())["loss"])
    shown = " ".join(out.split())
    assert "Ranks, and why" in shown
    assert f"of {dense['parameters']:,}" in shown
    page = (folder / "small/report.html").read_text()
    assert "Quality over size" in page
    assert "compressed, int8" in page


@pytest.mark.parametrize(("measure", "drop"), [("accuracy", 0.02), ("loss", 0.05), ("accuracy", 0.0)])
def test_a_floor_of_quality_is_met_and_not_by_much(folder, capsys, measure: str, drop: float) -> None:
    args = ["task.py:task", "--max-drop", str(drop), "--metric", measure, "--json", "x.json", "--quiet"]
    code, out, err = run(capsys, *args)
    assert (code, out, err) == (0, "", "")
    told = json.loads((folder / "x.json").read_text())
    sign = {"accuracy": 1, "loss": -1}[measure]
    assert told["better"] == {1: "higher", -1: "lower"}[sign]
    dense, small = (c["quality"] for c in told["contenders"][:2])
    assert sign * (dense - small) <= drop
    assert told["contenders"][1]["parameters"] < told["contenders"][0]["parameters"]
    # The next smaller share that was tried is worse than asked.
    below = [value for keep, value in told["curve"] if told["keep"] / 1.1 < keep < told["keep"]]
    assert all(sign * (dense - value) > drop for value in below[-1:])


@pytest.mark.parametrize(
    ("args", "form"),
    [
        (["--size", "0.25"], "bits"),
        (["--bits", "4"], "4 bits"),
        (["--keep", "0.6", "--bits", "8"], "8 bits"),
        (["--sparsity", "0.5"], "zeros"),
        (["--max-drop", "0.02", "--by", "bytes"], "bits"),
    ],
    ids=["size", "bits", "keep and bits", "sparsity", "fewest bytes"],
)
def test_other_forms_than_ranks_are_chosen_saved_and_told(folder, capsys, args: list[str], form: str) -> None:
    code, out, err = run(capsys, "task.py:task", *args, "--no-curve", "--out", "small", "--quiet")
    assert (code, out, err) == (0, "", "")
    told = json.loads((folder / "small/report.json").read_text())
    dense, small = told["contenders"][:2]
    assert any(form in layer["why"] for layer in told["layers"])
    assert not any(c["name"].startswith("compressed, int8") for c in told["contenders"]) or form == "zeros"
    assert "4 bits" in [c["name"] for c in told["contenders"]]
    if form == "zeros":
        assert small["bytes"] == dense["bytes"]
    else:
        assert small["bytes"] < 0.3 * dense["bytes"]
    if "--max-drop" in args:
        assert dense["quality"] - small["quality"] <= 0.02
        assert told["share_of"] == "bytes"
    task = network(folder)
    loaded = gm.load_compressed(nn.Sequential(*task.model()), folder / "small/model.safetensors").eval()
    assert task.evaluate(loaded)["accuracy"] == small["quality"]


NARROW = [["--keep", "0.5"], ["--max-drop", "0.02"]]


@pytest.mark.parametrize("target", NARROW, ids=["keep", "max-drop"])
def test_units_are_removed_saved_and_told(folder, capsys, target: list[str]) -> None:
    args = ["task.py:task", *target, "--narrow", "--out", "small", "--plan", "plan.safetensors"]
    code, out, err = run(capsys, *args)
    assert code == 0, err
    told = json.loads((folder / "small/report.json").read_text())
    dense, small = told["contenders"][:2]
    assert small["parameters"] < dense["parameters"]
    if "--keep" in target:
        assert small["parameters"] <= 0.5 * dense["parameters"]
    else:
        assert dense["quality"] - small["quality"] <= 0.02
    kept = {layer["name"]: layer["units"] for layer in told["layers"]}
    assert kept.keys() == {"0", "2", "4"}
    assert kept["0"] is None
    assert all(num < of == 48 for num, of in (kept["2"], kept["4"]))
    assert [c["name"] for c in told["contenders"]][2:] == [
        "bfloat16", "int8", "compressed, bfloat16", "compressed, int8",
    ]  # fmt: skip
    shown = " ".join(out.split())
    assert "by fewer heads, units and channels" in shown
    assert "Units, and why" in shown
    task = network(folder)
    loaded = gm.load_compressed(nn.Sequential(*task.model()), folder / "small/model.safetensors").eval()
    assert [type(layer) for layer in loaded] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert sum(p.numel() for p in loaded.parameters()) == small["parameters"]
    assert task.evaluate(loaded)["accuracy"] == small["quality"]
    # The narrower model is compressed further, and a plan of one kind is refused for the other.
    again = ["small", "--task", "task.py:task", "--keep", "0.9", "--no-curve", "--quiet"]
    assert run(capsys, *again) == (0, "", "")
    code, _, err = run(capsys, "task.py:task", "--keep", "0.9", "--plan", "plan.safetensors", "--quiet")
    assert code == 2
    assert "plan of gm.narrow. Add --narrow" in err


def test_a_narrower_model_is_faster_or_refused(folder, monkeypatch) -> None:
    monkeypatch.setattr(speeds, "race", by_size(9.0))
    task = network(folder)
    target = Target(speedup=1.6, narrow=True)
    made = decide(task.model(), task.batches(), task.objective, task.evaluate, target, curve=False)
    assert min(made.outcome.compressed.speed_one, made.outcome.compressed.speed_many).median >= 1.6  # type: ignore[type-var, union-attr]
    with pytest.raises(InputError, match=r"nothing makes this model 5× as fast .* the best is 4\.\d+× \("):
        decide(task.model(), task.batches(), task.objective, task.evaluate, Target(speedup=5.0, narrow=True))


@pytest.mark.parametrize(("args", "num"), [([], 128), (["--narrow"], None)], ids=["ranks", "narrow"])
def test_a_run_tells_how_many_samples_it_has_seen(
    folder, capsys, monkeypatch, args: list[str], num: int | None
) -> None:
    asked: list[int | None] = []

    def stopped(*_: object, trained_on: int | None = None, **__: object) -> None:
        asked.append(trained_on)
        raise InputError("seen")

    monkeypatch.setattr("gramian.compression.choosing.making.plan_for", stopped)
    assert main(["train", "task.py:accuracy", "--steps", "3", "--out", "run", "-q"]) == 0
    assert main(["compress", "run", "--task", "task.py:accuracy", "--keep", "0.6", *args]) == 2
    assert main(["compress", "task.py:task", "--keep", "0.6", *args]) == 2  # whose weights are of no run
    assert asked == [num, None]
    assert "seen" in capsys.readouterr().err


def test_a_plan_is_written_once_and_read(folder, capsys, monkeypatch) -> None:
    args = ["task.py:task", "--keep", "0.5", "--no-curve", "--plan", "plan.safetensors", "--quiet", "--json"]
    assert run(capsys, *args, "a.json")[0] == 0
    monkeypatch.setattr("gramian.compression.choosing.making.compress", None)  # would fail
    assert run(capsys, *args, "b.json")[0] == 0
    a, b = (json.loads((folder / name).read_text()) for name in ("a.json", "b.json"))
    assert (a["layers"], a["curve"]) == (b["layers"], b["curve"])
    code, _, err = run(capsys, "task.py:untrained", *args[1:], "c.json")
    assert code == 2, err
    assert "plan for another model" in err
    assert err.count("\n") == 1


BAD = {
    "no_target": (["task.py:task"], "or --keep with --bits; got none"),
    "two_targets": (["task.py:task", "--keep", "0.5", "--max-drop", "0.1"], "got --keep and --max-drop"),
    "keep_zero": (["task.py:task", "--keep", "0"], r"keep must be a share in (0, 1], got 0"),
    "keep_large": (["task.py:task", "--keep", "1.5"], r"keep must be a share in (0, 1], got 1.5"),
    "drop": (["task.py:task", "--max-drop", "-1"], "--max-drop must be a number of at least 0, got -1"),
    "no bits": (["task.py:task", "--bits", "9"], "bits must be from 2 to 8, got 9"),
    "no share": (["task.py:task", "--size", "1.2"], "size must be a share in (0, 1], got 1.2"),
    "no zeros": (["task.py:task", "--sparsity", "half"], "--sparsity is a share, as 0.5, or a pattern"),
    "no pattern": (["task.py:task", "--sparsity", "4:2"], "a pattern of zeros is like '2:4'"),
    "by alone": (["task.py:task", "--size", "0.5", "--by", "bytes"], "says what --max-drop makes small"),
    "narrow bits": (
        ["task.py:task", "--bits", "4", "--narrow"],
        "takes --keep, --max-drop or --speedup, and not --bits",
    ),
    "narrow bytes": (["task.py:task", "--max-drop", "1", "--narrow", "--by", "bytes"], "and not by bytes"),
    "narrow little": (["task.py:task", "--keep", "0.001", "--narrow"], "below the smallest possible"),
    "narrow none": (["task.py:untrained", "--keep", "0.5", "--narrow"], "nothing of Sequential can be removed"),
    "slower": (["task.py:task", "--speedup", "0.5"], "speedup must be above 1, got 0.5"),
    "too_small": (["task.py:task", "--keep", "0.01"], "the smallest possible keep is 0."),
    "no_layer": (["task.py:vectors", "--keep", "0.5"], "no layer of Sequential can be factored (it has no matrices)"),
    "other_inputs": (["task.py:other_inputs", "--keep", "0.5"], "Sequential fails on the first batch: RuntimeError"),
    "thin": (["task.py:thin", "--keep", "0.5"], "factors of its 1 × 16 matrix are no smaller than it"),
    "vector": (["task.py:vector", "--keep", "0.5"], "must return a scalar mean, got"),
    "unreached": (["task.py:unreached", "--keep", "0.5"], "no layer of Unreached can be factored (layer:"),
    "nan_rows": (["task.py:broken", "--keep", "0.5"], "the loss of batch 0 is nan"),
    "no_number": (["task.py:silent", "--keep", "0.5"], "evaluate must return numbers by name"),
    "nan_number": (["task.py:undefined", "--keep", "0.5"], "accuracy of the model as it came is nan"),
    "no_metric": (["task.py:task", "--keep", "0.5", "--metric", "f1"], "no 'f1'; choose one of accuracy, loss"),
    "other_file": (["other.safetensors", "--task", "task.py:task", "--keep", "0.5"], "does not fit Sequential"),
    "no_task": (["other.safetensors", "--keep", "0.5"], "--calibrate texts.txt"),
    "both": (["other.safetensors", "--task", "x", "--calibrate", "y", "--keep", "0.5"], "takes the place of a task"),
    "out_exists": (["task.py:task", "--keep", "0.5", "--out", "full"], "full exists already"),
    "out_of_the_kernel": (["task.py:task", "--keep", "0.5", "--out", "/proc/x"], "cannot write /proc/x"),
    "plan_of_the_kernel": (["task.py:task", "--keep", "0.5", "--plan", "/proc/x.y"], "cannot write /proc/x.y"),
    "out_nowhere": (["task.py:task", "--keep", "0.5", "--out", "a/b/c"], "does not exist. Create it first"),
    "json": (["task.py:task", "--keep", "0.5", "--json", "x.txt"], "ends in .json"),
    "no_config": (["full", "--calibrate", "task.py", "--keep", "0.5"], "no config.json there"),
    "plan": (["task.py:task", "--keep", "0.5", "--plan", "other.safetensors"], "not written by save_plan"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(folder, capsys, name: str) -> None:
    from gramian.checkpoint import save_tensors

    save_tensors(folder / "other.safetensors", nn.Linear(3, 3).state_dict())
    (folder / "full").mkdir()
    (folder / "full/file").touch()
    args, message = BAD[name]
    code, out, err = run(capsys, *args, "--quiet")
    assert code == 2, err
    assert out == ""
    assert err.startswith("gramian: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_floor_that_no_share_meets_is_refused_with_the_best(folder) -> None:
    task = network(folder)
    plan = gm.compress(task.model(), batches=task.batches(), objective=task.objective)
    calls = []

    def evaluate(model: nn.Module) -> dict[str, float]:  # anything less than the whole is worthless
        calls.append(model)
        return {"score": float(sum(p.numel() for p in model.parameters()) == plan.parameters_dense)}

    tried = searching.judged(plan, evaluate)
    assert tried.quality.sign == 1
    with pytest.raises(InputError, match=r"no share below 1 loses at most 0\.5 of score; keeping 0\.9\d\d loses 1"):
        searching.by_drop(tried, 0.5)
    assert len(calls) == 2 + searching.HALVINGS


def test_a_measure_that_never_moves_tells_nothing(folder) -> None:
    task = network(folder)
    made = decide(task.model(), task.batches(), task.objective, lambda m: {"score": 1.0}, Target(keep=0.5), curve=False)
    assert made.outcome.better == made.outcome.advice == ""
    assert "tells nothing" in made.outcome.notes[0]
    assert made.outcome.to_document().status == "warning"


def by_size(half: float, int8: float = 9.0):
    """Races as if a pass took a millisecond, and one for each thousand parameters; and those of the other forms."""

    def timed(models, call, batch, seconds=0.5) -> Race:
        taken = {}
        for name, model in models.items():
            parameters = list(model.parameters())
            cost = 1.0 + sum(p.numel() for p in parameters) / 1000
            if any(p.dtype == torch.bfloat16 for p in parameters):
                cost = half
            taken[name] = [1e-3 * (int8 if any(isinstance(m, Quantized) for m in model.modules()) else cost)] * 8
        return Race(taken, taken, taken)

    return timed


def test_a_speed_is_met_by_the_largest_share_that_reaches_it(folder, monkeypatch) -> None:
    monkeypatch.setattr(speeds, "race", by_size(9.0))
    task = network(folder)
    made = decide(task.model(), task.batches(), task.objective, task.evaluate, Target(speedup=1.6), curve=False)
    small = made.outcome.compressed
    assert min(small.speed_one.median, small.speed_many.median) >= 1.6  # type: ignore[union-attr]
    larger = made.plan.at(keep=made.outcome.keep * 1.1).apply()
    assert speeds.Speeds(task.model(), task.objective, task.batches()[0], 32).ratio(larger).median < 1.6
    assert not made.outcome.notes


@pytest.mark.parametrize(
    ("half", "told"), [(7.0, "; bfloat16: 0.6"), (0.5, "Do not factor this model; use bfloat16, which")]
)
def test_a_speed_out_of_reach_is_refused_with_what_is_best(folder, capsys, monkeypatch, half: float, told: str) -> None:
    monkeypatch.setattr(speeds, "race", by_size(half))
    code, _, err = run(capsys, "task.py:task", "--speedup", "3.5", "--out", "x", "--quiet")
    assert code == 2, err
    assert err.count("\n") == 1
    assert "the best is 3.3" in err
    assert told in err
    assert ("With --narrow" in err) == ("Do not factor" not in err)
    assert not (folder / "x").exists()


def test_a_noisy_speed_is_measured_again(folder) -> None:
    """The first figure of every share is lucky; only the second counts."""
    task = network(folder)
    plan = gm.compress(task.model(), batches=task.batches(), objective=task.objective)
    seen: dict[int, int] = {}

    def speed(model: nn.Module) -> Ratio:
        count = sum(p.numel() for p in model.parameters())
        seen[count] = seen.get(count, 0) + 1
        ratio = plan.parameters_dense / count * (1.5 if seen[count] == 1 else 1.0)
        return Ratio(ratio, 0.95 * ratio, 1.05 * ratio)

    keep = searching.by_speed(plan, speed, 2.0, lambda keep, ratio: None)
    assert plan.at(keep=keep).parameters <= plan.parameters_dense / 2


def test_a_speed_whose_interval_holds_1_is_not_reached(folder) -> None:
    task = network(folder)
    plan = gm.compress(task.model(), batches=task.batches(), objective=task.objective)
    with pytest.raises(searching.TooSlowError, match=r"no difference seen \(0\.90–5\.00\)"):
        searching.by_speed(plan, lambda model: Ratio(2.5, 0.9, 5.0), 2.0, lambda keep, ratio: None)


def test_only_layers_that_are_faster_are_factored_for_speed(folder, monkeypatch) -> None:
    """The middle layer's factors are faster up to rank 7, those of the others are not."""

    def timed(models, call, batch, seconds=0.5) -> Race:
        taken = {}
        for name, model in models.items():
            cost = 10.0
            for layer in model.modules():
                if isinstance(layer, gm.compression.LowRank):
                    cost += -4.0 if layer.out_features == layer.in_features == 48 and layer.rank <= 7 else 3.0
            taken[name] = [cost] * 8
        return Race(taken, taken, taken)

    monkeypatch.setattr(speeds, "race", timed)
    task = network(folder)
    made = decide(task.model(), task.batches(), task.objective, task.evaluate, Target(speedup=1.2), curve=False)
    assert made.plan.ranks == {"2": 7}
    assert "not measured to be faster" in made.plan.reasons["0"]
    monkeypatch.setattr(speeds, "race", by_size(9.0, 9.0))
    none = decide(task.model(), task.batches(), task.objective, task.evaluate, Target(speedup=1.2), curve=False)
    assert len(none.plan.ranks) == 3


def test_encoder_layers_that_lose_the_fused_kernel_are_told(folder) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, dropout=0.0)
    net = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(128, 4))
    x = torch.randn(64, 4, 32)
    batches = [(x, torch.arange(64) % 4)]
    score = {"score": lambda m: float(m(x).square().mean())}
    objective = gm.Objective.classification()

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {name: one(model) for name, one in score.items()}

    made = decide(net, batches, objective, evaluate, Target(keep=0.5), curve=False)
    assert any("2 of 2 nn.TransformerEncoderLayer lose torch's fused" in note for note in made.outcome.notes)


def outcome(*contenders: Contender, better: str = "higher") -> Outcome:
    return Outcome("net", "keep 60 %", "accuracy", better, 0.6, contenders, ((1.0, 0.9),), (), 32, 0.1, 1.0)


FASTER, SAME, SLOWER, UNSEEN = Ratio(1.2, 1.1, 1.3), Ratio(1, 0.98, 1.02), Ratio(0.7, 0.6, 0.8), Ratio(1, 0.5, 2)
DENSE = Contender("dense", 1000, 4000, 0.9, 2.0, 20.0)
SMALL = Contender("compressed", 600, 2400, 0.88, 1.5, 15.0, Ratio(1.33, 1.2, 1.4), Ratio(1.05, 0.9, 1.1))


def other(name: str, size: int, quality: float, one: Ratio = FASTER, many: Ratio = SAME) -> Contender:
    return Contender(name, 1000, size, quality, 1.0, 9.0, beside_one=one, beside_many=many)


ADVICE = {
    "better": ([other("bfloat16", 2000, 0.9)], "use bfloat16 instead: smaller, no worse and no slower"),
    "three": (
        [other("bfloat16", 2000, 0.9), other("int8", 1000, 0.9), other("4 bits", 500, 0.88)],
        "use bfloat16, int8 or 4 bits instead: smaller, no worse and no slower",
    ),
    "slower": (
        [other("bfloat16", 2000, 0.9, SLOWER, FASTER), other("int8", 1000, 0.9, SLOWER, SLOWER)],
        "smaller and no worse: bfloat16 (slower at batch 1, faster at batch 32); "
        "int8 (slower at batch 1 and at batch 32)",
    ),
    "slower at many": (
        [other("bfloat16", 2000, 0.9, SAME, SLOWER), other("int8", 1000, 0.9, UNSEEN, SLOWER)],
        "smaller and no worse: bfloat16 or int8 (slower at batch 32)",
    ),
    "unseen": (
        [other("bfloat16", 2000, 0.9, UNSEEN), other("int8", 1000, 0.9, SLOWER)],
        "consider bfloat16: smaller, no worse, and not seen to be slower",
    ),
    "worse": ([other("int8", 1000, 0.5)], ""),
    "larger": ([other("int8", 3000, 0.9)], ""),
    "unknown": ([Contender("int8", None, None, None, note="failed")], ""),
}


def test_where_speed_is_asked_an_alternative_need_not_be_smaller() -> None:
    large = other("bfloat16", 2500, 0.9)
    assert outcome(DENSE, SMALL, large).advice == ""
    fast = dataclasses.replace(outcome(DENSE, SMALL, large), speedup=1.2)
    assert fast.advice == "use bfloat16 instead: no worse and no slower"


def test_the_sign_before_a_verdict_is_of_what_was_asked() -> None:
    """A form that serves better, or a note, is told beside a target that is met, and is no warning."""
    better = outcome(DENSE, SMALL, other("bfloat16", 2000, 0.9))
    cases = [
        (better, "warning"),
        (outcome(DENSE, SMALL), "good"),
        (dataclasses.replace(outcome(DENSE, SMALL), notes=("few samples",)), "warning"),
        (dataclasses.replace(better, max_drop=0.03, notes=("few samples",)), "good"),
        (dataclasses.replace(better, max_drop=0.01), "warning"),
        (dataclasses.replace(better, speedup=1.04), "good"),
        (dataclasses.replace(better, speedup=1.2), "warning"),
    ]
    assert [found.to_document(plots=False).status for found, _ in cases] == [wanted for _, wanted in cases]


def test_the_chosen_point_is_the_model_that_is_delivered() -> None:
    found = dataclasses.replace(outcome(DENSE, SMALL), keep=0.5, curve=((0.4, 0.7), (0.5, 0.8), (0.9, 0.9)))
    planned, chosen = found._picture().series
    assert (list(chosen.x), list(chosen.y)) == ([50.0], [SMALL.quality])  # 0.88 after refitting
    assert list(planned.y) == [0.7, 0.8, 0.9]


@pytest.mark.parametrize("name", ADVICE)
def test_the_report_says_where_factoring_is_not_worth_it(name: str) -> None:
    others, told = ADVICE[name]
    found = outcome(DENSE, SMALL, *others)
    assert found.advice == told
    assert told in found.verdict
    assert "speed at batch 1: 1.33× (1.20–1.40), at batch 32: no difference seen (0.90–1.10)" in found.verdict
    text = " ".join(to_text(found.to_document(), width=200).split())
    assert text.count(told or "of the bytes") == 1
    assert found.drop == pytest.approx(0.02)
    assert outcome(DENSE, SMALL, better="lower").drop == pytest.approx(-0.02)


def test_the_other_forms_of_a_model_take_and_give_what_it_does() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), torch.randn(5, 64)
    for form, share in ((in_bfloat16, 0.5), (in_int8, 0.3)):
        other = form(model)
        assert other(x).dtype == torch.float32
        torch.testing.assert_close(other(x), model(x), rtol=0.05, atol=0.05)
        assert num_bytes(other) <= share * num_bytes(model)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    shared = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
    shared[1].weight = shared[0].weight
    assert num_bytes(shared) == 4 * 36
    assert in_bfloat16(ZOO["transformer_classifier"].make_model(0)) is not None


# ---- a Hugging Face folder and texts ---------------------------------------------------------------------------------

WORDS = [f"w{i}" for i in range(40)]


def language(transformers):
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=45, pad_token_id=0
    )
    return transformers.LlamaForCausalLM(config)


def encoder(transformers, cls: str = "BertModel"):
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=45
    )
    return getattr(transformers, cls)(config)


def classes(transformers):
    return encoder(transformers, "BertForSequenceClassification")


def seq2seq(transformers):
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2, vocab_size=45)
    )


def images(transformers):
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    return transformers.ViTModel(transformers.ViTConfig(**size, image_size=32, patch_size=8))


def hf_folder(folder: Path, make, lines: int = 40) -> Path:
    transformers = pytest.importorskip("transformers")
    path = folder / "hf"
    path.mkdir()
    (path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    transformers.BertTokenizer(str(path / "vocab.txt"), model_max_length=32).save_pretrained(path)
    torch.manual_seed(0)
    make(transformers).save_pretrained(path)
    texts = [" ".join(WORDS[(i * j) % 40] for j in range(1, 5 + i % 5)) for i in range(1, lines + 1)]
    (folder / "texts.txt").write_text("\n\n".join(texts))
    return path


@pytest.mark.parametrize(("make", "measure"), [(language, "loss"), (encoder, "cosine"), (classes, "agreement")])
def test_a_folder_and_texts_are_enough(folder, capsys, make, measure: str) -> None:
    path = hf_folder(folder, make)
    args = [str(path), "--calibrate", "texts.txt", "--keep", "0.8", "--out", "small", "--no-curve", "--json", "x.json"]
    code, _, err = run(capsys, *args)
    assert code == 0, err
    told = json.loads((folder / "x.json").read_text())
    assert told["measure"] == measure
    assert any(layer["rank"] for layer in told["layers"])
    import transformers

    loaded = getattr(transformers, make(transformers).__class__.__name__).from_pretrained(folder / "small").eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder / "small")(["w1 w2 w3"], return_tensors="pt")
    assert loaded(**tokens)[0].isfinite().all()
    assert sum(p.numel() for p in loaded.parameters()) == told["contenders"][1]["parameters"]
    assert not (folder / "small/texts.txt").exists()
    # A compressed folder is a folder: it can be calibrated, evaluated and compressed in turn.
    again = ["small", "--calibrate", "texts.txt", "--keep", "0.95", "--no-curve", "--json", "y.json", "--quiet"]
    capsys.readouterr()
    assert run(capsys, *again) == (0, "", "")
    assert json.loads((folder / "y.json").read_text())["contenders"][0]["bytes"] == told["contenders"][1]["bytes"]


BAD_FOLDERS = {
    "few": (encoder, {"lines": 4}, None, "holds 4 texts, wanted at least 10"),
    "decoder": (seq2seq, {}, None, "has a decoder, which needs targets"),
    "images": (images, {}, None, "ViTModel takes pixel_values, not tokens of texts. Write a gm.Task"),
    "no_tokenizer": (encoder, {}, ("tokenizer.json", "tokenizer_config.json", "vocab.txt"), "has no tokenizer"),
    "no_weights": (encoder, {}, ("model.safetensors",), "transformers cannot load it"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_folder_that_is_not_enough_is_one_clear_line(folder, capsys, name: str) -> None:
    make, options, missing, message = BAD_FOLDERS[name]
    path = hf_folder(folder, make, **options)
    for file in missing or ():
        (path / file).unlink()
    capsys.readouterr()
    code, _, err = run(capsys, str(path), "--calibrate", "texts.txt", "--keep", "0.5", "--quiet")
    assert code == 2, err
    assert message in err
    assert err.count("\n") == 1


def test_a_row_says_how_much_of_a_form_is_integers() -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 2))
    wide = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 2))
    for model, share in ((net, 512 / (432 + 2304 + 512)), (wide, None)):
        error = lambda m, model=model: {"error": float((m(x) - 2 * model(x)).square().mean())}  # noqa: E731
        made = decide(model, [(x, x[:, 0, 0, :2])], gm.Objective.regression(), error, Target(keep=0.7), curve=False)
        notes = {one.name: one.note for one in made.outcome.contenders}
        assert notes["int8"] == (
            f"{share:.1%} of the weights are integers, the other layers as they were" if share else ""
        )
        assert notes["bfloat16"] == ""
        told = " ".join(to_text(made.outcome.to_document(), width=80).split())
        assert ("- int8: 15.8% of the weights are integers" in told) == bool(share)
