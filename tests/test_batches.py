"""Batches as people have them: every form gives the same loss, units and second moments as its plain form."""

from __future__ import annotations

import re
import runpy
import warnings
from collections import UserDict, namedtuple
from dataclasses import dataclass
from inspect import unwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import gramian as gm
from cases import seeded
from gramian.batch import mapped
from gramian.calls import prepared
from gramian.errors import GramianWarning, InputError, TaskError, UnsupportedError
from gramian.samples import first_samples

Objective = gm.Objective
CLASSES = 3


@dataclass
class Samples:
    images: Tensor
    labels: Tensor


@dataclass
class Sample:
    x: Tensor
    y: Tensor


class Graph:
    """An object with `to` and named tensors, as in torch_geometric."""

    def __init__(self, x: Tensor, edge_index: Tensor, y: Tensor) -> None:
        self.x, self.edge_index, self.y = x, edge_index, y

    def to(self, device: Any) -> Graph:
        return Graph(self.x.to(device), self.edge_index.to(device), self.y.to(device))


class ByNames(nn.Module):
    """Takes the features of nodes and the edges, mixes neighbors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.layer(x.index_add(0, edge_index[1], x[edge_index[0]]))


class Whole(ByNames):
    def forward(self, data: Graph) -> Tensor:  # type: ignore[override]
        return super().forward(data.x, data.edge_index)


class Outputs(nn.Module):
    """Returns the scores in another form."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.layer, self.form = nn.Linear(4, CLASSES), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.layer(x))


def data(n: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = seeded(seed)
    x = torch.randn(n, 4, generator=g)
    return x, x[:, :CLASSES].argmax(-1)


def linear() -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Linear(4, CLASSES)


X, Y = data()
FORMS: dict[str, Any] = {
    "tuple": (X, Y),
    "list": [X, Y],
    "tuple_with_weights": (X, Y, torch.ones(len(X))),
    "dict": {"input": X, "labels": Y},
    "other_names": {"image": X, "label": Y},
    "user_dict": UserDict(input=X, labels=Y, sample_weight=torch.ones(len(X))),
    "unknown_keys": {"input": X, "labels": Y, "id": torch.arange(len(X))},
    "namedtuple": namedtuple("Batch", "images labels")(X, Y),
    "namedtuple_by_place": namedtuple("Batch", "first second")(X, Y),
    "dataclass": Samples(X, Y),
    "dataclass_xy": Sample(X, Y),
    "inputs_in_a_dict": ({"input": X}, Y),
    "numpy": (X.numpy(), Y.numpy()),
    "numpy_by_names": {"input": X.numpy(), "labels": Y.numpy()},
    "numpy_backwards": (X.flip(0).numpy()[::-1], Y.flip(0).numpy()[::-1]),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_loss_and_the_statistics_of_a_tuple(name: str) -> None:
    net = linear()
    total, units = Objective.classification().loss(net, FORMS[name])
    torch.testing.assert_close(total, F.cross_entropy(net(X), Y, reduction="sum"))
    assert float(units) == len(X)
    stats, wanted = (gm.capture(net, [batch], Objective.classification()) for batch in (FORMS[name], (X, Y)))
    for side in ("A", "G"):
        mine, plain = getattr(stats["weight"], side), getattr(wanted["weight"], side)
        torch.testing.assert_close(mine.matrix, plain.matrix)
        assert float(mine.count) == float(plain.count)


class Towers(nn.Module):
    """Takes two inputs by place."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, CLASSES), nn.Linear(4, CLASSES)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.left(left) + self.right(right)


class OptionalTower(Towers):
    def forward(self, left: Tensor, right: Tensor | None = None, scale: float = 1.0) -> Tensor:  # type: ignore[override]
        assert right is not None
        return super().forward(left, right) * scale


class AnyTowers(Towers):
    def forward(self, *towers: Tensor) -> Tensor:
        return super().forward(*towers)


class PairOfTowers(Towers):
    def forward(self, pair: tuple[Tensor, Tensor], scale: float = 1.0) -> Tensor:  # type: ignore[override]
        return super().forward(*pair) * scale


class TowersWithLoss(Towers):
    def forward(self, left: Tensor, right: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        assert labels.shape == left.shape[:1]
        return super().forward(left, right)


@pytest.mark.parametrize("model", [Towers, OptionalTower, AnyTowers, PairOfTowers, TowersWithLoss])
@pytest.mark.parametrize("form", [tuple, list])
def test_a_tuple_of_inputs_is_spread_where_forward_takes_as_many(model: type[Towers], form: type) -> None:
    net = model()
    batch = (form((X, X.flip(0))), Y)
    total, _ = Objective.classification().loss(net, batch)
    wanted = F.cross_entropy(net.left(X) + net.right(X.flip(0)), Y, reduction="sum")
    assert float(total) == pytest.approx(float(wanted), rel=1e-6)
    assert gm.capture(net, [batch], Objective.classification()).coverage == 1.0
    gm.inspect(net, [batch], Objective.classification())


def test_a_plain_loss_gets_tensors_for_numpy_arrays() -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    stats = gm.capture(linear(), [(X.numpy(), Y.numpy())], loss)
    assert stats.loss == pytest.approx(gm.capture(linear(), [(X, Y)], loss).loss)
    assert gm.suggest_lr(linear(), [X.numpy(), Y.numpy()], loss, optimizer="sgd", num_steps=2).lr > 0


def test_a_plain_loss_may_say_its_units() -> None:
    """The mean over tokens, taken for one over samples, would give a G that is smaller by the tokens of a sample."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    tokens = torch.randint(9, (5, 7), generator=seeded(0))

    def summed(model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        scores, labels = model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
        return F.cross_entropy(scores, labels, reduction="sum"), labels.numel()

    def mean(model: nn.Module, batch: Tensor) -> Tensor:
        total, units = summed(model, batch)
        return total / units

    wanted = gm.capture(model, [tokens], Objective.next_token(), fisher="empirical")
    found, by_samples = gm.capture(model, [tokens], summed), gm.capture(model, [tokens], mean)
    assert (found.units, found.loss) == (wanted.units, pytest.approx(wanted.loss))
    torch.testing.assert_close(found["1.weight"].G.matrix, wanted["1.weight"].G.matrix)
    torch.testing.assert_close(6 * by_samples["1.weight"].G.matrix, wanted["1.weight"].G.matrix)  # 6 tokens a sample


@pytest.mark.parametrize("model", [ByNames, Whole])
def test_a_graph_is_passed_whole_or_by_its_attributes(model: type[ByNames]) -> None:
    net, graph = model(), Graph(X, torch.tensor([[0, 1, 2], [1, 2, 0]]), Y)
    total, units = Objective.classification().loss(net, graph)
    mixed = X.index_add(0, graph.edge_index[1], X[graph.edge_index[0]])
    torch.testing.assert_close(total, F.cross_entropy(net.layer(mixed), Y, reduction="sum"))
    assert int(units) == len(X)
    assert gm.capture(net, [graph], Objective.classification())["layer.weight"].A is not None
    assert gm.capture(net, [graph], lambda model, batch: total / len(X) + 0 * model.layer.weight.sum()).units == len(X)


RETURNED: dict[str, Any] = {
    "tuple": lambda z: (z, None),
    "second": lambda z: (z.sum(), z),
    "dict": lambda z: {"loss": z.sum(), "logits": z},
    "other_key": lambda z: {"loss": z.sum(), "scores": z},
    "user_dict": lambda z: UserDict(logits=z),
    "named": lambda z: namedtuple("Out", "hidden logits")(z.sum(-1), z),
}


@pytest.mark.parametrize("name", RETURNED)
def test_every_form_of_output_is_read(name: str) -> None:
    net = Outputs(RETURNED[name])
    total, _ = Objective.classification().loss(net, (X, Y))
    torch.testing.assert_close(total, F.cross_entropy(net.layer(X), Y, reduction="sum"))
    objective = Objective.classification()
    assert torch.equal(objective.criterion(net(X), (X, Y))[0], total), "in a loop of one's own too"
    assert gm.suggest_lr(net, [(X, Y)] * 2, objective, optimizer="sgd", num_steps=2).lr > 0


def test_other_outputs_are_refused_with_what_was_wanted() -> None:
    with pytest.raises(InputError, match=r"returned dict with loss.*wanted a tensor \(\.\.\., classes\) for labels"):
        Objective.classification().loss(Outputs(lambda z: {"loss": z.sum()}), (X, Y))
    with pytest.raises(InputError, match=r"\(8, 4\), the shape of the target"):
        Objective.reconstruction().loss(Outputs(lambda z: (z, 1)), (X,))


def test_wrappers_are_looked_into() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    batch = {"x": X, "edge_index": torch.tensor([[0, 1], [1, 0]]), "y": Y, "id": torch.arange(len(X))}
    net = ByNames()
    plain, wrapped = (Objective.classification().loss(m, batch)[0] for m in (net, Wrapper(Wrapper(net))))
    assert torch.equal(plain, wrapped), "forward inside takes no 'id'"


def test_labels_are_passed_where_forward_requires_them() -> None:
    class Teacher(nn.Linear):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) + F.one_hot(y, CLASSES)

    net = Teacher(4, CLASSES)
    total, _ = Objective.classification().loss(net, {"x": X, "y": Y})
    torch.testing.assert_close(total, F.cross_entropy(net(X, Y), Y, reduction="sum"))


def test_predict_says_how_else_to_call_a_model() -> None:
    net = linear()
    objective = Objective.classification(predict=lambda model, batch: model(batch["left"] + batch["right"]))
    total, _ = objective.loss(net, {"left": X, "right": X, "labels": Y})
    torch.testing.assert_close(total, F.cross_entropy(net(2 * X), Y, reduction="sum"))


def test_images_have_their_classes_in_torch_s_order() -> None:
    net, images = nn.Conv2d(2, CLASSES, 1), torch.randn(4, 2, 5, 6, generator=seeded(0))
    labels = torch.randint(CLASSES, (4, 5, 6), generator=seeded(1))
    total, units = Objective.classification().loss(net, (images, labels))
    torch.testing.assert_close(total, F.cross_entropy(net(images), labels, reduction="sum"))
    assert int(units) == labels.numel()


# --- weights and masks ------------------------------------------------------------------------------------------------

WEIGHTED = [
    {"weight": torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64)},
    {"label_smoothing": 0.2},
    {"weight": torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64), "label_smoothing": 0.2},
    {},
]


@pytest.mark.parametrize("own", [False, True], ids=["one_each", "own_weights"])
@pytest.mark.parametrize("options", WEIGHTED, ids=lambda options: "+".join(options) or "plain")
def test_weights_give_torch_s_mean_and_the_exact_hessian(options: dict[str, Any], own: bool) -> None:
    n = 6
    scores = torch.randn(n, CLASSES, generator=seeded(0), dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 1, 0, -100])
    w = torch.tensor([2.0, 0.0, 0.5, 1.0, 3.0, 1.0], dtype=torch.float64) if own else torch.ones(n).double()
    batch = (None, labels, w) if own else (None, labels)
    objective = Objective.classification(**options)

    def unit(s: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(s[None], y[None], reduction="sum", **options)

    total, units = objective.checked(objective.criterion(scores, batch))
    each = F.cross_entropy(scores, labels, reduction="none", **options)
    torch.testing.assert_close(total, (w * each).sum())
    counted = w * (labels >= 0)
    by_class = options.get("weight", torch.ones(CLASSES).double())[labels.clamp_min(0)]
    torch.testing.assert_close(units.double(), (counted * by_class).sum())
    if not own:
        torch.testing.assert_close(total / units, F.cross_entropy(scores, labels, **options))

    hessians = torch.stack([torch.func.hessian(unit)(s, y) for s, y in zip(scores.detach(), labels.clamp_min(0))])  # noqa: B905
    exact = hessians * counted[:, None, None]
    torch.testing.assert_close(moment(objective, scores, batch, "gauss_newton"), exact, rtol=1e-12, atol=1e-14)
    check_sampled(objective, scores, [part for part in batch if part is not None], exact)
    (g,) = torch.autograd.grad((w * each).sum(), scores)
    torch.testing.assert_close(moment(objective, scores, batch, "empirical"), g[:, :, None] * g[:, None, :])


def moment(objective: Objective, output: Tensor, batch: Any, fisher: Any, generator: Any = None) -> Tensor:
    """Σ over the losses of each row's outer product of gradients."""
    total = torch.zeros(*output.shape, output.shape[-1], dtype=output.dtype)
    for loss in objective.losses(output, batch, fisher, generator or seeded(0)):
        (g,) = torch.autograd.grad(loss, output, retain_graph=True)
        total += g[..., :, None] * g[..., None, :]
    return total


def check_sampled(objective: Objective, output: Tensor, rest: list[Tensor], exact: Tensor, draws: int = 4000) -> None:
    """The sampled second moment is the exact one in expectation, from many copies of each unit."""
    many = [t.detach().repeat(draws, *[1] * (t.ndim - 1)) for t in (output, *rest)]
    samples = moment(objective, many[0].requires_grad_(), (None, *many[1:]), "sampled").unflatten(0, (draws, -1))
    assert ((samples.mean(0) - exact).abs() <= 5 * samples.std(0) / draws**0.5 + 1e-12).all()
    assert samples.std(0).max() > 0.01


def test_weighted_squared_errors_are_the_sum_of_their_parts() -> None:
    output = torch.randn(5, 3, generator=seeded(0), dtype=torch.float64, requires_grad=True)
    wanted = torch.zeros(5, 3, dtype=torch.float64)
    wanted[1] = torch.nan
    w = torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    objective = Objective.regression()
    total, units = objective.checked(objective.criterion(output, (None, wanted, w)))
    torch.testing.assert_close(total, (w * 0.5 * output.square().sum(-1)).sum())
    assert float(units) == 6.5
    exact = w[:, None, None] * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(moment(objective, output, (None, wanted, w), "gauss_newton"), exact)
    check_sampled(objective, output, [wanted, w], exact)
    with pytest.raises(InputError, match=r"3 of 15 targets are NaN or infinite.*weight 0"):
        objective.criterion(output, (None, wanted))


def test_weights_reach_the_second_moments() -> None:
    """A weight of two counts as two copies where the Hessian is estimated, and a weight of zero as no sample."""
    net, w = linear(), torch.tensor([2.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    rows = [0, 0, 2, 3, 4, 5, 6, 7]
    weighted = gm.capture(net, [(X, Y, w)], Objective.classification(), fisher="gauss_newton")
    copied = gm.capture(net, [(X[rows], Y[rows])], Objective.classification(), fisher="gauss_newton")
    torch.testing.assert_close(weighted["weight"].G.matrix, copied["weight"].G.matrix)
    assert weighted.loss == pytest.approx(copied.loss)


@pytest.mark.parametrize("name", ["classification", "next_token"])
def test_masked_positions_weigh_nothing(name: str) -> None:
    """The same as the unmasked positions alone, in the loss, the units, A and every kind of G."""

    class Tokens(nn.Module):
        """Every position for itself; `flat` as in GPT-2, whose rows are not (B, T, D)."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layer, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            flat = torch.addmm(self.layer.bias, self.embed(input_ids).reshape(-1, 4), self.layer.weight.T)
            return self.head(flat.view(*input_ids.shape, 4).tanh())

    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = Tokens()
    g = seeded(0)
    ids, labels = torch.randint(9, (2, 6), generator=g), torch.randint(9, (2, 6), generator=g)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    plain = {"input_ids": torch.stack([ids[0, :4], ids[1, 2:]]), "labels": torch.stack([labels[0, :4], labels[1, 2:]])}
    objective = getattr(Objective, name)()
    for fisher in ("empirical", "gauss_newton", "sampled"):
        masked = gm.capture(net, [batch], objective, fisher=fisher)
        short = gm.capture(net, [plain], objective, fisher=fisher)
        assert (masked.units, masked.loss) == (short.units, pytest.approx(short.loss))
        for block in ("layer.weight", "head.weight"):
            torch.testing.assert_close(masked[block].A.matrix, short[block].A.matrix)
            assert float(masked[block].A.count) == 8
            if fisher != "sampled":
                torch.testing.assert_close(masked[block].G.matrix, short[block].G.matrix)
    with gm.capturing(net, objective) as live:
        total, units = objective.loss(net, batch)
        (total / units).backward()
    torch.testing.assert_close(
        live["head.weight"].G.matrix, gm.capture(net, [plain], objective, fisher="empirical")["head.weight"].G.matrix
    )
    torch.testing.assert_close(live["layer.weight"].A.matrix, masked["layer.weight"].A.matrix)


def test_half_precision_is_summed_in_float32() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        scores, labels = torch.randn(4096, CLASSES, generator=seeded(0)).to(dtype), torch.zeros(4096, dtype=torch.long)
        total, _ = Objective.classification().criterion(scores, (None, labels))
        torch.testing.assert_close(total, F.cross_entropy(scores.float(), labels, reduction="sum"))
        total, _ = Objective.regression().criterion(scores, (None, torch.zeros(4096, CLASSES, dtype=torch.long)))
        torch.testing.assert_close(total, 0.5 * scores.float().square().sum())
    net = linear().bfloat16()
    assert gm.capture(net, [(X.bfloat16(), Y)], Objective.classification())["weight"].G is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert gm.capture(linear(), [(X, Y)], Objective.classification())["weight"].G is not None
    with pytest.raises(
        InputError, match=r"inputs are float16 and the weights of Linear float32.*x\.to\(torch\.float32"
    ):
        Objective.classification().loss(linear(), (X.half(), Y))


def test_a_last_dimension_of_one_matches() -> None:
    net, y = nn.Linear(4, 1), torch.arange(8)
    total, units = Objective.regression().loss(net, {"input": X, "labels": y})
    torch.testing.assert_close(total, 0.5 * (net(X)[:, 0] - y).square().sum())
    assert int(units) == 8


def test_batches_go_to_the_model_s_device_once() -> None:
    """On `meta` nothing is moved; a device other than the CPU is played by a module that says where it is."""
    moves: list[Any] = []

    class Moved(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is Tensor.to:
                moves.append(args[1])
            return super().__torch_function__(func, types, args, kwargs or {})

    x = X.to("meta").as_subclass(Moved)
    batch = prepared(linear(), {"x": X, "n": 3})
    assert batch["x"] is X
    assert not moves
    split = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    assert prepared(split, x) is x, "several devices: left alone"
    with pytest.raises(NotImplementedError):
        prepared(linear(), (x, Y))  # a copy out of meta, which has no data, was tried
    assert moves == [torch.device("cpu")]


# --- iterables --------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(zip(X, Y, strict=True))


LOADERS: dict[str, Any] = {
    "loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=4),
    "workers": lambda: DataLoader(TensorDataset(X, Y), batch_size=4, num_workers=1),
    "iterable_dataset": lambda: DataLoader(Stream(), batch_size=4),
    "generator": lambda: ((X[i : i + 4], Y[i : i + 4]) for i in (0, 4)),
    "function": lambda: lambda: ((X[i : i + 4], Y[i : i + 4]) for i in (0, 4)),
    "iterator": lambda: iter([(X[:4], Y[:4]), (X[4:], Y[4:])]),
}


@pytest.mark.filterwarnings("ignore:compress. .* distinct units of the loss")
@pytest.mark.parametrize("name", LOADERS)
def test_what_can_be_iterated_once_is_enough(name: str) -> None:
    net, make = linear(), LOADERS[name]
    wanted = float(F.cross_entropy(net(X), Y).detach())
    assert gm.capture(net, make(), Objective.classification()).loss == pytest.approx(wanted)
    report = gm.inspect(net, make(), Objective.classification())
    half = len(X) // 2
    first = float(F.cross_entropy(net(X[:half]), Y[:half]).detach())
    assert report.facts["loss in training mode"] == pytest.approx(first)  # of the first batch
    deep = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, CLASSES))
    assert gm.compress(deep, batches=make(), objective=Objective.classification(), keep=0.9).parameters > 0
    found = gm.suggest_lr(net, make(), Objective.classification(), optimizer="sgd", num_steps=2)
    assert "2 batches, the last one judges" in found.why


def test_suggest_lr_reads_no_more_batches_than_it_needs() -> None:
    read: list[int] = []

    def endless() -> Any:
        while True:
            read.append(1)
            yield data(seed=len(read))

    found = gm.suggest_lr(linear(), endless, Objective.classification(), optimizer="sgd", num_steps=4)
    assert len(read) == 8
    assert "8 batches, the last 2 judge" in found.why
    state = torch.get_rng_state()
    gm.suggest_lr(
        linear(), DataLoader(TensorDataset(X, Y), 4, shuffle=True), Objective.classification(), optimizer="sgd",
        num_steps=2,
    )  # fmt: skip
    assert torch.equal(state, torch.get_rng_state())


def test_one_batch_by_names_is_one_batch_for_suggest_lr() -> None:
    for batch in ({"input": X, "labels": Y}, UserDict(input=X, labels=Y), Samples(X, Y), [X, Y]):
        found = gm.suggest_lr(linear(), batch, Objective.classification(), optimizer="sgd", num_steps=2)
        assert "one batch" in found.why


def test_no_batches_say_why() -> None:
    few = DataLoader(TensorDataset(X[:3], Y[:3]), batch_size=4, drop_last=True)
    spent = iter([(X, Y)])
    next(spent)
    cases = [(few, "3 samples for 4 a batch"), ([], "the list is empty"), (spent, r"can be used once.*list\(\.\.\.\)")]
    for batches, message in cases:
        for verb in (gm.capture, gm.inspect, gm.suggest_lr):
            with pytest.raises(InputError, match=rf"{verb.__name__}: there were no batches: .*{message}"):
                verb(linear(), batches, Objective.classification())


def test_an_objective_in_the_place_of_batches_is_told() -> None:
    objective = Objective.classification()
    with pytest.raises(InputError, match="got an Objective"):
        gm.inspect(nn.Linear(2, 2), objective, [(torch.ones(2, 2), torch.zeros(2).long())])
    with pytest.raises(InputError, match="got an Objective"):
        gm.Task(lambda: nn.Linear(2, 2), [], objective, lambda model: {})


def test_a_task_takes_a_loader_and_refuses_an_iterator() -> None:
    def task(batches: Any) -> gm.Task:
        return gm.Task(linear, Objective.classification(), batches, lambda model: {"one": 1.0})

    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
    runs = [gm.train(task(loader), optimizer="sgd", epochs=3) for _ in range(2)]
    assert runs[0].steps == 6
    assert torch.equal(runs[0].model.weight, runs[1].model.weight)
    with pytest.raises(TaskError, match=r"one epoch only.*DataLoader, list"):
        task(iter([(X, Y)]))
    spent = iter([(X, Y)] * 2)
    with pytest.raises(TaskError, match="the iterator of the last epoch, which is spent"):
        gm.train(task(lambda epoch, generator: spent), optimizer="sgd", steps=5)


# --- misuse -----------------------------------------------------------------------------------------------------------

CLASSIFY = Objective.classification()
# Without the check of types, which users do not have.
inspect, capture, suggest_lr = (unwrap(verb) for verb in (gm.inspect, gm.capture, gm.suggest_lr))
MISUSE: list[tuple[Any, str]] = [
    (lambda: inspect(linear(), [(X, Y)], nn.CrossEntropyLoss()), r"gm\.Objective\.classification\(\), or lambda"),
    (lambda: inspect(linear(), [(X, Y)], nn.CrossEntropyLoss), r"got CrossEntropyLoss.*classification\(\)"),
    (lambda: capture(linear(), [(X, Y)], F.cross_entropy), r"got cross_entropy.*classification\(\)"),
    (lambda: capture(linear(), [(X, Y)], nn.MSELoss()), r"gm\.Objective\.regression\(\), or lambda"),
    (lambda: capture(linear(), [(X, Y)], F.gelu), r"got gelu.*Write lambda model, batch"),
    (lambda: capture(linear(), [(X, Y)], "mse"), r"got .mse.. Write gm\.Objective"),
    (lambda: capture(linear(), [(X, Y)], Objective.classification), r"Call it: gm\.Objective\.classification\(\)"),
    (lambda: capture(linear(), [(X, Y)], None), "got NoneType"),
    (lambda: inspect(linear(), X, CLASSIFY), r"looks like one batch, a tensor of shape \(8, 4\). Write \[batch\]"),
    (lambda: inspect(linear(), (X, Y), CLASSIFY), r"looks like one batch.*Write \[batch\]"),
    (lambda: inspect(linear(), [X, Y], CLASSIFY), r"looks like one batch.*Write \[batch\]"),
    (lambda: capture(linear(), {"x": X, "y": Y}, CLASSIFY), r"one batch, dict with x, y. Write \[batch\]"),
    (lambda: capture(linear(), TensorDataset(X, Y), CLASSIFY), r"DataLoader\(dataset, batch_size=32\)"),
    (lambda: capture(linear(), 3, CLASSIFY), "must be a DataLoader, a list or another iterable of batches, got 3"),
    (lambda: capture(linear(), "digits", CLASSIFY), "another iterable of batches, got 'digits'"),
    (lambda: CLASSIFY.loss(linear(), DataLoader(TensorDataset(X, Y))), r"one batch, got a DataLoader.*next\(iter"),
    (lambda: inspect(nn.Linear), r"the class Linear. Give an instance: Linear\("),
    (lambda: inspect(linear().forward), "the function forward"),
    (lambda: inspect(linear().state_dict()), "perhaps a state dict"),
    (lambda: inspect(type("Pipeline", (), {"model": linear()})()), "got Pipeline, which has one: give its .model"),
    (lambda: inspect(torch.export.export(linear(), (X,))), r"exported\.module\(\)"),
    (lambda: inspect(nn.Linear(4, 3, device="meta")), "on the meta device"),
    (lambda: inspect(nn.LazyLinear(3)), "Run the model on one batch first"),
    (lambda: unwrap(gm.compress)(nn.Linear, batches=[(X, Y)], objective=CLASSIFY), "compress: .*the class Linear"),
    (lambda: suggest_lr(nn.Linear, [(X, Y)], CLASSIFY), "suggest_lr: .*the class Linear"),
    (lambda: gm.train(linear()), r"got the model Linear. Write gm\.Task\(lambda: model"),
    (lambda: gm.train("digits"), r"gm\.tasks\.load\('digits'\)"),
    (lambda: gm.train(lambda: 3), "If it makes the task, call it"),
    (lambda: gm.Task(linear(), CLASSIFY, [(X, Y)], len), r"got the model Linear. Write model=lambda: Linear\("),
    (lambda: gm.Task(linear, CLASSIFY, [(X, Y)], 3), "evaluate must be a function"),
    (lambda: CLASSIFY.loss(linear(), (X, Y, Y)), r"weights must be floating or bool, .* of torch\.int64"),
    (lambda: CLASSIFY.loss(linear(), (X, Y, X)), r"of shape \(8,\); got a tensor of shape \(8, 4\)"),
    (lambda: CLASSIFY.loss(linear(), (X, Y, -torch.ones(8))), "at least zero"),
    (lambda: CLASSIFY.loss(linear(), (X, Y, Y, Y)), "got 4 parts. Name them"),
    (lambda: CLASSIFY.loss(linear(), (X, Y.float())), r"integer labels \(\.\.\.\).*of torch\.float32"),
    (lambda: CLASSIFY.loss(linear(), (X,)), r"no tensor of labels in the batch"),
    (lambda: CLASSIFY.loss(linear(), {"input": X, "target_ids": Y}), "dict with input, target_ids; wanted"),
    (lambda: CLASSIFY.loss(linear(), {"input": [[1, 2]], "labels": Y}), "has no tensors: 'input' is"),
    (lambda: CLASSIFY.loss(ByNames(), {"a": X, "b": X, "c": X, "labels": Y}), "has a, b, c, but forward of ByNames"),
    (lambda: Objective.next_token().criterion(X, (X,)), "next_token wants integer tokens"),
    (lambda: Objective.next_token().criterion(X, (Y[None], Y[None] > 0)), "torch.bool.*give a mask by its name"),
    (lambda: Objective.classification(weight=[1.0, -1.0]), "at least zero, of each class"),
    (lambda: Objective.classification(weight=[1.0, 1.0]).loss(linear(), (X, Y)), "2 classes, and the scores 3"),
    (lambda: Objective.classification(label_smoothing=2.0), "between 0 and 1"),
    (lambda: CLASSIFY.loss(Towers(), (X, Y)), r"requires left, right, .* has one input.*\(\(left, right\), "),
    (lambda: CLASSIFY.loss(Towers(), ((X, X, X), Y)), r"requires left, right, and the batch has 3 inputs"),
    (lambda: CLASSIFY.loss(linear(), ((X, X), Y)), r"Linear was given \(a tensor .*, where a layer wants a tensor"),
    (lambda: CLASSIFY.loss(linear(), (X.tolist(), Y)), r"Linear was given list, where a layer wants a tensor"),
    (lambda: CLASSIFY.loss(linear(), (X.double().numpy(), Y.numpy())), r"inputs are float64.*x\.to\(torch\.float32"),
    (lambda: CLASSIFY.loss(linear(), (np.array(["a"]), Y)), r"NumPy array of <U1, which torch has not"),
    (lambda: capture(linear(), X.numpy(), CLASSIFY), r"looks like one batch, a NumPy array of shape \(8, 4\)"),
    (lambda: inspect(linear(), (X.numpy(), Y.numpy()), CLASSIFY), r"looks like one batch.*Write \[batch\]"),
    (lambda: capture(linear(), [X, X[:, :3]], Objective.regression()), r"looks like one batch.*Write \[batch\]"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(MISUSE)))
def test_misuse_gets_a_line_that_says_what_to_write(number: int) -> None:
    wrong, message = MISUSE[number]
    with pytest.raises((InputError, UnsupportedError), match=message) as caught:
        wrong()
    assert "\n" not in str(caught.value)


def test_a_list_of_tensors_of_one_kind_is_a_list_of_batches() -> None:
    stats = gm.capture(nn.Linear(4, 4), [X, X[:3]], Objective.reconstruction())
    assert stats.units == 11


def test_two_tensors_of_one_shape_may_be_one_batch_which_is_told() -> None:
    for verb in (gm.capture, gm.suggest_lr):
        with pytest.warns(
            GramianWarning, match=r"two tensors of one shape, \(8, 4\), is read as two batches.*\[\(x, y\)\]"
        ):
            verb(nn.Linear(4, 4), [X, X.flip(0)], Objective.reconstruction())
    with warnings.catch_warnings():
        warnings.simplefilter("error", GramianWarning)
        assert gm.capture(nn.Linear(4, 4), iter([X, X.flip(0)]), Objective.reconstruction()).units == 16
        gm.capture(nn.Linear(4, 4), [(X, X)], Objective.regression())


def test_parts_keep_their_form() -> None:
    cut = first_samples(Samples(X, Y), 2)
    assert isinstance(cut, Samples)
    assert (len(cut.images), len(cut.labels)) == (2, 2)
    pair = mapped(namedtuple("Pair", "a b")(X, "text"), len)
    assert (pair.a, pair.b) == (8, "text")


# --- Hugging Face -----------------------------------------------------------------------------------------------------

TINY = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50,
    "max_position_embeddings": 32,
}  # fmt: skip


def transformer(name: str) -> Any:
    t = pytest.importorskip("transformers")
    bert = t.BertConfig(**TINY, num_labels=CLASSES)
    make = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(num_key_value_heads=1, **TINY)),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0)
        ),
        "bert": lambda: t.BertForSequenceClassification(bert),
        "tokens": lambda: t.BertForTokenClassification(bert),
        "masked": lambda: t.BertForMaskedLM(bert),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=50, decoder_start_token_id=0)
        ),
        "whisper": lambda: t.WhisperForConditionalGeneration(
            t.WhisperConfig(
                vocab_size=50, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1,
                encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
                max_source_positions=10, max_target_positions=12, pad_token_id=1, bos_token_id=0, eos_token_id=2,
                decoder_start_token_id=2,
            )
        ),
        "vit": lambda: t.ViTForImageClassification(
            t.ViTConfig(**TINY, image_size=8, patch_size=4, num_labels=CLASSES)
        ),
    }  # fmt: skip
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return make[name]().eval()


def encoded(name: str) -> dict[str, Tensor]:
    """A padded batch with labels as the library's own collators make them."""
    g = seeded(0)
    ids, mask = torch.randint(3, 50, (4, 7), generator=g), torch.ones(4, 7, dtype=torch.long)
    mask[1, 4:] = mask[2, 6:] = 0
    tokens = {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}
    by_sample, by_token = torch.tensor([0, 1, 2, 0]), torch.randint(CLASSES, (4, 7), generator=g)
    hidden = torch.rand(4, 7, generator=g) < 0.5
    answer = torch.randint(3, 50, (4, 5), generator=g)
    answer[0, 3:] = -100
    return {
        "llama": tokens | {"labels": ids.masked_fill(mask == 0, -100)},
        "gpt2": tokens | {"labels": ids.masked_fill(mask == 0, -100)},
        "bert": tokens | {"token_type_ids": torch.zeros_like(ids), "labels": by_sample},
        "tokens": tokens | {"labels": by_token.masked_fill(mask == 0, -100)},
        "masked": tokens | {"labels": ids.masked_fill(~hidden | (mask == 0), -100)},
        "t5": tokens | {"labels": answer},
        "whisper": {"input_features": torch.randn(4, 8, 20, generator=g), "labels": answer},
        "vit": {"pixel_values": torch.randn(4, 3, 8, 8, generator=g), "labels": by_sample},
    }[name]


HUGGING_FACE = ("llama", "gpt2", "bert", "tokens", "masked", "t5", "vit")


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_models_and_batches_just_work(name: str) -> None:
    model = transformer(name)
    from transformers import BatchEncoding

    objective = Objective.next_token() if name in ("llama", "gpt2") else Objective.classification()
    batch = BatchEncoding(encoded(name))
    with torch.no_grad():
        total, units = objective.loss(model, batch)
        wanted = model(**batch).loss
    torch.testing.assert_close(total / units, wanted)
    report = gm.inspect(model, [batch, batch], objective, quick=True)
    assert report.facts["loss per unit"] == pytest.approx(float(wanted), rel=1e-5)
    assert not [f for f in report.findings if f.severity == "error"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_padding_of_hugging_face_batches_weighs_nothing(name: str) -> None:
    """Longer padding changes no second moment; without the mask it would."""
    model = transformer(name)
    objective = Objective.next_token() if name in ("llama", "gpt2") else Objective.classification()
    batch = encoded(name)
    longer = dict(batch)
    for key, value in (("input_ids", 1), ("attention_mask", 0), ("token_type_ids", 0), ("labels", -100)):
        if key in batch and batch[key].ndim == 2 and not (name == "t5" and key == "labels"):
            longer[key] = F.pad(batch[key], (0, 3), value=value)
    one, other = (gm.capture(model, [b], objective, fisher="empirical") for b in (batch, longer))
    assert one.units == other.units
    for block in one:
        for mine, theirs in zip(one[block], other[block], strict=True):
            if mine.G is None or mine.op == "embedding":
                continue
            assert float(mine.A.count) == float(theirs.A.count), block
            for side in "AG":
                wanted = getattr(mine, side).matrix
                found, size = getattr(theirs, side).matrix, float(wanted.abs().max())
                torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * size)


def test_rows_that_cannot_be_told_apart_are_named() -> None:
    model, batch = transformer("t5"), encoded("t5")
    batch["labels"] = F.pad(batch["labels"], (0, 2), value=-100)
    objective = Objective.classification()
    ready = prepared(model, batch)
    assert torch.equal(ready["decoder_input_ids"], model.prepare_decoder_input_ids_from_labels(labels=batch["labels"]))
    with pytest.warns(GramianWarning, match="cannot be told apart"):
        assert objective.mask(ready) is None
    total, units = objective.loss(model, batch)
    torch.testing.assert_close(total / units, model(**batch).loss)
    assert int(units) == 18, "the encoder's mask is not the labels'"


@pytest.mark.parametrize("objective", ["classification", "next_token"])
def test_a_decoder_s_labels_are_not_shifted(objective: str) -> None:
    model, batch = transformer("whisper"), encoded("whisper")  # it has no method that makes the decoder's inputs
    with torch.no_grad():
        total, units = getattr(Objective, objective)().loss(model, batch)
        torch.testing.assert_close(total / units, model(**batch).loss)


def test_suggest_lr_takes_a_batch_encoding() -> None:
    model = transformer("bert")
    from transformers import BatchEncoding

    found = gm.suggest_lr(model, BatchEncoding(encoded("bert")), Objective.classification(), num_steps=2)
    assert "one batch" in found.why
    assert found.lr > 0


def test_isometric_takes_a_batch_by_names() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES))
    gm.init.isometric_(net, {"image": X, "label": Y})
    first = net[0](X).square().mean().sqrt()  # type: ignore[operator]
    assert float(first) == pytest.approx(0.5, rel=1e-5)


# --- the page ---------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs" / "objectives.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_examples_of_the_page_run(number: int, tmp_path: Path) -> None:
    if "transformers" in EXAMPLES[number]:
        pytest.importorskip("transformers")
    (tmp_path / "example.py").write_text(EXAMPLES[number], encoding="utf-8")
    runpy.run_path(str(tmp_path / "example.py"))


def test_a_label_that_is_no_class_is_named() -> None:
    batch = torch.zeros(4, 3), torch.tensor([0, 1, 3, -100])
    with pytest.raises(InputError, match="the label 3 is none of 2 classes"):
        gm.Objective.classification().loss(nn.Linear(3, 2), batch)
    with pytest.raises(InputError, match="binary_cross_entropy_with_logits"):
        gm.Objective.classification().loss(nn.Linear(3, 1), (torch.zeros(4, 3), torch.ones(4, dtype=torch.long)))
