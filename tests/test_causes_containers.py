"""What a model gives in any container is looked at alike; what the loss makes of a batch is an input all the same."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gramian as gm
from gramian.arguments import arguments_of
from gramian.inspection.experiments.containers import remade


@dataclass(frozen=True)
class Scores:
    logits: Tensor
    name: str = "scores"


class Output(OrderedDict):
    """As transformers' outputs are: a mapping whose entries are attributes too."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)


Named = namedtuple("Named", "logits")
WRAPS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda t: t,
    "dict": lambda t: {"logits": t},
    "OrderedDict": lambda t: OrderedDict(logits=t),
    "UserDict": lambda t: UserDict(logits=t),
    "output": lambda t: Output(logits=t, cache=None),
    "namedtuple": Named,
    "dataclass": Scores,
    "nested": lambda t: [(Named(t), "text")],
}


def logits(output: Any) -> Tensor:
    if isinstance(output, list):
        output = output[0][0]
    if isinstance(output, Tensor) or isinstance(getattr(output, "logits", None), Tensor):
        return getattr(output, "logits", output)
    return output["logits"]


class Classifier(nn.Module):
    def __init__(self, wrap: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head, self.wrap = nn.Linear(16, 32), nn.Linear(32, 4), WRAPS[wrap]

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.head(F.relu(self.inner(x))))


def codes(model: nn.Module, batches: Any, loss: Callable) -> dict[str, str]:
    return {f.code: f.severity for f in gm.inspect(model, batches, loss).findings if f.severity != "info"}


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Tensor]]:
    x = torch.randn(128, 16, generator=torch.Generator().manual_seed(0))
    return [{"x": part, "labels": part[:, :4].argmax(1)} for part in x.split(64)]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("wrap", WRAPS)
def test_a_loss_of_scores_in_a_container(wrap: str, sign: int, batches: Any) -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        likelihoods = logits(model(batch["x"])).log_softmax(-1)
        return -sign * (F.one_hot(batch["labels"], 4) * likelihoods).sum(-1).mean()

    assert codes(Classifier(wrap), batches, loss) == ({} if sign > 0 else {"loss-unbounded": "error"})


@pytest.mark.parametrize("wrap", WRAPS)
def test_containers_are_made_again_and_what_was_given_stays(wrap: str) -> None:
    given = WRAPS[wrap](torch.ones(2))
    made = remade(given, lambda t: t + 1)
    assert type(made) is type(given)
    assert (float(logits(made).sum()), float(logits(given).sum())) == (4.0, 2.0)


class WithLoss(Classifier):
    """Computes its loss itself where it gets labels, as models of transformers do."""

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        scores = self.head(F.relu(self.inner(x)))
        return self.wrap({"loss": F.cross_entropy(scores, labels), "logits": scores})


@pytest.mark.parametrize("wrap", [dict, Output])
def test_a_loss_that_the_model_computes_is_no_output(wrap: Callable, batches: Any) -> None:
    model = WithLoss("tensor")
    model.wrap = wrap
    assert codes(model, batches, lambda m, b: m(**b)["loss"]) == {}


@pytest.mark.parametrize("is_idle", [True, False])
def test_what_the_loss_gives_the_model_in_another_form_has_an_effect(is_idle: bool) -> None:
    """A spare parameter is a remark, unless something of the batch has no effect either."""
    model = Classifier("tensor")
    model.spare = nn.Parameter(torch.ones(1))
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    batch = {"x": x, "y": x[:, :4] ** 2, **({"other": torch.randn(64, 4)} if is_idle else {})}
    found = codes(model, [batch], lambda m, b: F.mse_loss(m(b["x"] / 2), b["y"]))
    assert found == ({"parameter-unused": "warning"} if is_idle else {})


class Headless(Classifier):
    """As transformers' models without a head, which are their own `base_model`."""

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_a_model_that_is_its_own_base_model(batches: Any) -> None:
    assert arguments_of(Headless("output")).any_place
    assert codes(Headless("output"), batches, lambda m, b: F.cross_entropy(m(b["x"]).logits, b["labels"])) == {}
