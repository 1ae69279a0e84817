"""Objectives: a loss as a sum over known units, which curvature and second moments of gradients need.

A scalar mean hides the number of units it averages over: the mean over batches of 128 and 64 and over one of 192 give
second moments of the gradient that differ four-fold. So an objective is a pair: `predict(model, batch) -> output` and
`criterion(output, batch) -> (sum of losses, number of units)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from gramian.errors import InputError

__all__ = ["Fisher", "Objective", "as_objective"]

Fisher = Literal["sampled", "empirical", "gauss_newton"]
Predict = Callable[[nn.Module, Any], Any]
Criterion = Callable[[Any, Any], tuple[Tensor, "Tensor | int"]]
# (output, batch, generator) -> losses, one for each column of a square root of the criterion's Hessian. The sum of the
# outer products of their gradients is the Fisher matrix (sampled) or the Gauss–Newton matrix (exact).
Factor = Callable[[Any, Any, torch.Generator], Iterator[Tensor]]
Padding = Callable[[Any], Tensor]


class Observer(Protocol):
    """What `gm.capturing` implements, to be called when an objective is evaluated."""

    def before_forward(self, batch: Any) -> None:
        """Called before the forward pass of `Objective.loss`."""

    def after_criterion(self, output: Any, batch: Any, result: Any) -> None:
        """Called with the criterion's result."""


# Observers by the criterion that they observe, so that `dataclasses.replace` gives an objective that is observed too.
_OBSERVERS: dict[Criterion, list[Observer]] = {}


@dataclass(frozen=True)
class Objective:
    """A prediction and a sum of losses over known units.

    Args:
        predict: `predict(model, batch) -> output`.
        criterion: `criterion(output, batch) -> (sum of losses, number of units)`: a scalar tensor and a count.
        fisher: which second moment of output gradients `capture` takes. `"empirical"`: that of the loss itself;
            `"sampled"`: of the loss with labels drawn from the model's own output; `"gauss_newton"`: with one backward
            pass for each output dimension, exact where each unit has its own rows, else unbiased. The last two need
            the function of that name.
        sampled, gauss_newton: `(output, batch, generator) -> losses`; the sum of the outer products of their gradients
            is that second moment.
        rows: `rows(batch) -> bool tensor (B, T)`, false where an input position is padding. Such rows do not count in
            the second moments of layers' inputs of shape (B, T, …). By default all rows count.

    Raises: nothing of its own; `loss` and `losses` raise InputError.
    Cost: none.
    Source: Martens, New Insights and Perspectives on the Natural Gradient Method (1412.1193), §5, §9; the three
    estimators as named by Kunstner et al. (1905.12558).

    >>> objective = Objective.classification()
    >>> batch = (torch.zeros(8, 3), torch.zeros(8, dtype=torch.long))
    >>> total, units = objective.loss(nn.Linear(3, 2), batch)
    >>> int(units)
    8
    """

    predict: Predict
    criterion: Criterion
    fisher: Fisher = "empirical"
    sampled: Factor | None = None
    gauss_newton: Factor | None = None
    rows: Padding | None = None

    def __post_init__(self) -> None:
        if not hasattr(self.criterion, "observed"):
            object.__setattr__(self, "criterion", _observed(self.criterion))

    @contextmanager
    def observed_by(self, observer: Observer) -> Iterator[None]:
        """A context in which `observer` is called at every evaluation of this objective."""
        observers = _OBSERVERS.setdefault(self.criterion, [])
        observers.append(observer)
        try:
            yield
        finally:
            observers.remove(observer)
            if not observers:
                del _OBSERVERS[self.criterion]

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """`(sum of losses, number of units)` of one batch, as two scalar tensors.

        Raises `InputError` where the criterion returns anything else, or no units.

        Args:
            model: passed to `predict`.
            batch: passed to `predict` and `criterion`.
        """
        for observer in _OBSERVERS.get(self.criterion, ()):
            observer.before_forward(batch)
        return self.checked(self.criterion(self.predict(model, batch), batch))

    def checked(self, result: Any) -> tuple[Tensor, Tensor]:
        """The criterion's result as two scalar tensors. Raises `InputError` for any other result."""
        wanted = "criterion(output, batch) must return (sum of losses, number of units): a scalar tensor and a count"
        if not (isinstance(result, Sequence) and len(result) == 2):
            raise InputError(f"objective: {wanted}; got {_describe(result)}")
        total, units = result
        if not isinstance(total, Tensor) or total.numel() != 1:
            raise InputError(f"objective: {wanted}; the first is {_describe(total)}. Sum over the batch")
        units = torch.as_tensor(units, device=total.device)
        if units.numel() != 1 or not units > 0:
            raise InputError(f"objective: {wanted}; the second is {_describe(units)}. A batch needs at least one unit")
        return total.reshape(()), units.reshape(())

    def losses(self, output: Any, batch: Any, fisher: Fisher, generator: torch.Generator) -> Iterator[Tensor]:
        """The losses whose gradients' outer products sum to the second moment `fisher`.

        Raises `InputError` where this objective lacks it.

        Args:
            output: of `predict`.
            batch: as passed to `predict`.
            fisher: "empirical", "sampled" or "gauss_newton".
            generator: draws labels and signs.
        """
        if fisher == "empirical":
            yield self.checked(self.criterion(output, batch))[0]
            return
        factor = self.sampled if fisher == "sampled" else self.gauss_newton if fisher == "gauss_newton" else None
        if factor is None:
            raise InputError(
                f"objective: fisher={fisher!r} is not available here; wanted 'empirical'"
                f"{', sampled' if self.sampled else ''}{', gauss_newton' if self.gauss_newton else ''}. "
                "Objective.classification(), .regression() and .next_token() have all three"
            )
        yield from factor(output, batch, generator)

    @staticmethod
    def classification(
        *, fisher: Fisher = "sampled", ignore_index: int = -100, padding: int | None = None
    ) -> Objective:
        """Cross-entropy of class scores `(..., C)` against labels `(...)` for `(x, y)` batches; a unit is a label.

        Args:
            fisher: as in `Objective`.
            ignore_index: the label of units that have no loss and are not counted.
            padding: the input token whose rows do not count in the second moments of inputs.
        """
        return _cross_entropy(_first, lambda output, batch: (output, batch[1]), fisher, ignore_index, padding)

    @staticmethod
    def next_token(*, fisher: Fisher = "sampled", ignore_index: int = -100, padding: int | None = None) -> Objective:
        """Cross-entropy of the next token: output `(B, T, V)` for `(tokens,)` or `(tokens, next tokens)` batches.

        Args:
            fisher: as in `Objective`.
            ignore_index: the next token of units that have no loss and are not counted.
            padding: a token that does not count either, neither as next token nor as input.
        """

        def scores_and_labels(output: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
            if isinstance(batch, Tensor) or len(batch) == 1:
                tokens = batch if isinstance(batch, Tensor) else batch[0]
                output, labels = output[:, :-1], tokens[:, 1:]
            else:
                labels = batch[1]
            return output, labels if padding is None else labels.masked_fill(labels == padding, ignore_index)

        return _cross_entropy(_first, scores_and_labels, fisher, ignore_index, padding)

    @staticmethod
    def regression(*, fisher: Fisher = "gauss_newton") -> Objective:
        """Squared error `½ Σ (ŷ − y)²` over the last dimension, for `(x, y)` batches; a unit is a row of the output."""
        return _squared_error(lambda batch: batch[1], fisher)

    @staticmethod
    def reconstruction(*, fisher: Fisher = "sampled") -> Objective:
        """Squared error `½ Σ (x̂ − x)²` of the input itself, for `(x,)` or `(x, y)` batches."""
        return _squared_error(_inputs, fisher)


def as_objective(objective: Any) -> Objective:
    """An `Objective` unchanged; a plain `loss(model, batch) -> scalar mean` as an objective with `fisher="empirical"`.

    The units of a plain loss are the elements of the batch's first dimension.

    Args:
        objective: either of these.

    Returns: an `Objective`.
    Raises:
        InputError: it is neither; later, where the function does not return a scalar.
    Cost: none.
    Source: this library's own.

    >>> objective = as_objective(lambda model, batch: model(batch).mean())
    >>> total, units = objective.loss(nn.Linear(3, 2), torch.ones(4, 3))
    >>> int(units)
    4
    """
    if isinstance(objective, Objective):
        return objective
    if not callable(objective):
        raise InputError(
            "objective: expected gm.Objective or a function loss(model, batch) -> scalar mean, "
            f"got {_describe(objective)}"
        )

    def criterion(output: Tensor, batch: Any) -> tuple[Tensor, int]:
        if not isinstance(output, Tensor) or output.numel() != 1:
            raise InputError(f"objective: loss(model, batch) must return a scalar mean, got {_describe(output)}")
        units = _num_samples(batch)
        return output * units, units

    return Objective(predict=objective, criterion=criterion)


def _observed(criterion: Criterion) -> Criterion:
    @wraps(criterion)
    def observed(output: Any, batch: Any) -> tuple[Tensor, Tensor | int]:
        result = criterion(output, batch)
        for observer in _OBSERVERS.get(observed, ()):
            observer.after_criterion(output, batch, result)
        return result

    observed.observed = criterion  # type: ignore[attr-defined]
    return observed


def _inputs(batch: Any) -> Any:
    return batch if isinstance(batch, Tensor) else batch[0]


def _num_samples(batch: Any) -> int:
    """The length of the first dimension of the first tensor of a batch: a tensor, a sequence or a dict."""
    first = batch
    while isinstance(first, (Mapping, Sequence)) and not isinstance(first, str) and len(first):
        first = next(iter(first.values() if isinstance(first, Mapping) else first))
    if not isinstance(first, Tensor) or not first.ndim:
        raise InputError(f"objective: a batch must start with a tensor (samples, …), got {_describe(first)}")
    return len(first)


def _first(model: nn.Module, batch: Any) -> Any:
    return model(_inputs(batch))


def _cross_entropy(
    predict: Predict, scores_and_labels: Callable, fisher: Fisher, ignore_index: int, padding: int | None
) -> Objective:
    def flat(output: Any, batch: Any) -> tuple[Tensor, Tensor]:
        scores, labels = scores_and_labels(output, batch)
        if not isinstance(scores, Tensor) or scores.ndim < 2 or scores.shape[:-1] != labels.shape:
            raise InputError(
                f"objective: classification wants scores (..., classes) and labels (...), "
                f"got {_describe(scores)} and {_describe(labels)}"
            )
        scores = scores.flatten(0, -2)
        return scores if scores.dtype == torch.float64 else scores.float(), labels.flatten()

    def total(scores: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(scores, labels, reduction="sum", ignore_index=ignore_index)

    def criterion(output: Any, batch: Any) -> tuple[Tensor, Tensor]:
        scores, labels = flat(output, batch)
        return total(scores, labels), (labels != ignore_index).sum()

    def sampled(output: Any, batch: Any, generator: torch.Generator) -> Iterator[Tensor]:
        scores, labels = flat(output, batch)
        # A score that is not finite makes NaN gradients, which the diagnosis reports; multinomial would raise instead.
        p = scores.detach().softmax(-1).nan_to_num(1.0 / scores.shape[-1])
        drawn = torch.multinomial(p, 1, generator=generator).squeeze(-1)
        yield total(scores, torch.where(labels == ignore_index, labels, drawn))

    def gauss_newton(output: Any, batch: Any, generator: torch.Generator) -> Iterator[Tensor]:
        # diag(p) − ppᵀ = Σ_c p_c (e_c − p)(e_c − p)ᵀ: one loss per class, each example weighted by √p_c.
        scores, labels = flat(output, batch)
        weights = scores.detach().softmax(-1).sqrt() * (labels != ignore_index).unsqueeze(-1)
        weights = weights * _signs(weights, generator)
        for c in range(scores.shape[-1]):
            yield (weights[:, c] * -scores.log_softmax(-1)[:, c]).sum()

    rows = None if padding is None else lambda batch: _inputs(batch) != padding
    return Objective(predict, criterion, fisher, sampled, gauss_newton, rows)


def _squared_error(target: Callable[[Any], Tensor], fisher: Fisher) -> Objective:
    def criterion(output: Tensor, batch: Any) -> tuple[Tensor, int]:
        wanted = target(batch)
        if output.shape != wanted.shape:
            raise InputError(
                f"objective: output {tuple(output.shape)} and target {tuple(wanted.shape)} differ in shape"
            )
        rows = output.numel() // output.shape[-1] if output.ndim > 1 else len(output)
        return 0.5 * (output - wanted).square().sum(), rows

    def sampled(output: Tensor, batch: Any, generator: torch.Generator) -> Iterator[Tensor]:
        # The Hessian is the identity: labels from N(output, 1) give standard normal gradients.
        yield (torch.empty_like(output).normal_(generator=generator) * output).sum()

    def gauss_newton(output: Tensor, batch: Any, generator: torch.Generator) -> Iterator[Tensor]:
        columns = output.flatten(0, -2) if output.ndim > 1 else output.unsqueeze(-1)
        columns = columns * _signs(columns, generator)
        for c in range(columns.shape[-1]):
            yield columns[:, c].sum()

    return Objective(_first, criterion, fisher, sampled, gauss_newton)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random ±1: where several units share a layer's row (attention), their cross terms then cancel on average."""
    return torch.empty_like(like, requires_grad=False).bernoulli_(generator=generator).mul_(2).sub_(1)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}" if value.numel() != 1 else f"the value {value.item()}"
    return f"{type(value).__name__}" if not isinstance(value, (int, float)) else repr(value)
