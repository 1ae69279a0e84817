"""What a trainer has: each option does what it says, survives a kill bit for bit, and is part of the run's identity."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import gramian as gm
from cases import seeded
from gramian import tasks
from gramian.checkpoint import load_tensors, load_tree
from gramian.cli import completion
from gramian.errors import InputError, TaskError, UnsupportedError
from gramian.optim import OPTIMIZERS
from gramian.report import to_text
from gramian.tasks import TASKS
from gramian.training import augmentation, compare, display, page, scaling, start
from gramian.training.augmentation import AUGMENTATIONS, augmented, mixed
from gramian.training.options import PENALTIES, PRECISIONS, Options, best_row
from gramian.training.schedule import SCHEDULES
from runs import Stop, stopping, weights

X = torch.randn(70, 16, generator=seeded(0), dtype=torch.float64)
Y = (X[:, 0] > 0).long()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2)).double()


def plain_net() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def batches(epoch: int, generator: torch.Generator):
    for part in torch.randperm(len(X), generator=generator).split(16):
        yield X[part], Y[part]


def evaluate(model: nn.Module) -> dict[str, float]:
    return {"size": float(model(X).detach().square().mean())}


def task(**changes: Any) -> gm.Task:
    parts = {"model": net, "objective": gm.Objective.classification(), "train_batches": batches, "evaluate": evaluate}
    return gm.Task(**(parts | changes))


CHANGES = {"shift": 1, "rotate": 20, "scale": 0.1, "flip": 0.5, "cutout": 0.3, "noise": 0.1, "mask": 0.1, "mixup": 0.4}


EVERYTHING: dict[str, dict[str, Any]] = {
    **{name: {"schedule": name} for name in SCHEDULES},
    "no warm-up": {"warmup": 0},
    "weight decay": {"weight_decay": 0.1},
    "l1 and l2": {"regularize": {"l1": 1e-2, "l2": 1e-2}},
    "nuclear": {"regularize": {"nuclear": 1e-2}},
    "clip": {"clip": 0.1},
    "accumulate": {"accumulate": 3},
    "ema": {"ema": 0.9},
    "bfloat16": {"precision": "bfloat16"},
    "best": {"best": "min:size", "patience": 8},
    "best of averages": {"best": "max:size", "ema": 0.5},
    "augment": {"augment": CHANGES},
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_option_survives_a_kill_bit_for_bit(often, tmp_path, name: str) -> None:
    options = {"epochs": 4, "optimizer": "adamw", "lr": 0.05, **EVERYTHING[name]}
    whole = gm.train(task(), out=tmp_path / "whole", **options)

    for step in (3, 5):
        with pytest.raises(Stop):
            gm.train(task(), out=tmp_path / "a", resume=True, on_step=stopping(step), **options)
    broken = gm.train(task(), out=tmp_path / "a", resume=True, **options)
    assert broken.resumed == 4
    assert all(map(torch.equal, weights(whole), weights(broken)))
    again = gm.train(task(), out=tmp_path / "a", resume=True, **options)
    assert all(map(torch.equal, weights(whole), weights(again)))
    rows = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (path / "metrics.jsonl").open()]
        for path in (tmp_path / "whole", tmp_path / "a")
    ]
    assert rows[0] == rows[1]
    default = {"epochs": 4, "optimizer": "adamw", "lr": 0.05}
    if options != default | {"schedule": "linear"}:
        with pytest.raises(InputError, match="cannot resume"):
            gm.train(task(), out=tmp_path / "a", resume=True, **default)


RATES = {
    "constant": lambda i: 1.0,
    "linear": lambda i: 1 - i / 90,
    "cosine": lambda i: (1 + math.cos(math.pi * i / 90)) / 2,
    "step": lambda i: 0.1 ** (i // 30),
    "exponential": lambda i: 0.01 ** (i / 90),
}


@pytest.mark.parametrize("name", RATES)
def test_rates_follow_their_schedule(name: str) -> None:
    rates: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    gm.train(task(), steps=90, optimizer=lambda m: Watched(m.parameters(), lr=0.5), schedule=name, warmup=5)
    wanted = [0.5 * min(1, (i + 1) / 5) * RATES[name](i) for i in range(90)]
    assert rates == pytest.approx(wanted, rel=1e-9)


def test_a_plateau_halves_the_rate() -> None:
    assert [SCHEDULES["plateau"](0.5, [3, 2, *[2.0] * n]) for n in range(5)] == [1, 1, 0.5, 0.5, 0.25]
    assert SCHEDULES["plateau"](0.5, [3, math.nan, 2, 1]) == 1


def test_regularization_is_the_proximal_map() -> None:
    """One step of gradient descent and the soft threshold, written out; biases are left alone."""
    lr, l1 = 0.5, 0.02
    model: list[nn.Module] = []

    def kept() -> nn.Module:
        model.append(plain_net())
        return model[-1]

    def whole(epoch: int, generator: torch.Generator):
        return [(X, Y)]

    def sgd(m: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(m.parameters(), lr=lr)

    options = {"steps": 1, "optimizer": sgd, "warmup": 0}
    before = gm.train(task(model=plain_net, train_batches=whole), **options | {"steps": 1, "schedule": "constant"})
    run = gm.train(task(model=kept, train_batches=whole), schedule="constant", regularize={"l1": l1}, **options)
    for (name, free), (_, own) in zip(before.model.named_parameters(), run.model.named_parameters(), strict=True):
        wanted = nn.functional.softshrink(free, lr * l1) if name.endswith("weight") else free
        torch.testing.assert_close(own, wanted, rtol=0, atol=1e-12)
    sparse = gm.train(task(model=plain_net), epochs=60, optimizer=sgd, regularize={"l1": 0.05})
    share = torch.cat([p.flatten() for n, p in sparse.model.named_parameters() if "weight" in n]).eq(0).double().mean()
    assert share > 0.3


def test_accumulated_batches_are_one_batch() -> None:
    """Of unequal sizes, 40, 20 and 10: the gradient is that of the union."""

    def parts(epoch: int, generator: torch.Generator):
        return [(X[a:b], Y[a:b]) for a, b in ((0, 40), (40, 60), (60, 70))]

    options = {"steps": 5, "optimizer": lambda m: torch.optim.SGD(m.parameters(), lr=0.3)}
    one = gm.train(task(model=plain_net, train_batches=lambda e, g: [(X, Y)]), **options)
    three = gm.train(task(model=plain_net, train_batches=parts), accumulate=3, **options)
    for p, q in zip(weights(one), weights(three), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert gm.train(task(), epochs=3, accumulate=2, optimizer="adamw").steps == math.ceil(3 * 5 / 2)


def test_gradients_are_clipped_together() -> None:
    norms: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))
            return super().step(closure)

    def make(m: nn.Module) -> torch.optim.Optimizer:
        return Watched(m.parameters(), lr=0.1)

    gm.train(task(), steps=10, optimizer=make)
    free, norms[:] = list(norms), []
    gm.train(task(), steps=10, optimizer=make, clip=0.05)
    assert min(free) > 0.06
    assert norms == pytest.approx([0.05] * 10, rel=1e-4)


def test_the_average_is_evaluated_and_kept() -> None:
    sizes: list[float] = []
    run = gm.train(task(), steps=40, optimizer="adamw", lr=0.1, ema=0.9, schedule="constant")
    sizes.append(evaluate(run.model.eval())["size"])
    assert run.metrics["size"] == pytest.approx(sizes[0], rel=1e-12)
    raw = gm.train(task(), steps=40, optimizer="adamw", lr=0.1, schedule="constant")
    assert raw.metrics["size"] != run.metrics["size"]


def test_the_best_model_is_the_finished_one() -> None:
    values = iter([0.0, 0.1, 0.5, 0.9, 0.4, 0.3, 0.2, *[0.0] * 20])
    seen: list[list[Tensor]] = []

    def scored(model: nn.Module) -> dict[str, float]:
        seen.append([t.clone() for t in model.state_dict().values()])
        return {"score": next(values)}

    run = gm.train(task(evaluate=scored), steps=20, optimizer="adamw", lr=0.1, best="max:score", patience=3)
    assert (run.steps, run.stopped) == (6, "max:score did not improve in 3 evaluations")
    assert all(map(torch.equal, weights(run), seen[3]))  # after that of the untrained model
    assert best_row("min:a", [{"a": 3.0}, {"a": 1.0}, {"a": 1.0}, {"a": math.nan}]) == (1, 2)
    with pytest.raises(InputError, match="best is 'max:b', but an evaluation has no 'b'; it has loss, size"):
        gm.train(task(), steps=2, best="max:b")


def images(num: int = 400) -> Tensor:
    return torch.randn(num, 1, 8, 8, generator=seeded(1))


def test_augmentations_are_drawn_from_the_seed_alone() -> None:
    x = images()
    for name in AUGMENTATIONS:
        first, again, other = (augmented((x, Y), {name: 0.5 if name != "shift" else 2}, (0, 0, i)) for i in (1, 1, 2))
        assert first[0].shape == x.shape
        assert torch.equal(first[0], again[0])
        assert not torch.equal(first[0], other[0])
        assert first[1] is Y
        assert torch.equal(augmented(x, {name: 0.0}, (0,)), x) or name in ("rotate", "scale")  # these interpolate
        torch.testing.assert_close(augmented(x, {name: 0.0}, (0,)), x, rtol=0, atol=1e-5)
        rows = augmented((x.flatten(1),), {name: 0.5 if name != "shift" else 2}, (0, 0, 1))[0]
        if name not in ("noise", "mask"):  # rows of pixels are those of a square
            assert torch.equal(rows, first[0].flatten(1))


def test_shifts_are_of_whole_pixels_and_zero_comes_in() -> None:
    x = torch.zeros(500, 1, 8, 8)
    x[:, 0, 4, 3] = 1.0
    moved = augmented(x, {"shift": 2}, (0,))
    assert torch.equal(moved.sum((1, 2, 3)), torch.ones(500))
    places = {tuple(place) for place in moved[:, 0].nonzero()[:, 1:].tolist()}
    assert places == {(a, b) for a in range(2, 7) for b in range(1, 6)}


def test_shares_are_as_asked() -> None:
    x = torch.ones(2000, 1, 8, 8)
    assert float(augmented(x, {"mask": 0.3}, (0,)).eq(0).float().mean()) == pytest.approx(0.3, abs=0.01)
    noise = augmented(x, {"noise": 0.7}, (0,)) - 1
    assert float(noise.std()) == pytest.approx(0.7, rel=0.02)
    turned = x.clone()
    turned[..., :4] = 0
    flipped = augmented(turned, {"flip": 0.25}, (0,))
    assert float((flipped[:, 0, 0, 0] == 1).float().mean()) == pytest.approx(0.25, abs=0.03)
    tokens = torch.arange(1000).reshape(10, 100)
    masked = augmented(tokens, {"mask": 0.2}, (0,))
    assert masked.dtype == tokens.dtype
    assert float((masked != tokens).float().mean()) == pytest.approx(0.2, abs=0.04)


def test_a_rotation_turns(monkeypatch) -> None:
    """An angle of 90 degrees is a transpose and a flip."""
    x = images(3)
    monkeypatch.setattr(augmentation, "_uniform", lambda num, generator: torch.tensor([1.0, -1.0, 1.0]))
    turned = augmented(x, {"rotate": 90.0}, (0,))
    either = [torch.rot90(x, k, (2, 3)) for k in (1, -1)]
    assert any(torch.allclose(turned[0], e[0], atol=1e-5) for e in either)
    assert any(torch.allclose(turned[1], e[1], atol=1e-5) for e in either)
    assert not torch.allclose(turned[0], turned[1])


def test_mixup_is_the_loss_of_two_labels() -> None:
    """The loss of one step, written out: λ and the partner of each row are the same for inputs and losses."""
    x, y = X[:16], Y[:16]
    mixed_x = augmented((x, y), {"mixup": 0.7}, (0, 0, 1))[0]
    (weight, (first_x, first)), (rest, (second_x, second)) = mixed((mixed_x, y), {"mixup": 0.7}, (0, 0, 1))
    assert first_x is second_x is mixed_x
    assert weight + rest == 1
    assert first is y
    partner = (mixed_x - weight * x) / rest
    rows = torch.cdist(partner, x).argmin(1)
    torch.testing.assert_close(partner, x[rows], rtol=0, atol=1e-9)
    assert torch.equal(second, y[rows])

    def whole(epoch: int, generator: torch.Generator):
        return [(x, y)]

    model = plain_net()
    want = model(mixed_x)
    losses = [nn.functional.cross_entropy(want, labels) for labels in (first, second)]
    wanted = float((weight * losses[0] + rest * losses[1]).detach())
    frozen = model.state_dict()

    def plain(m: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(m(batch[0]), batch[1])

    options: dict[str, Any] = {"steps": 1, "optimizer": lambda m: torch.optim.SGD(m.parameters(), lr=0.0)}
    options["augment"] = {"mixup": 0.7}
    for objective in (gm.Objective.classification(), plain):
        run = gm.train(task(model=loaded(frozen), train_batches=whole, objective=objective), **options)
        assert run.metrics["loss"] == pytest.approx(wanted, rel=1e-6)
    shares = torch.tensor([mixed((x, y), {"mixup": 0.2}, (0, 0, i))[0][0] for i in range(2000)])
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.04)
    assert float(shares.var()) == pytest.approx(0.25 / 1.4, rel=0.05)  # of Beta(0.2, 0.2)


def loaded(state: dict[str, Tensor]):
    def made() -> nn.Module:
        model = plain_net()
        model.load_state_dict(state)
        return model

    return made


def single(**changes: Any) -> gm.Task:
    """The task in float32, which autocast lowers."""

    def parts(epoch: int, generator: torch.Generator):
        for x, y in batches(epoch, generator):
            yield x.float(), y

    changes = {
        "model": lambda: net().float(),
        "evaluate": lambda model: {"size": float(model(X.float()).norm())},
    } | changes
    return task(train_batches=parts, **changes)


def test_a_loss_in_float16_is_scaled_and_the_scale_survives_a_kill(often, tmp_path, monkeypatch) -> None:
    """Without it the gradients would be zero; an overflow leaves a step out, halves the scale, and is no fault."""
    monkeypatch.setattr(scaling, "GROWTH_STEPS", 3)
    monkeypatch.setattr(scaling, "INITIAL", 2.0**22)
    tiny = gm.Objective.classification(predict=lambda model, batch: 1e-7 * model(batch[0]))
    options: dict[str, Any] = {"epochs": 4, "optimizer": "adamw", "lr": 0.05, "precision": "float16"}
    for objective in (tiny, gm.Objective.classification()):
        path = tmp_path / str(objective is tiny)
        what = single(objective=objective)
        whole = gm.train(what, out=path / "whole", **options)
        for step in (3, 8):
            with pytest.raises(Stop):
                gm.train(what, out=path / "a", resume=True, on_step=stopping(step), **options)
        kept = load_tree(path / "a" / "checkpoint.safetensors")["scale"]
        assert kept["value"] != scaling.INITIAL
        broken = gm.train(what, out=path / "a", resume=True, **options)
        assert all(map(torch.equal, weights(whole), weights(broken)))
        assert (whole.skipped, whole.diverged) == (0, False)
    seen: list[Tensor] = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]))
            return super().step(closure)

    monkeypatch.setattr(scaling, "INITIAL", 2.0**10)
    for precision in ("float16", "float32"):
        still = single(model=lambda: plain_net().float())
        gm.train(still, steps=1, optimizer=lambda m: Watched(m.parameters(), lr=0.1), precision=precision)
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=2e-3 * float(seen[1].abs().max()))


def test_a_gradient_that_is_not_finite_at_scale_one_counts() -> None:
    scale = scaling.LossScale()
    assert all(scale.overflowed() for _ in range(16))
    assert scale.value == 1
    assert not scale.overflowed()
    assert not scaling.LossScale(active=False).overflowed()


def test_a_report_has_curves_spectra_and_what_went_wrong(often, tmp_path) -> None:
    options: dict[str, Any] = {"optimizer": "adamw", "steps": 40, "lr": 0.03}
    with pytest.raises(Stop):
        gm.train(single(), out=tmp_path / "a", report=tmp_path / "a.html", on_step=stopping(7), **options)
    # The diagnosis before training is in the checkpoint.
    run = gm.train(single(), out=tmp_path / "a", report=tmp_path / "a.html", resume=True, **options)
    text = (tmp_path / "a.html").read_text()
    for words in ("Training loss", "size", "Findings before training", "Findings after training", "Singular values"):
        assert words in text
    assert "What went wrong" not in text
    assert page.trouble(run) == ""
    still = gm.train(single(), report=tmp_path / "b.html", **options | {"lr": 0.0})
    assert page.trouble(still).startswith("The training loss did not fall: ")
    assert "The network before training: " in (tmp_path / "b.html").read_text()
    assert not list(tmp_path.glob("c*"))
    with pytest.raises(InputError, match=r"expected a name that ends in \.html"):
        gm.train(single(), report=tmp_path / "c.pdf", out=tmp_path / "c", **options)
    assert not list(tmp_path.glob("c*"))


def test_a_task_draws_what_its_model_does(tmp_path) -> None:
    gm.train(TASKS["autoencoder"].make(), optimizer="adamw", steps=2, report=tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert all(words in text for words in ("Held-out digits", "Rebuilt by the network", "8 principal components"))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "schedule": ({"schedule": "cos"}, "schedule must be one of linear, constant, cosine, step, exponential, plateau"),
    "precision": ({"precision": "half"}, "precision must be one of float32, bfloat16, float16; got 'half'"),
    "warmup": ({"warmup": -1}, "warmup must be a number of steps, zero or more; got -1"),
    "long warm-up": ({"warmup": 4}, "warmup is 4 steps, and the run has 3"),
    "long warm-up, epochs": ({"warmup": 6, "steps": None, "epochs": 1}, "warmup is 6 steps, and the run has 5"),
    "accumulate": ({"accumulate": 0}, "accumulate must be a number of batches, from 1 to 1,000,000; got 0"),
    "clip": ({"clip": math.nan}, "clip must be a positive number; got nan"),
    "decay": ({"weight_decay": -1.0}, "weight_decay must be zero or a positive number"),
    "ema": ({"ema": 1.0}, "ema must be between 0 and 1, as 0.999; got 1.0"),
    "penalty": ({"regularize": {"l3": 1.0}}, "regularize must be one of l1, l2, nuclear, spectral, orthogonal"),
    "strength": ({"regularize": {"l1": -1.0}}, "regularize l1 must be zero or a positive number"),
    "two penalties": ({"regularize": {"l1": 1.0, "nuclear": 1.0}}, "takes one penalty, or l1 and l2 together"),
    "augment": (
        {"augment": {"swirl": 1.0}},
        "augment must be one of shift, rotate, scale, flip, cutout, noise, mask, mixup",
    ),
    "too much": ({"augment": {"flip": 2.0}}, "augment flip must be between 0 and 1; got 2.0"),
    "best": ({"best": "accuracy"}, "best must be max:NAME or min:NAME, as in max:accuracy; got 'accuracy'"),
    "patience": ({"patience": 3}, "patience needs best="),
    "seconds": ({"seconds": math.inf, "steps": None}, "seconds must be finite, got inf"),
    "seed": ({"seed": 2**64}, "seed must be a whole number from 0"),
    "steps of text": ({"steps": "3"}, "steps must be a whole number; got '3'"),
    "half a step": ({"steps": 1.5}, "steps must be a whole number; got 1.5"),
    "a true step": ({"steps": True}, "steps must be a whole number; got True"),
    "no function": ({"on_step": 3}, "on_step must be a function; got 3"),
    "a list of names": ({"init": ["isometric"]}, "init must be one of default, isometric, auto"),
    "a list of rates": ({"lr": [1.0]}, "lr must be zero, a positive number or 'auto'"),
    "a name alone": ({"augment": "shift"}, "augment must be strengths by name"),
    "a strength of text": ({"augment": {"shift": "x"}}, "augment shift must be zero or a positive number; got 'x'"),
    "an empty path": ({"out": ""}, "out or report must be a path, and not empty"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_named(tmp_path, name: str) -> None:
    options, message = WRONG[name]
    with pytest.raises(InputError, match=message):
        gm.train(task(), **({"steps": 3, "out": tmp_path / "run"} | options))
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_changed_is_named() -> None:
    with pytest.raises(UnsupportedError, match=r"needs images .* got \(16, 15\)"):
        gm.train(task(train_batches=lambda e, g: [(X[:16, :15], Y[:16])]), steps=1, augment={"shift": 1})
    with pytest.raises(UnsupportedError, match="noise needs floating numbers"):
        augmented((Y,), {"noise": 1.0}, (0,))
    with pytest.raises(InputError, match="LBFGS has no weight decay; use regularize l2"):
        gm.train(task(), steps=1, optimizer=lambda m: torch.optim.LBFGS(m.parameters()), weight_decay=0.1)
    with pytest.raises(TaskError, match=r"optimizer\(model\) must return a torch.optim.Optimizer, got a int"):
        gm.train(task(), steps=1, optimizer=lambda m: 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("digits", "digits-10")])
def test_the_built_in_tasks_learn(name: str) -> None:
    if name == "mnist1d":
        pytest.importorskip("mnist1d")
    run = gm.train(TASKS[name].make(), optimizer="adamw", lr=0.005, steps=60)
    assert run.history[-1]["loss"] < 0.9 * run.history[0]["loss"]


def test_optimizers_are_compared_from_the_same_start(tmp_path, capsys, monkeypatch) -> None:
    from gramian.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["train", "diabetes", "--compare", "adamw,auto", "--steps", "3", "--out", "runs", "--quiet"]) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["adamw", "muon"]
    before = (tmp_path / "runs" / "muon" / "model.safetensors").read_bytes()
    again = ["train", "diabetes", "--compare", "adamw,auto", "--steps", "3", "--seed", "7", "--out", "runs", "--quiet"]
    assert main(again) == 2
    assert (tmp_path / "runs" / "muon" / "model.safetensors").read_bytes() == before
    capsys.readouterr()
    assert main(["train", "diabetes", "--compare", "adamw,sgd", "--steps", "20"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["adamw", "sgd"]
    assert [line.split()[0] for line in out.splitlines() if set(line) & set(display.BLOCKS)] == ["adamw", "sgd"]
    assert out.count("█") >= 1
    for options, message in (
        (["--compare", "adamw"], "takes two different optimizers or more, or one at several rates; got adamw"),
        (["--compare", "adamw,adagrad"], "unknown optimizer 'adagrad'; wanted auto, muon"),
        (
            ["--compare", "adamw,sgd", "--lr", "1"],
            "--compare adamw:lr=3e-3,sgd; leave out --optimizer, and --lr but for",
        ),
        (["--compare", "adamw:3e-3,sgd"], "a rate is taken, as in adamw:lr=3e-4; got 'adamw:3e-3'"),
        (["--compare", "adamw:lr=-1,sgd"], "a rate is taken"),
        (["--compare", "adamw:lr=nan,sgd"], "a rate is taken"),
    ):
        assert main(["train", "diabetes", "--steps", "2", *options]) == 2
        assert message in capsys.readouterr().err


def test_a_comparison_takes_a_rate_for_each_optimizer() -> None:
    runs = compare(task(), ["adamw:lr=0.02", "sgd", "muon:lr=0.3"], steps=2)
    assert {name: run.lr for name, run in runs.items()} == {"adamw": 0.02, "sgd": 0.1, "muon": 0.3}
    assert [run.rate_from for run in runs.values()] == ["given", "the usual one", "given"]
    told = "The rate of sgd is not tuned; at tuned ones, as by lr=auto, the order may be another"
    assert told in page.comparison(runs, task()).verdict
    assert told not in page.comparison({"adamw": runs["adamw"], "muon": runs["muon"]}, task()).verdict
    console = Console(file=io.StringIO(), width=200)
    display.show_comparison(runs, console)
    assert told in console.file.getvalue()
    found = compare(tasks.diabetes(), ["adamw:lr=0.02", "sgd"], steps=3, lr="auto")
    alone = gm.train(tasks.diabetes(), optimizer="sgd", steps=3, lr="auto")
    assert (found["adamw"].lr, found["sgd"].lr) == (0.02, alone.lr)


def test_a_short_run_in_epochs_takes_the_rate_of_as_many_steps() -> None:
    one = task(model=plain_net)
    num = len(list(one.train_batches(0, torch.Generator())))
    by_steps, by_epochs = gm.train(one, steps=2 * num), gm.train(one, epochs=2)
    assert by_steps.lr == by_epochs.lr > gm.optim.Muon(plain_net()).defaults["lr"]
    assert by_steps.rate_from == by_epochs.rate_from == f"the usual one for a run of {2 * num} steps"
    assert all(
        torch.equal(a, b) for a, b in zip(by_steps.model.parameters(), by_epochs.model.parameters(), strict=True)
    )


def test_options_are_part_of_the_identity() -> None:
    assert Options().identity() == {}
    assert Options(regularize={"l1": 1e-4}, clip=1.0).identity() == {"regularize": "l1=0.0001", "clip": "1.0"}


def test_a_comparison_fits_80_columns_and_auto_is_trained_once() -> None:
    """With every optimizer, and a name longer than the terminal."""
    long = "the_share_of_held_out_samples_whose_label_is_among_the_first_five_of_the_prediction"
    row = {"step": 20, "seconds": 1.25, "loss": 0.123456, "accuracy": 0.98765, long: 1234.5678}
    runs = {name: gm.Run(plain_net(), [row] * 20, optimizer=name, lr=1e-3) for name in OPTIMIZERS}
    console = Console(file=io.StringIO(), width=80)
    display.show_comparison(runs, console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "".join(line.split("  ")[0].strip() for line in lines[1:6]).startswith("ratestepsecondslossaccuracy")
    assert all(f"{name} " in lines[0] + " " for name in runs)
    assert "".join(line.split("  ")[0].strip() for line in lines[6:]).startswith(long)
    short = task(model=plain_net)
    assert list(compare(short, ["adamw", "muon", "auto"], steps=2)) == ["adamw", "muon"]
    assert list(compare(short, ["auto", "adamw"], steps=2)) == ["muon", "adamw"]


def test_what_the_shell_completes_is_in_the_tables() -> None:
    assert set(completion.OPTIMIZERS) == {"auto", *OPTIMIZERS}
    assert set(completion.SCHEDULES) == {*SCHEDULES}
    assert set(completion.PENALTIES) == {*PENALTIES}
    assert set(completion.AUGMENTATIONS) == {*AUGMENTATIONS, augmentation.MIXUP}
    assert set(completion.PRECISIONS) == {*PRECISIONS}
    assert set(completion.INITS) == {*start.INITS}
    assert set(completion.TASKS) == {"chars", *TASKS}
    words = {"_GRAMIAN_COMPLETE": "complete_bash", "COMP_WORDS": "gramian train digits --schedule c", "COMP_CWORD": "4"}
    ended = subprocess.run([sys.executable, "-m", "gramian"], env=os.environ | words, capture_output=True, text=True)
    assert ended.stdout.split() == ["constant", "cosine"]


def test_tasks_and_watches_are_shown_in_a_line() -> None:
    assert repr(task()) == "<Task 'task': model net, <Objective: cross_entropy, fisher 'sampled'>>"
    model = plain_net()
    with gm.watch(model, torch.optim.SGD(model.parameters(), lr=0.1)) as watching:
        assert repr(watching) == "<Watch of Sequential: step 0, 0 looks: no findings>"


@pytest.mark.parametrize("value", [10**400, 1j, None, torch.ones(3)])
def test_what_no_float_can_hold_is_no_measure(value: Any) -> None:
    with pytest.raises(TaskError, match=r"evaluate\(model\) must return a dict of floats"):
        gm.train(task(evaluate=lambda model: {"size": value}), steps=2)


def test_one_optimizer_is_compared_at_several_rates(tmp_path) -> None:
    runs = compare(task(), ["adamw:lr=0.003", "adamw:lr=0.01", "muon:lr=0.2"], steps=2, out=tmp_path)
    assert {name: run.lr for name, run in runs.items()} == {"adamw:lr=0.003": 0.003, "adamw:lr=0.01": 0.01, "muon": 0.2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adamw-lr=0.003", "adamw-lr=0.01", "muon"]
    assert list(compare(task(), ["muon:lr=0.2", "auto"], steps=2)) == ["muon:lr=0.2", "muon"]
    with pytest.raises(InputError, match=r"one at several rates; got adamw:lr=0.01, adamw:lr=0.01"):
        compare(task(), ["adamw:lr=0.01", "adamw:lr=1e-2"], steps=2)


def test_a_report_tells_what_became_worse_again(tmp_path) -> None:
    """A held-out loss that rises, and a score that falls, after their best."""
    held = iter([2.2, 1.5, 1.0, 0.9, 0.92, 0.98, 1.0, 1.05, 1.1, 1.12])
    score = iter([0.1, 0.5, 0.8, 0.84, 0.845, 0.84, 0.838, 0.835, 0.83, 0.823])

    def run_of(losses: Iterable[float], scores: Iterable[float], **options: Any) -> tuple[gm.Run, str]:
        rows = list(zip(losses, scores, strict=False))
        history = [
            {"step": 20.0 * (i + 1), "seconds": i / 10, "loss": 2 - i / 10, "held_out_loss": h, "accuracy": a}
            for i, (h, a) in enumerate(rows)
        ]
        run = gm.Run(nn.Linear(2, 2), history=history, steps=200, optimizer="muon", **options)
        return run, to_text(page.document(run, single(), None, gm.Report("x")), width=400)

    run, text = run_of(held, score)
    assert "held_out_loss was best at step 80, 0.900, now 1.12: worse since then" in text
    assert "--best min:held_out_loss (best='min:held_out_loss') keeps" in text
    assert "accuracy was best" not in text  # it lost 3 % of what it gained
    assert "0.823 (last evaluation; best 0.845 at step 100)" in text
    assert "! 200 steps" in text
    falling = [2 - i / 10 for i in range(10)]
    run, text = run_of(falling, [i / 10 for i in range(5)] + [0.2] * 5)
    assert "--best max:accuracy" in text
    run, text = run_of([1 + i / 10 for i in range(10)], falling)  # it only rose
    assert "held_out_loss was best at step 20, 1.00, now 1.90;" in text
    run, text = run_of(falling, falling)  # an accuracy that falls was best at first
    assert "--best max:accuracy" in text
    for row in run.history:
        row["whiteness"] = row.pop("accuracy")  # nobody knows which is its best
    assert page.receded(run) == ""
    assert "✓ 200 steps" in to_text(page.document(run, single(), None, gm.Report("x")), width=400)
    for row, value in zip(run.history, [1.9, 1.8, 1.7, 1.2, 1.3, 1.5, 1.7, 1.8, 1.9, 2.0], strict=True):
        row["held"] = value  # begins as the training loss
    assert page.receded(run).startswith("held was best at step 80, 1.20, now 2.00: worse since then. --best min:held")
    for row in run.history[:3]:
        row["held"] /= 2
    assert page.receded(run) == ""
    run, text = run_of(falling, [i / 10 for i in range(5)] + [0.2] * 5, best_step=100)
    assert "the weights are those of step 100, the best" in text
    assert page.receded(run) == ""


def test_a_resumed_report_says_why_it_has_nothing_before(often, tmp_path) -> None:
    options: dict[str, Any] = {"optimizer": "adamw", "steps": 40, "lr": 0.03}
    with pytest.raises(Stop):
        gm.train(single(), out=tmp_path / "a", on_step=stopping(7), **options)
    gm.train(single(), out=tmp_path / "a", report=tmp_path / "a.html", resume=True, **options)
    text = (tmp_path / "a.html").read_text()
    assert "The network before training was not looked at: the run began without a report." in text
    assert "no optimizer was given" not in text


def test_a_run_says_whose_weights_it_has() -> None:
    run = gm.train(single(), optimizer="adamw", steps=40, best="min:loss")
    losses = {row["step"]: row["loss"] for row in run.history}
    assert run.best_step is not None
    assert losses[run.best_step] == min(losses.values())
    assert gm.train(single(), optimizer="adamw", steps=4).best_step is None


def test_the_file_of_a_wrapped_model_has_the_users_names(tmp_path) -> None:
    """As of `torch.compile`, of the whole model or of a layer."""

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self._orig_mod = inner

        def forward(self, *args: Any) -> Any:
            return self._orig_mod(*args)

    plain = single()

    def made() -> nn.Module:
        model = plain.model()
        for name, layer in list(model.named_children()):
            setattr(model, name, Wrapped(layer))
        return Wrapped(model)

    options: dict[str, Any] = {"optimizer": "adamw", "steps": 3, "out": tmp_path / "a"}
    run = gm.train(replace(plain, model=made), **options)
    plain.model().load_state_dict(load_tensors(tmp_path / "a" / "model.safetensors")[0])
    again = gm.train(replace(plain, model=made), resume=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), again.model.parameters(), strict=True))
