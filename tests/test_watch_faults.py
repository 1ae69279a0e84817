"""Faults of the loop itself, which a watch tells as causes; and that none of its own ends a training."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gramian as gm
from gramian.errors import GramianWarning
from gramian.inspection.live.look import Looker


def run(model: nn.Module, fault: str = "", steps: int = 41, **options: Any) -> gm.Watch:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    factor = {"rate-grows": 1.3, "rate-vanished": 0.5}.get(fault, 1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, factor)
    x = torch.randn(32, 8)
    y = (x[:, 0] > 0).long()
    with gm.watch(model, optimizer, every=5, share=None, **options) as watching:
        for step in range(steps):
            F.cross_entropy(model(x), y).backward()
            if fault == "gradient-clipped":
                nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
            if fault == "gradient-dropped":
                optimizer.zero_grad()
            if fault == "parameter-frozen" and step == 12:
                next(model.children()).requires_grad_(False)
            optimizer.step()
            schedule.step()
            if fault != "gradient-kept":
                optimizer.zero_grad(set_to_none=step % 2 == 0)
    return watching


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))


FAULTS = ["gradient-kept", "gradient-dropped", "gradient-clipped", "rate-grows", "rate-vanished", "parameter-frozen"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_loop_is_the_first_that_is_told(fault: str) -> None:
    findings = run(net(), fault).findings
    assert next(f.code for f in findings if f.severity != "info" or fault == "parameter-frozen") == fault
    assert not any(f.code in FAULTS and f.code != fault for f in findings)
    assert "parameter-unused" not in [f.code for f in findings]


def test_gradients_that_an_optimizer_of_another_model_does_not_zero_are_not_told_beside_it() -> None:
    model, optimizer, x = net(), torch.optim.SGD(net().parameters(), lr=0.05), torch.randn(32, 8)
    with gm.watch(model, optimizer, every=2, share=None) as watching:
        for _ in range(6):
            F.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [f.code for f in watching.findings] == ["parameter-not-stepped"]


@pytest.mark.parametrize("fault", ["a copy is called", "the state is cleared", "neither", "cleared once"])
def test_what_a_loop_calls_and_keeps(fault: str) -> None:
    """The optimizer's state may be cleared once."""
    model, data = net(), torch.randn(8, 32, 8, generator=torch.Generator().manual_seed(0))
    called = copy.deepcopy(model) if fault == "a copy is called" else model
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with gm.watch(model, optimizer, every=3, share=None) as watching:
        for step in range(20):
            x = data[step % 8]
            optimizer.zero_grad()
            F.cross_entropy(called(x), (x[:, 0] > 0).long()).backward()
            optimizer.step()
            if fault == "the state is cleared" or (fault == "cleared once" and step == 9):
                optimizer.state.clear()
    code = {"a copy is called": "graph-cut", "the state is cleared": "state-lost"}
    assert [f.code for f in watching.findings] == ([code[fault]] if fault in code else [])


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("is_unscaled", [False, True])
def test_clipping_before_the_loss_scale_is_taken_out(is_unscaled: bool, narrow: bool) -> None:
    model, x = net(), torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.05), torch.amp.GradScaler("cpu")
    with gm.watch(model, optimizer, every=3, share=None) as watching:
        for _ in range(20):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
                loss = F.cross_entropy(model(x).float(), (x[:, 0] > 0).long())
            scaler.scale(loss).backward()
            if is_unscaled:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
    clipped = [f for f in watching.findings if f.code == "gradient-clipped"]
    assert [("unscale_" in f.remedy) for f in clipped] == ([] if is_unscaled else [True])


@pytest.mark.parametrize("kind", ["norm", "dropout", "neither"])
def test_a_training_that_goes_on_in_evaluation_mode(kind: str) -> None:
    """After a validation, model.train() was forgotten; a validation in between is none."""
    torch.manual_seed(0)
    middle = {"norm": nn.BatchNorm1d(16), "dropout": nn.Dropout(0.3), "neither": nn.Tanh()}[kind]
    model = nn.Sequential(nn.Linear(8, 16), middle, nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, told = torch.randn(32, 8), []
    with gm.watch(model, optimizer, every=5, share=None, on_finding=lambda f, step: told.append((f.code, step))) as w:
        for step in range(20):
            if step % 4 == 0:
                model.eval()
                with torch.no_grad():
                    model(x)
                model.train(step < 12)
            optimizer.zero_grad()
            F.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
            optimizer.step()
    code = {"norm": "norm-evaluation-mode", "dropout": "dropout-evaluation"}.get(kind)
    assert told == ([] if code is None else [(code, 13)])
    assert "calls another" not in w.not_looked_at.get("modules", "")


def test_a_loop_without_one_is_silent() -> None:
    assert run(net()).findings == []


@pytest.mark.parametrize("until", [1.0, 1e6])
def test_a_test_of_rates_is_no_fault_as_long_as_it_does_no_harm(until: float) -> None:
    model, steps = net(), 60
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, (until / 1e-5) ** (1 / steps))
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    with gm.watch(model, optimizer, every=5, share=None) as watching:
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
            optimizer.step()
            schedule.step()
    codes = [f.code for f in watching.findings if f.severity != "info"]
    assert codes[:1] == ([] if until == 1.0 else ["rate-grows"])


class Dropped(nn.Module):
    """Layers that are left out at random, and one that always is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.never = nn.ModuleList(nn.Linear(8, 8) for _ in range(6)), nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if torch.rand(()) < 0.6:
                x = x + 0.3 * torch.tanh(layer(x))
        return self.head(x)


def test_layers_dropped_at_random_are_not_unused_and_one_that_is_never_called_is() -> None:
    found = [f for f in run(Dropped(), steps=81).findings if f.code == "parameter-unused"]
    assert [f.where for f in found] == ["never"]


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 6, dtype=torch.cfloat), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(torch.fft.rfft(x)).abs())


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self.inner)(x)


@pytest.mark.parametrize("make", [Complex, Mapped])
def test_complex_parameters_and_vmap(make: Callable[[], nn.Module]) -> None:
    watching = run(make(), steps=11)
    assert (watching.step, watching.looks) == (11, 3)
    assert watching.numbers["gradient"] > 0
    assert not [f for f in watching.findings if f.severity == "error"]


def test_an_error_of_the_watch_ends_the_watch_and_not_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(Looker, "after_step", broken)
    model = net()
    before = model[0].weight.detach().clone()
    with pytest.warns(GramianWarning, match="the training goes on.*ours") as caught:
        watching = run(model)
    assert len(caught) == 1
    assert watching.step == 0
    assert "steps after 0" in watching.not_looked_at
    assert not torch.equal(model[0].weight, before)


def test_an_error_of_the_user_s_own_function_is_the_user_s() -> None:
    def raising(*_: Any) -> None:
        raise ValueError("theirs")

    with pytest.raises(ValueError, match="theirs"):
        run(net(), "gradient-kept", on_finding=raising)


def small_loop(fault: str, *, steps: int = 60, watched: bool = True, **options: Any) -> tuple[nn.Module, Any]:
    """A run of the default share, whose steps take a fraction of what a full look takes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)
    )
    kind = torch.optim.SGD if fault in ("gradient-kept", "gradient-clipped") else torch.optim.Adam
    optimizer = kind(model.parameters(), lr=0.002 if fault == "rate-grows" else 0.02)
    schedules = {
        "rate-vanished": lambda k: 1e-6 ** min(1.0, k / 10),
        "rate-grows": lambda k: 1.0 + k * k,
        "cosine": lambda k: min(1.0, (k + 1) / 10) * (0.5 + 0.5 * torch.cos(torch.tensor(3.14 * k / steps)).item()),
    }
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, schedules.get(fault, lambda _: 1.0))
    x = torch.randn(64, 8)
    y = (x[:, 0] > 0).long()
    model.train(fault != "norm-evaluation-mode")
    for p in list(model.parameters())[:2]:
        p.requires_grad_(fault != "frozen from the start")
    watching = gm.watch(model, optimizer, every=10, **options) if watched else None
    for step in range(steps):
        if fault == "parameter-frozen" and step == 4:
            model[0].requires_grad_(False)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fault == "autocast"):
            loss = F.cross_entropy(model(x).float(), y)
        (torch.tensor(loss.item(), requires_grad=True) if fault == "graph-cut" else loss).backward()
        if fault == "gradient-clipped":
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        if fault == "accumulation" and step % 4:
            continue
        optimizer.step()
        schedule.step()
        if fault != "gradient-kept":
            optimizer.zero_grad()
    if watching is not None:
        watching.close()
    return model, watching


SHORT = [
    "gradient-kept", "gradient-clipped", "rate-grows", "rate-vanished", "parameter-frozen", "graph-cut",
    "norm-evaluation-mode",
]  # fmt: skip
HEALTHY = ["", "cosine", "accumulation", "autocast", "frozen from the start"]


@pytest.mark.parametrize("fault", [*SHORT, *HEALTHY])
def test_in_a_short_run_of_tiny_steps_the_fault_is_told_first_and_nothing_else_changes(fault: str) -> None:
    model, watching = small_loop(fault)
    codes = [f.code for f in watching.findings if f.severity != "info"]
    assert codes[:1] == ([fault] if fault in SHORT else [])
    assert watching.looked[:1] == [1]
    assert watching.brief_looks >= 1
    plain, _ = small_loop(fault, watched=False)
    pairs = zip(model.state_dict().values(), plain.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_what_follows_from_a_rate_that_grows_is_told_as_such() -> None:
    _, watching = small_loop("rate-grows", share=None)
    grown = next(f for f in watching.findings if f.code == "rate-grows")
    assert grown.severity == "error"
    assert not [f.code for f in watching.findings if f.severity == "error" and f is not grown]


@pytest.mark.parametrize(("optimizer", "rate"), [("AdamW", 1.0), ("SGD", 50.0), ("SGD", 1e6)])
def test_what_a_rate_that_is_too_large_does_to_weights_follows_from_it(optimizer: str, rate: float) -> None:
    found = trained(optimizer, rate)
    assert [f.code for f in found if f.severity != "info"] == ["rate-too-high"]
    followers = [f for f in found if f.code in ("gain-above-one", "embedding-scale", "head-scale", "loss-non-finite")]
    assert followers
    assert all(f.follows == "rate-too-high" and "in order when the watch began" in f.cause for f in followers)


def test_weights_that_were_out_of_order_before_the_first_step_are_the_cause() -> None:
    """And no watch was given the batches that an action's code would name."""
    found = {f.code: f for f in trained("SGD", 0.1, scale=30.0)}
    assert found["gain-above-one"].severity == "error"
    assert found["rate-too-high"].follows == "gain-above-one"
    assert "isometric_(model, batch)" in found["gain-above-one"].remedy
    assert not any(re.search(r"\bbatches\b", f.remedy) for f in found.values())


def trained(optimizer: str, rate: float, scale: float = 1.0) -> list[gm.report.Finding]:
    """What a watch finds of a few steps of a network of several layers."""
    torch.manual_seed(0)
    hidden = [m for _ in range(3) for m in (nn.Linear(64, 64), nn.ReLU())]
    model = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), *hidden, nn.Linear(64, 2))
    for p in model[1:].parameters():
        p.data.mul_(scale)
    x = torch.randint(20, (32, 8))
    stepping = getattr(torch.optim, optimizer)(model.parameters(), lr=rate)
    with gm.watch(model, stepping, every=5, share=None) as watching:
        for _ in range(21):
            stepping.zero_grad()
            F.cross_entropy(model(x), (x[:, 0] > 9).long()).backward()
            stepping.step()
    return watching.findings


def test_few_looks_are_said_with_their_steps_and_why() -> None:
    _, watching = small_loop("", steps=200, share=1e-4)
    told = watching.not_looked_at["modules and norms at most steps"]
    assert f"full looks at {watching.looks} of 200 steps: {', '.join(map(str, watching.looked[:6]))}" in told
    assert "0.01% of the time" in told
    assert "share=None" in told
    assert "full looks at" in repr(watching)
    _, watching = small_loop("", share=None)
    assert "modules and norms at most steps" not in watching.not_looked_at
