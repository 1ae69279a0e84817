"""Remedies: the code that is shown is what is tried, what does not help is not offered, and nothing else changes."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from gramian.bench.faults.remedies import rows as bench_rows
from gramian.cli import main
from gramian.errors import InputError
from gramian.init import signs_of_training
from gramian.init.reset import sizes
from gramian.remedies import Setting, perform, proposals, rehearse, verified
from gramian.remedies.performing import PERFORMED
from gramian.remedies.proposals import CURES
from gramian.remedies.verifying import _lost
from gramian.report import Action, Finding, Rehearsal, Report, render, to_text
from gramian.report.actions import ACTIONS
from test_report_actions import ARGUMENTS


def data(count: int = 6, size: int = 48) -> list[tuple[Tensor, Tensor]]:
    """Batches of four well-separated clusters in eight dimensions."""
    generator = torch.Generator().manual_seed(0)
    centers = 2 * torch.randn(4, 8, generator=generator)
    labels = torch.randint(4, (count * size,), generator=generator)
    x = centers[labels] + 0.5 * torch.randn(count * size, 8, generator=generator)
    return list(zip(x.split(size), labels.split(size), strict=True))


def network(*, norm: bool = False, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs in (8, 24, 24):
            layers += [nn.Linear(inputs, 24), *([nn.BatchNorm1d(24)] if norm else []), nn.Dropout(0.0), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(24, 4))


def setting(model: nn.Module | None = None, batches: list | None = None, **options: Any) -> Setting:
    model = model or network()
    optimizer = torch.optim.AdamW(model.parameters(), **{"lr": 3e-3, "weight_decay": 0.01, **options})
    return Setting(model, batches or data(), gm.Objective.classification(), optimizer)


def inspected(run: Setting) -> Report:
    return gm.inspect(run.model, run.batches, run.objective, optimizer=run.optimizer, verify=True, quick=True)


def finding(report: Report, code: str) -> Finding:
    return next(f for f in report.findings if f.code == code)


def scaled(model: nn.Module, name: str, factor: float) -> nn.Module:
    model.get_parameter(name).data.mul_(factor)
    return model


def set_dropout(model: nn.Module, p: float) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
    return model


def with_nan(model: nn.Module) -> nn.Module:
    model.get_parameter("3.weight").data[0, 0] = math.nan
    return model


def with_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean, module.running_var = torch.full((24,), 30.0), torch.full((24,), 0.01)
    return model


def without_stem(run: Setting) -> Setting:
    head = [p for name, p in run.model.named_parameters() if name.startswith("9")]
    return Setting(run.model, run.batches, run.objective, torch.optim.AdamW(head, lr=3e-3))


class EndsInSoftmax(nn.Sequential):
    def forward(self, x):
        return super().forward(x).softmax(-1)


PLANTED = {
    "zero-weights": (lambda: setting(scaled(network(), "6.weight", 0.0)), "reset"),
    "non-finite-weights": (lambda: setting(with_nan(network())), "zero_non_finite"),
    "input-offset": (lambda: setting(batches=[(x + 100, y) for x, y in data()]), "standardize"),
    "momentum-too-high": (lambda: setting(betas=(0.9995, 0.999)), "set_beta1"),
    "labels-out-of-range": (lambda: setting(batches=[(x, y + 1) for x, y in data()]), "shift_labels"),
    "loss-double-softmax": (lambda: setting(nn.Sequential(*network(), nn.Softmax(-1))), "remove"),
    "loss-double-softmax in forward": (lambda: setting(EndsInSoftmax(*network())), "log_probabilities"),
    "dropout-rate": (lambda: setting(set_dropout(network(), 0.95)), "set"),
    "parameter-not-stepped": (lambda: without_stem(setting()), "add_to_optimizer"),
}


@pytest.mark.parametrize("code", PLANTED)
def test_what_is_offered_was_seen_to_cure_and_does_when_its_line_is_run(code: str):
    plant, name = PLANTED[code]
    run = plant()
    found = finding(inspected(run), code.partition(" ")[0])
    assert found.action is not None
    assert found.action.name == name
    assert found.rehearsal is not None
    assert found.rehearsal.is_gone
    if "softmax" in code:  # by the same loss, this easy problem is learned through two softmaxes too
        assert "measured by the loss as the remedy leaves it" in found.rehearsal.note
        assert found.rehearsal.after < found.rehearsal.before + 0.05 * math.log(4)
    else:
        assert not found.rehearsal.after >= 0.95 * found.rehearsal.before
    # The user pastes the line, and trains: by the plain loop, without this library's rehearsal.
    names = {"gm": gm, "torch": torch, "sample": run.batches[0]} | vars(run)
    exec(found.action.code, names)
    model, optimizer = names["model"], names["optimizer"]
    for step in range(50):
        x, y = names["batches"][step % len(names["batches"])]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    right = torch.cat([(model(x).argmax(-1) == y).float() for x, y in names["batches"]]).mean()
    assert right > 0.9


@pytest.mark.parametrize("named", [False, True, None], ids=["without names", "with names", "of this library"])
def test_a_new_head_is_added_to_any_optimizer(named: bool | None):
    model = network()
    given = model.named_parameters() if named else model.parameters()
    optimizer = gm.optim.Muon(model) if named is None else torch.optim.AdamW(given, lr=3e-3)
    model[-1] = nn.Linear(24, 4)
    found = finding(
        inspected(Setting(model, data(), gm.Objective.classification(), optimizer)), "parameter-not-stepped"
    )
    assert found.rehearsal is not None, found.remedy
    assert found.rehearsal.is_gone
    exec(found.action.code, {"model": model, "optimizer": optimizer})
    assert {*model.parameters()} <= {p for group in optimizer.param_groups for p in group["params"]}


def test_bfloat16_is_offered_where_the_batches_are_float16():
    model = network().to(torch.float16)
    batches = [(x.half(), y) for x, y in data()]
    run = Setting(model, batches, gm.Objective.classification(), torch.optim.AdamW(model.parameters(), lr=3e-3))
    assert finding(inspected(run), "parameter-float16").action == Action("cast_to_bfloat16")


def state(run: Setting) -> dict[str, Any]:
    assert run.optimizer is not None
    return {
        "model": copy.deepcopy(run.model.state_dict()),
        "optimizer": copy.deepcopy(run.optimizer.state_dict()),
        "gradients": [None if p.grad is None else p.grad.clone() for p in run.model.parameters()],
        "trainable": [p.requires_grad for p in run.model.parameters()],
        "modes": [m.training for m in run.model.modules()],
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in run.model.modules()],
        "batches": [(x.nan_to_num(9.0), y.clone()) for x, y in run.batches],
        "random": torch.get_rng_state(),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("code", ["input-offset", "norm-statistics"])
def test_the_users_model_optimizer_batches_and_random_state_stay_bitwise(code: str):
    run = PLANTED[code][0]() if code in PLANTED else setting(set_dropout(with_statistics(network(norm=True)), 0.3))
    assert run.optimizer is not None
    run.objective.loss(run.model, run.batches[0])[0].backward()
    run.optimizer.step()  # so that the optimizer has a state
    before = state(run)
    report = inspected(run)
    assert finding(report, code).severity != "info"
    assert same(before, state(run))


class Net(nn.Sequential):
    """A network beside whose layers stands a list that shares one module."""

    def forward(self, input: Tensor) -> Tensor:
        for layer in list(self)[:5]:
            input = layer(input)
        return input


def run_of(name: str) -> Setting:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shared = nn.Linear(3, 3)
        model = Net(nn.Linear(8, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Sigmoid(), nn.Dropout(0.9))
        model.append(nn.ModuleList([shared, shared]))
    model[5].requires_grad_(name != "unfreeze")
    batches = [(x, y.clamp(max=2)) for x, y in data(2, 6)]
    if name == "replace_non_finite":
        batches = [(x.index_fill(0, torch.tensor([2]), math.nan), y) for x, y in batches]
    make = torch.optim.Adam if name == "set_beta1" else torch.optim.SGD
    return Setting(model, batches, gm.Objective.classification(), make(list(model.parameters())[:2], lr=0.5))


@pytest.mark.parametrize("name", [name for name in PERFORMED if name != "tie"])
@pytest.mark.filterwarnings("ignore::gramian.errors.GramianWarning")
def test_the_line_that_is_shown_does_what_was_verified(name: str):
    action, run = Action(name, ARGUMENTS.get(name, {})), run_of(name)
    pasted, start = run.copied(), state(run)
    names = {"gm": gm, "torch": torch, "sample": pasted.batches[0]} | vars(pasted)
    torch.manual_seed(0)
    exec(action.code, names)
    by_hand = Setting(names["model"], names["batches"], names["objective"], names["optimizer"])
    torch.manual_seed(0)
    performed = perform(action, run.copied())
    assert same(state(performed), state(by_hand))
    assert [p.requires_grad for p in performed.model.parameters()] == [
        p.requires_grad for p in by_hand.model.parameters()
    ]
    x = performed.batches[0][0].to(performed.model[0].weight.dtype)
    assert torch.equal(performed.model.eval()(x), by_hand.model.eval()(x))
    assert same(start | {"random": 0}, state(run) | {"random": 0})


HARM = Action("rescale", {"name": "9.weight", "factor": 1e-30})


def test_what_does_not_help_is_not_offered_and_advice_says_that_it_was_tried():
    run = setting()
    report = Report("net", [Finding("gate-shut", "error", "t", "0", action=HARM, advice="Lower it.")])
    found = verified(report, run, moments=(0, 5)).findings[0]
    assert (found.action, found.rehearsal) == (None, None)
    assert found.advice.startswith("Lower it. Tried on a copy and not offered: ")


def losses_alike(run: Setting, action: Action, steps: int) -> tuple[float, float]:
    """The naive way: train without the remedy and with it, and measure both by the remedied loss."""
    found = []
    for remedied in (False, True):
        trained = perform(action, run.copied()) if remedied else run.copied()
        used = trained.batches[:5]  # of six, one is held out
        trained.model.train()
        for step in range(steps):
            x, y = used[step % 5]
            trained.optimizer.zero_grad()
            F.cross_entropy(trained.model(x), y).backward()
            trained.optimizer.step()
        scores = trained.model.eval()[:10](run.batches[5][0])
        found.append(F.cross_entropy(scores, run.batches[5][1]).item())
    return found[0], found[1]


def test_losses_with_and_without_a_removed_softmax_are_of_one_kind():
    run = PLANTED["loss-double-softmax"][0]()
    shown = finding(inspected(run), "loss-double-softmax")
    assert shown.rehearsal is not None
    assert shown.action is not None
    one_seed = verified(Report("net", [replace(shown, rehearsal=None)]), run, moments=(12,), num_seeds=1).findings[0]
    assert one_seed.rehearsal is not None
    before, after = losses_alike(run, shown.action, 12)
    assert one_seed.rehearsal.before == pytest.approx(before, rel=1e-4)
    assert one_seed.rehearsal.after == pytest.approx(after, rel=1e-4)


def test_fresh_statistics_alone_are_no_gain():
    """They lower the loss of the stored ones at once, which a few steps of training do as well."""
    run = setting(network(norm=True), lr=0.02)
    for batch in run.batches * 5:
        run.optimizer.zero_grad()
        run.objective.loss(run.model, batch)[0].backward()
        run.optimizer.step()
    with_statistics(run.model)
    report = Report("net", [Finding("gate-shut", "error", "t", "0", action=Action("update_statistics"))])
    found = verified(report, run, moments=(0, 100)).findings[0]
    assert found.action is None
    assert "training without it comes as far" in found.advice
    report = Report("net", [Finding("norm-statistics", "error", "t", "1", action=Action("update_statistics"))])
    assert verified(report, run, moments=(0, 6)).findings[0].action == Action("update_statistics")


def test_an_action_that_fails_is_not_offered_and_advice_says_why():
    absent = Action("standardize", {"of": 'batch["x"]', "module": "", "at": "args[0]"})
    report = Report("net", [Finding("gate-shut", "warning", "t", "data", action=absent)])
    assert "TypeError" in verified(report, setting(), moments=(2,)).findings[0].advice


def test_what_is_gone_with_an_earlier_remedy_gets_none_of_its_own():
    run = setting(scaled(network(), "6.weight", 0.0))
    zero = Finding("zero-weights", "error", "t", "6.weight")
    follows = Finding("gain-below-one", "error", "t", "all layers", action=Action("isometric_"))
    first, second = verified(Report("net", [zero, follows]), run).findings
    assert first.rehearsal is not None
    assert second.action is None
    assert second.advice == "It is gone with the remedy for zero-weights."


def test_advice_that_no_code_performs_stays_as_it_was():
    found = Finding("graph-cut", "error", "t", "0", advice="Remove the detach.")
    report = Report("net", [found])
    assert verified(report, setting(), moments=(2,)).findings == [found]


def test_a_remedy_that_replaces_trained_weights_says_so():
    run = setting(network(norm=True))
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=0.02)
    for _ in range(30):
        for batch in run.batches:
            optimizer.zero_grad()
            run.objective.loss(run.model, batch)[0].backward()
            optimizer.step()
    run.model.get_parameter("4.weight").data.fill_(0.1)
    trained = {sign.name for sign in signs_of_training(run.model)}
    assert trained
    everything = perform(Action("reset_all"), run.copied())
    one = perform(Action("reset", {"names": ["4.weight"]}), run.copied())
    assert "trained weights" in " ".join(_lost(run, everything, trained))
    assert _lost(run, one, trained - {"4.weight"}) == []


def test_a_rehearsal_repeats_and_depends_on_its_seed_alone():
    run = setting(set_dropout(network(), 0.3))
    torch.manual_seed(1)
    first = rehearse(run, moments=(10,), seed=1)
    torch.manual_seed(2)
    assert rehearse(run, moments=(10,), seed=1) == first
    assert rehearse(run, moments=(10,), seed=2) != first


def test_training_that_raises_ends_at_infinity():
    assert rehearse(setting(batches=[(x, y + 1) for x, y in data()]), moments=(2, 8)) == [math.inf, math.inf]


def test_every_proposal_is_an_action_of_python():
    run = setting(set_dropout(network(norm=True), 0.9), lr=0.0)
    for code in CURES:
        for action in proposals(Finding(code, "error", "t", "0.weight, 1"), run):
            assert not action.is_command
            assert action.name in ACTIONS


def test_verification_needs_data():
    with pytest.raises(InputError, match="verified by training"):
        gm.inspect(network(), verify=True)


def test_a_command_line_is_not_performed():
    with pytest.raises(InputError, match="no cure that can be tried"):
        perform(Action("extract_lora", {"model": "a", "other": "b", "rank": 1}), setting())


def test_reset_draws_at_the_size_of_the_siblings_and_leaves_the_others():
    model = network()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1.3 / module.in_features**0.5)
    before = copy.deepcopy(model.state_dict())
    model.get_parameter("3.weight").data.mul_(1e-5)
    gm.init.reset_(model, ["3"])
    assert sizes(model)["3.weight"] == pytest.approx(1.3, rel=0.15)
    assert not bool(model.get_parameter("3.bias").any())
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items() if not n.startswith("3."))


def test_reset_opens_gates_and_refuses_unknown_names():
    lstm = nn.LSTM(4, 6)
    gm.init.reset_(lstm, ["bias_ih_l0"])
    assert lstm.bias_ih_l0.tolist() == [0.0] * 6 + [1.0] * 6 + [0.0] * 12
    with pytest.raises(InputError, match="neither a parameter nor a module"):
        gm.init.reset_(lstm, ["bias"])


def test_the_bench_counts_what_cures_by_training():
    cases = Path(__file__).parent.parent / "benchmarks/faults/cases.json"
    only = {"kinds": ["frozen-layers"], "architectures": ["mlp"], "seeds": [0]}
    shares, kinds = bench_rows(1, "", lambda what: None, cases=cases, **only)
    told = {m.method: m.remark for m in shares.measurements}
    assert told["offered remedies that cure"].startswith("1 of 1")
    assert told["cured by nothing"].startswith("0 of 1")
    assert kinds.measurements[0].remark == "1 of 1 cases offered; 1 of 1 cure: unfreeze"


def test_the_command_line_verifies(tmp_path: Path):
    task = tmp_path / "task.py"
    task.write_text(
        "import torch, gramian as gm\n"
        "def make():\n"
        "    def batches(epoch, generator):\n"
        "        x = torch.randn(64, 4, generator=generator)\n"
        "        return [(x + 300, x[:, :2])] * 2\n"
        "    return gm.Task(lambda: torch.nn.Linear(4, 2), gm.Objective.regression(), batches, lambda model: {})\n"
    )
    found = tmp_path / "found.json"
    assert main(["inspect", f"{task}:make", "--verify", "--json", str(found), "-q"]) == 0
    offered = finding(Report.from_json(found.read_text()), "input-offset")
    assert offered.action is not None
    assert offered.action.name == "standardize"
    assert main(["inspect", str(found), "--verify"]) == 2


def test_a_rehearsal_is_shown_and_survives_json():
    shown = Rehearsal(50, 2, math.inf, 0.25, after_spread=0.01, is_gone=True, note="It replaces trained weights.")
    report = Report("net", [Finding("c", "error", "t", action=Action("unfreeze"), rehearsal=shown)])
    assert "inf → 0.25 ± 0.01 (mean of 2 seeds ± their deviation); the finding is gone. It replaces" in " ".join(
        to_text(report).split()
    )
    assert "<dt>Verified</dt><dd>loss after 50 steps" in render(report.to_document())
    again = Report.from_json(report.to_json()).findings[0].rehearsal
    assert again is not None
    assert math.isnan(again.before)
    assert again.after == 0.25


class Attends(nn.Module):
    """A transformer of two layers that has to find a marker, its attention saturated where `scale` is large."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(10, 32), nn.Embedding(12, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 8)
        for layer in self.encoder.layers:
            for weight in (layer.self_attn.in_proj_weight, layer.self_attn.out_proj.weight):
                weight.data.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.places(torch.arange(x.shape[1]))
        return self.head(self.norm(self.encoder(h)).mean(1))


def marked(count: int = 8, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 8, (count * size, 12), generator=generator)
    place = torch.randint(0, 11, (count * size,), generator=generator)
    x[torch.arange(count * size), place] = 9
    return list(zip(x.split(size), x[torch.arange(count * size), place + 1].split(size), strict=True))


def attending(scale: float) -> Setting:
    torch.manual_seed(0)
    return setting(Attends(scale), marked(), lr=1e-3)


def test_a_finding_that_is_gone_keeps_its_remedy_where_few_steps_do_not_tell():
    run = attending(100.0)
    plain = finding(gm.inspect(run.model, run.batches, run.objective, quick=True), "attention-saturated")
    assert plain.action is not None
    assert plain.action.name == "isometric_"
    found = verified(Report("net", [plain]), run, moments=(12,)).findings[0]
    assert found.action is not None, found.remedy
    assert found.rehearsal.is_gone
    assert (
        found.rehearsal.after <= found.rehearsal.before + found.rehearsal.before_spread + found.rehearsal.after_spread
    )
    assert "too few to tell" in found.rehearsal.note
    names = {"gm": gm} | vars(run)
    exec(found.action.code, names)
    again = gm.inspect(names["model"], run.batches, run.objective, quick=True).findings
    assert "attention-saturated" not in {f.code for f in again}
    report = gm.inspect(attending(1.0).model, marked(), run.objective, quick=True)
    assert "attention-saturated" not in {f.code for f in report.findings}
    copies = finding(report, "repeated-weights")
    assert (copies.severity, copies.remedy) == ("info", "")
    assert "nn.TransformerEncoder" in copies.cause


def test_dead_units_behind_norms_are_cured_in_all_layers_that_are_named():
    model = network(norm=True)
    for name in ("5", "9"):
        nn.init.constant_(model.get_submodule(name).bias, -6.0)
    run = setting(model)
    plain = finding(gm.inspect(model, run.batches, run.objective, quick=True), "dead-units")
    assert plain.where == "5, 9"
    assert plain.action == Action("reset", {"names": ("5", "9")})
    found = finding(inspected(run), "dead-units")
    assert found.action is not None, found.remedy
    assert found.rehearsal.is_gone
