"""Objectives: a loss as a sum over known units, which curvature and second moments of gradients need.

A scalar mean hides the number of units it averages over: the mean over batches of 128 and 64 and over one of 192 give
second moments of the gradient that differ four-fold. So an objective is a pair: `predict(model, batch) -> output` and
`criterion(output, batch) -> (sum of losses, number of units)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from gramian import alignment, criteria
from gramian.autograd import Ungraded
from gramian.batch import described, main_input, num_samples, tensors
from gramian.calls import prepared
from gramian.errors import InputError
from gramian.misuse import instead_of_objective, misread

__all__ = ["Fisher", "Objective", "as_objective", "differentiates", "is_observed"]

Fisher = Literal["sampled", "empirical", "gauss_newton"]
Predict = Callable[[nn.Module, Any], Any]
Criterion = Callable[[Any, Any], tuple[Tensor, "Tensor | int"]]
# (output, batch, generator) -> losses, one for each column of a square root of the criterion's Hessian. The sum of the
# outer products of their gradients is the Fisher matrix (sampled) or the Gauss–Newton matrix (exact).
Factor = Callable[[Any, Any, torch.Generator], Iterator[Tensor]]
Padding = Callable[[Any], Tensor | None]
# (output, reference output, batch) -> how far apart they are, summed over units.
Divergence = Callable[[Any, Any, Any], Tensor]


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
        predict: `predict(model, batch) -> output`. It gets the batch on the model's device. It may differentiate on
            its way (a loss of derivatives by inputs): where no graph is kept, it is called with one if it needs it.
        criterion: `criterion(output, batch) -> (sum of losses, number of units)`: a scalar tensor and a count.
        fisher: which second moment of output gradients `capture` takes. `"empirical"`: that of the loss itself;
            `"sampled"`: of the loss with labels drawn from the model's own output; `"gauss_newton"`: with one backward
            pass for each output dimension, exact where each unit has its own rows, else unbiased. The last two need
            the function of that name.
        sampled, gauss_newton: `(output, batch, generator) -> losses`; the sum of the outer products of their gradients
            is that second moment.
        rows: `rows(batch) -> bool tensor (B, T)`, false where an input position is padding; or `None`, where none is.
            Such rows do not count in the second moments of layers' inputs of shape (B, T, …) or (B·T, features). By
            default all rows count.
        against: `against(teacher, remember=0) -> objective`, for an objective whose targets are a model's outputs: the
            same with those of another model, of which so many numbers are kept, by the object that a batch is; or
            `None`.
        divergence: `divergence(output, reference, batch)`: what the loss of an output is above that of a reference,
            summed over units, if labels are drawn from the reference; or `None`, where that is not known.

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
    against: Callable[..., Objective] | None = None
    divergence: Divergence | None = None

    def __post_init__(self) -> None:
        if not hasattr(self.criterion, "observed"):
            object.__setattr__(self, "criterion", _observed(self.criterion))
        if not hasattr(self.predict, "prepares"):
            object.__setattr__(self, "predict", _prepared(self.predict))

    def __repr__(self) -> str:
        names = [getattr(f, "__qualname__", type(f).__name__) for f in (self.predict, self.criterion)]
        told = " of ".join(dict.fromkeys(name.partition(".<locals>")[0] for name in reversed(names)))
        return f"<Objective: {told}, fisher {self.fisher!r}>"

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

    def loss(self, model: nn.Module, batch: Any, *, empty: bool = False) -> tuple[Tensor, Tensor]:
        """`(sum of losses, number of units)` of one batch, as two scalar tensors.

        Raises `InputError` where the criterion returns anything else, or no units.

        Args:
            model: passed to `predict`.
            batch: passed to `predict` and `criterion`.
            empty: whether a batch may have no units, as where all labels are ignored.
        """
        return self.checked(self._result(model, batch), empty=empty)

    def summed(self, model: nn.Module, batch: Any) -> tuple[Tensor, float]:
        """As `loss`, with the number of units as a number, which may be zero: what a training step needs.

        Args:
            model: passed to `predict`.
            batch: passed to `predict` and `criterion`.
        """
        total, _, number = self._read(self._result(model, batch), empty=True)
        return total, number

    def _result(self, model: nn.Module, batch: Any) -> Any:
        """What the criterion returns for a batch."""
        batch = prepared(model, batch)
        for observer in _OBSERVERS.get(self.criterion, ()):
            observer.before_forward(batch)
        predict = getattr(self.predict, "prepares", self.predict)  # the batch is prepared already
        ungraded: Ungraded = getattr(self.criterion, "ungraded")  # noqa: B009
        return ungraded(lambda: self.criterion(predict(model, batch), batch))

    def checked(self, result: Any, *, empty: bool = False) -> tuple[Tensor, Tensor]:
        """The criterion's result as two scalar tensors. Raises `InputError` for any other result.

        Args:
            result: of `criterion`.
            empty: whether it may have no units.
        """
        total, units, _ = self._read(result, empty=empty)
        if not isinstance(units, Tensor) or units.device != total.device:
            units = torch.as_tensor(units, device=total.device)
        return total, units if units.ndim == 0 else units.reshape(())

    def _read(self, result: Any, *, empty: bool) -> tuple[Tensor, Any, float]:
        """The sum of the losses, and the units, as the criterion gave them and as a number."""
        wanted = "criterion(output, batch) must return (sum of losses, number of units): a scalar tensor and a count"
        if not (type(result) is tuple or isinstance(result, Sequence)) or len(result) != 2:
            raise InputError(f"objective: {wanted}; got {described(result)}")
        total, units = result
        if not isinstance(total, Tensor) or total.numel() != 1:
            raise InputError(f"objective: {wanted}; the first is {described(total)}. Sum over the batch")
        if total.is_complex():
            raise InputError(f"objective: the loss is complex, {total.dtype}; wanted a real number, as loss.real")
        given = units if type(units) is int else torch.as_tensor(units)
        if total.is_meta or (isinstance(given, Tensor) and given.is_meta):
            raise InputError("objective: the loss or the units are on the meta device and have no values")
        number = float(given) if isinstance(given, int) else given.item() if given.numel() == 1 else math.nan
        # Compared as a number, since a comparison of tensors costs a small model more than the waiting for its result.
        if not (0 <= number < math.inf if empty else 0 < number < math.inf):
            told = described(torch.as_tensor(units))
            raise InputError(f"objective: units: {told}. A batch needs at least one unit, as a label")
        return total if total.ndim == 0 else total.reshape(()), units, float(number)

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

    def mask(self, batch: Any) -> Tensor | None:
        """Which rows of a batch's inputs count, (B, T) of bool; `None` where all do."""
        mask = None if self.rows is None else self.rows(batch)
        return None if mask is None or bool(mask.all()) else mask

    @staticmethod
    def classification(
        *,
        fisher: Fisher = "sampled",
        weight: Tensor | Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        padding: int | None = None,
        predict: Predict | None = None,
    ) -> Objective:
        """Cross-entropy of class scores `(..., C)` or `(B, C, ...)` against labels `(...)`; a unit is a label.

        For `(x, y)` and `(x, y, weights)`, and for mappings with labels: of samples `(B,)`, or of tokens `(B, T)`,
        which are not shifted (masked tokens, the outputs of a decoder). With weights, a label counts as that many
        units, so that the mean is that of `torch.nn.functional.cross_entropy`.

        Args:
            fisher: as in `Objective`.
            weight: of each class, C numbers.
            label_smoothing: between 0 and 1, as in torch.
            ignore_index: the label of units that have no loss and are not counted.
            padding: the input token whose rows do not count in the second moments of inputs.
            predict: `predict(model, batch) -> scores`, where the model is not called as `docs/objectives.md` says.
        """
        options = {"weight": weight, "label_smoothing": label_smoothing, "ignore_index": ignore_index}
        return _made(criteria.cross_entropy(alignment.aligned_labels(), padding=padding, **options), fisher, predict)

    @staticmethod
    def next_token(
        *,
        fisher: Fisher = "sampled",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        padding: int | None = None,
        predict: Predict | None = None,
    ) -> Objective:
        """Cross-entropy of the next token, from scores `(B, T, V)`; a unit is a token that is predicted.

        For `tokens`, `(tokens,)`, `(tokens, next tokens)` and `(tokens, next tokens, weights)`; and for mappings with
        `input_ids` and perhaps `labels`, which are shifted here, as Hugging Face's causal models do. Where
        `attention_mask` is 0, a position neither predicts nor is predicted.

        Args:
            fisher: as in `Objective`.
            label_smoothing: between 0 and 1, as in torch.
            ignore_index: the next token of units that have no loss and are not counted.
            padding: a token that does not count either, neither as next token nor as input.
            predict: `predict(model, batch) -> scores`, where the model is not called as `docs/objectives.md` says.
        """
        options = {"label_smoothing": label_smoothing, "ignore_index": ignore_index}
        how = alignment.aligned_tokens(padding)
        return _made(criteria.cross_entropy(how, padding=padding, **options), fisher, predict)

    @staticmethod
    def regression(*, fisher: Fisher = "gauss_newton", predict: Predict | None = None) -> Objective:
        """Squared error `½ Σ (ŷ − y)²` over the last dimension; a unit is a row of the output.

        For `(x, y)`, `(x, y, weights)` and mappings with labels. Integer targets are cast; `(B,)` and `(B, 1)` match.

        Args:
            fisher: as in `Objective`.
            predict: `predict(model, batch) -> ŷ`, where the model is not called as `docs/objectives.md` says.
        """
        return _made(criteria.squared_error(alignment.labels_of, checks=True), fisher, predict)

    @staticmethod
    def reconstruction(*, fisher: Fisher = "sampled", predict: Predict | None = None) -> Objective:
        """Squared error `½ Σ (x̂ − x)²` of the input itself, for `x`, `(x,)`, `(x, y)` and mappings.

        Args:
            fisher: as in `Objective`.
            predict: `predict(model, batch) -> x̂`, where the model is not called as `docs/objectives.md` says.
        """
        return _made(criteria.squared_error(main_input, checks=False), fisher, predict)

    @staticmethod
    def self_distillation(*, teacher: nn.Module | None = None, predict: Predict | None = None) -> Objective:
        """Squared error `½ Σ (ŷ − y)²` to the model's own output, for models without labels; a unit is a sample.

        The output is a tensor, or all tensors of floats in a tuple, dict or `ModelOutput`, but a loss. Outputs
        `(B, T, ...)` count where the batch's mask of tokens does. At the model itself the loss and its gradient are
        0, so G is that of labels drawn around the output, `fisher="sampled"`: how much a change of each layer's output
        moves the model's.

        Args:
            teacher: the model whose output is the target, to measure how far a changed model is from it; by default
                the model that is called.
            predict: `predict(model, batch) -> output`: which output, where not all count alike (an embedding that is
                pooled and normalized).

        >>> objective = Objective.self_distillation()
        >>> layer = nn.Linear(3, 2)
        >>> float(objective.loss(layer, torch.ones(4, 3))[0]), objective.fisher
        (0.0, 'sampled')
        """

        def against(other: nn.Module | None, remember: int = 0) -> Objective:
            return Objective(**criteria.own_output(predict, other, remember), fisher="sampled", against=against)

        return against(teacher)


def is_observed(objective: Objective) -> bool:
    """Whether a `gm.capturing` is to see every evaluation of an objective.

    Args:
        objective: any.

    Returns: whether it has an observer.
    Raises: nothing of its own.
    Cost: none.
    Source: this library's own.

    >>> is_observed(Objective.classification())
    False
    """
    return bool(_OBSERVERS) and objective.criterion in _OBSERVERS


def differentiates(objective: Objective, model: nn.Module, batch: Any) -> bool:
    """Whether an objective's `predict` differentiates on its way, so that it cannot do without a graph.

    Args:
        objective: any.
        model: passed to `predict`, as is the batch.
        batch: any of its batches.

    Returns: whether it does; known to the objective from then on.
    Raises: nothing of its own.
    Cost: that of `predict`.
    Source: this library's own.

    >>> differentiates(Objective.regression(), nn.Linear(3, 2), torch.ones(4, 3))
    False
    """
    with torch.no_grad():
        objective.predict(model, batch)
    return objective.predict.ungraded.needed  # type: ignore[attr-defined]


def as_objective(objective: Any) -> Objective:
    """An `Objective` unchanged; a plain `loss(model, batch)` as an objective with `fisher="empirical"`.

    A plain loss returns a scalar, which is taken for the mean over the samples of the batch; or `(sum, units)`, as a
    criterion does. The units decide the size of G and the weight of each batch. So where the scalar is a mean over
    tokens, return `(mean * tokens, tokens)`: taken for one over samples, it gives a G that is smaller by the number of
    tokens of a sample, and batches with fewer tokens that count count too much.

    Args:
        objective: either of these.

    Returns: an `Objective`.
    Raises:
        InputError: it is neither; later, where the function returns something else.
    Cost: none.
    Source: this library's own.

    >>> objective = as_objective(lambda model, batch: model(batch).mean())
    >>> total, units = objective.loss(nn.Linear(3, 2), torch.ones(4, 3))
    >>> int(units)
    4
    """
    if isinstance(objective, Objective):
        return objective
    if misused := instead_of_objective(objective, Objective):
        raise InputError(f"objective: expected gm.Objective or a function loss(model, batch) -> scalar mean, {misused}")

    def criterion(output: Any, batch: Any) -> tuple[Tensor, Any]:
        if isinstance(output, (tuple, list)) and len(output) == 2:
            return output[0], output[1]
        if not isinstance(output, Tensor) or output.numel() != 1:
            raise InputError(
                f"objective: loss(model, batch) must return a scalar mean, got {described(output)}. Or return (sum of "
                "losses, number of units)"
            )
        units = _num_samples(batch)
        return output * units, units

    @wraps(objective)
    def predict(model: nn.Module, batch: Any) -> Any:
        try:
            return objective(model, batch)
        except (TypeError, AttributeError) as error:
            if advice := misread(error, model, batch):
                raise InputError(f"objective: the function is called as loss(model, batch), and {advice}") from error
            raise

    return Objective(predict=predict, criterion=criterion)


def _num_samples(batch: Any) -> int:
    """Of a batch that only the loss understands, such as nested mappings, the length of its first tensor."""
    try:
        return num_samples(batch)
    except InputError:
        first = next((t for t in tensors(batch) if t.ndim), None)
        if first is None:
            raise
        return len(first)


def _made(fields: dict[str, Any], fisher: Fisher, predict: Predict | None) -> Objective:
    made = Objective(**fields, fisher=fisher)
    return made if predict is None else replace(made, predict=predict)


def _observed(criterion: Criterion) -> Criterion:
    @wraps(criterion)
    def observed(output: Any, batch: Any) -> tuple[Tensor, Tensor | int]:
        result = criterion(output, batch)
        for observer in _OBSERVERS.get(observed, ()):
            observer.after_criterion(output, batch, result)
        return result

    observed.observed = criterion  # type: ignore[attr-defined]
    observed.ungraded = Ungraded()  # type: ignore[attr-defined]
    return observed


def _prepared(predict: Predict) -> Predict:
    ungraded = Ungraded()

    @wraps(predict)
    def on_its_device(model: nn.Module, batch: Any) -> Any:
        return ungraded(predict, model, prepared(model, batch))

    on_its_device.prepares = predict  # type: ignore[attr-defined]
    on_its_device.ungraded = ungraded  # type: ignore[attr-defined]
    return on_its_device
