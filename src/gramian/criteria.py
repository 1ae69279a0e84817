"""The usual losses as sums over known units, with weights and masks, and the factors of their Hessians."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gramian.alignment import Align, Select, kept, unpadded, weights_of, with_dtype
from gramian.autograd import Ungraded
from gramian.batch import described, fields, is_pair, token_mask
from gramian.calls import called, tensor_of
from gramian.errors import InputError
from gramian.misuse import instead_of_labels

__all__ = ["cross_entropy", "own_output", "squared_error"]

# torch counts labels in float32, whose whole numbers end here.
LARGEST_COUNT = 2**24

_nll_loss = torch.ops.aten.nll_loss_forward.default


def _wide(t: Tensor) -> Tensor:
    """At least float32, in which losses are summed."""
    return t if t.dtype == torch.float64 else t.float()


def cross_entropy(
    how: tuple[Select, Align],
    *,
    weight: Tensor | Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    padding: int | None = None,
) -> dict[str, Any]:
    """Cross-entropy as the fields of an `Objective`.

    Args:
        how: finds the scores, and aligns them with labels.
        weight: of each class.
        label_smoothing: as in torch.
        ignore_index: the label that has no loss.
        padding: the input token whose rows do not count.

    Returns: predict, criterion, sampled, gauss_newton, divergence and rows.
    Raises:
        InputError: a weight or a smoothing that is out of range.
    Cost: none.
    Source: the definition; the weighted mean is that of `torch.nn.functional.cross_entropy`.

    >>> from gramian.alignment import aligned_labels
    >>> fields = cross_entropy(aligned_labels(), weight=[1.0, 3.0])
    >>> total, units = fields["criterion"](torch.zeros(2, 2), (None, torch.tensor([0, 1])))
    >>> float(units), round(float(total / units), 3)
    (4.0, 0.693)
    """
    select, align = how
    classes = None if weight is None else torch.as_tensor(weight)
    if classes is not None and (classes.ndim != 1 or not bool((classes >= 0).all())):
        raise InputError(f"objective: weight must be one number, at least zero, of each class; got {described(weight)}")
    if not 0 <= label_smoothing <= 1:
        raise InputError(f"objective: label_smoothing must be between 0 and 1, got {label_smoothing}")
    is_plain = classes is None and padding is None

    def flat(output: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scores (N, C), labels (N,) and weights (N,) or `None`; what does not count has `ignore_index`."""
        found = align(select(output, batch), batch)
        scores, labels = found.scores, found.labels
        integers = not labels.is_floating_point() and not labels.is_complex()
        if scores.ndim < 2 or scores.shape[:-1] != labels.shape or not integers:
            raise InputError(
                "objective: classification wants scores (..., classes) and integer labels (...), "
                f"got {described(scores)} and {with_dtype(labels)}{instead_of_labels(scores, labels, batch)}"
            )
        if classes is not None and len(classes) != scores.shape[-1]:
            raise InputError(f"objective: weight has {len(classes)} classes, and the scores {scores.shape[-1]}")
        labels = labels.long()
        labels = labels if found.keep is None else labels.masked_fill(~found.keep, ignore_index)
        weights = None if found.weights is None else found.weights.flatten()
        return _wide(scores.flatten(0, -2)), labels.flatten(), weights

    def is_flat(output: Any, batch: Any) -> bool:
        """Whether `flat` has nothing to do: scores (N, C) and labels (N,) of samples, on the processor."""
        if not is_plain or not is_pair(batch) or type(output) is not Tensor or output.dtype != torch.float32:
            return False
        labels = batch[1]
        if labels.dtype != torch.int64 or not (labels.is_cpu and output.is_cpu):
            return False
        return output.ndim == 2 and labels.ndim == 1 and len(output) == len(labels) > 0

    def total(scores: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        c = None if classes is None else classes.to(scores)
        options: Any = {"weight": c, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
        if scores.shape[-1] == 1:
            raise InputError(
                "objective: one score a unit is no classification, whose loss would be 0 for any score. Give the model "
                "two outputs, or write gm.Objective(predict, criterion) with binary_cross_entropy_with_logits"
            )
        try:
            if weights is None:
                return nn.functional.cross_entropy(scores, labels, reduction="sum", **options)
            losses = nn.functional.cross_entropy(scores, labels, reduction="none", **options)
        except IndexError as error:
            wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= scores.shape[-1]))]
            raise InputError(
                f"objective: the label {int(wrong[0]) if len(wrong) else '?'} is none of {scores.shape[-1]} classes, "
                f"wanted 0 to {scores.shape[-1] - 1}, or ignore_index={ignore_index}"
            ) from error
        return (torch.where(weights > 0, losses, 0.0) * weights).sum()

    def counts(scores: Tensor, labels: Tensor, weights: Tensor | None, smoothing: float = 0.0) -> Tensor:
        """How much each label counts: its own weight times that of its class, or of its smoothed classes."""
        counted = labels != ignore_index
        if classes is not None:
            c = classes.to(scores)
            counted = counted * ((1 - smoothing) * c[labels.clamp(0, len(c) - 1)] + smoothing * c.mean())
        return counted if weights is None else counted * weights

    def criterion(output: Any, batch: Any) -> tuple[Tensor, Tensor | int]:
        if is_flat(output, batch):
            labels = batch[1]
            losses = total(output, labels, None)
            if ignore_index < 0 and labels.min().item() >= 0:  # in one operation less: none is ignored
                return losses, len(labels)
            return losses, torch.count_nonzero(labels != ignore_index)
        scores, labels, weights = flat(output, batch)
        if weights is None and classes is None:
            return total(scores, labels, None), torch.count_nonzero(labels != ignore_index)
        return total(scores, labels, weights), counts(scores, labels, weights).sum()

    def counted(scores: Any, labels: Tensor) -> tuple[Tensor, float] | None:
        """The criterion of scores (N, C) and labels (N,), with the units as a number; `None` for all others.

        These are the two operations that torch's cross-entropy comes to; the second counts the labels.
        """
        if type(scores) is not Tensor or scores.dtype is not torch.float32 or labels.dtype is not torch.int64:
            return None
        if scores.ndim != 2 or scores.shape[1] == 1 or not len(labels) < LARGEST_COUNT:
            return None
        try:
            losses, number = _nll_loss(torch.log_softmax(scores, 1), labels, None, 2, ignore_index)
            return losses, number.item()
        except (IndexError, RuntimeError):  # the criterion says what is wrong
            return None

    if is_plain and not label_smoothing:
        criterion.counted = counted  # type: ignore[attr-defined]

    def predict(model: nn.Module, batch: Any) -> Any:
        return select(called(model, batch), batch)

    predict.is_call = True  # type: ignore[attr-defined]

    # The Hessian of a label's loss in its scores is diag(p) − ppᵀ times how much it counts, whatever the label. So the
    # two factors that estimate it multiply each loss by the square root of that.

    def sampled(output: Any, batch: Any, generator: torch.Generator) -> Iterator[Tensor]:
        scores, labels, weights = flat(output, batch)
        # A score that is not finite makes NaN gradients, which the diagnosis reports; multinomial would raise instead.
        p = scores.detach().softmax(-1).nan_to_num(1.0 / scores.shape[-1])
        drawn = torch.multinomial(p, 1, generator=generator).squeeze(-1)
        drawn = torch.where(labels == ignore_index, labels, drawn)
        if weights is None and classes is None:
            yield nn.functional.cross_entropy(scores, drawn, reduction="sum", ignore_index=ignore_index)
            return
        roots = counts(scores, labels, weights, label_smoothing).to(scores.dtype).sqrt()
        losses = nn.functional.cross_entropy(scores, drawn, reduction="none", ignore_index=ignore_index)
        yield (torch.where(roots > 0, losses, 0.0) * roots).sum()

    def divergence(output: Any, reference: Any, batch: Any) -> Tensor:
        scores, labels, weights = flat(output, batch)
        before, after = flat(reference, batch)[0].log_softmax(-1), scores.log_softmax(-1)
        each = torch.where(before.isneginf(), 0.0, before.exp() * (before - after)).sum(-1)
        counted = counts(scores, labels, weights, label_smoothing)
        return (torch.where(counted > 0, each, 0.0) * counted).sum()

    def gauss_newton(output: Any, batch: Any, generator: torch.Generator) -> Iterator[Tensor]:
        # diag(p) − ppᵀ = Σ_c p_c (e_c − p)(e_c − p)ᵀ: one loss per class, each example weighted by √p_c.
        scores, labels, weights = flat(output, batch)
        roots = counts(scores, labels, weights, label_smoothing).to(scores.dtype).sqrt()
        factors = scores.detach().softmax(-1).sqrt() * roots.unsqueeze(-1)
        factors = factors * _signs(factors, generator)
        for c in range(scores.shape[-1]):
            yield (factors[:, c] * -scores.log_softmax(-1)[:, c]).sum()

    return {
        "predict": predict,
        "criterion": criterion,
        "sampled": sampled,
        "gauss_newton": gauss_newton,
        "divergence": divergence,
        "rows": unpadded(padding),
    }


def squared_error(target: Callable[[Any], Tensor], *, checks: bool) -> dict[str, Any]:
    """Squared error as the fields of an `Objective`.

    Args:
        target: gives the target of a batch.
        checks: whether a target that is not finite is refused; that of a reconstruction is the input, whose faults the
            diagnosis reports.

    Returns: predict, criterion, sampled, gauss_newton, divergence and rows.
    Raises: nothing of its own.
    Cost: none.
    Source: the definition.

    >>> from gramian.alignment import labels_of
    >>> fields = squared_error(labels_of, checks=True)
    >>> fields["criterion"](torch.ones(2, 3), (None, torch.zeros(2, 3)))
    (tensor(3.), 2)
    """

    def matching(t: Tensor, shape: Sequence[int]) -> bool:
        """Whether the shapes are the same, but for a last dimension of one."""
        mine, other = tuple(t.shape), tuple(shape)
        return t.is_floating_point() and (mine == other or mine == (*other, 1) or (*mine, 1) == other)

    def select(output: Any, batch: Any) -> Tensor:
        try:
            shape = target(batch).shape
        except InputError:  # a forward pass alone needs no target
            return tensor_of(output, Tensor.is_floating_point, "of floats")
        return tensor_of(output, lambda t: matching(t, shape), f"{tuple(shape)}, the shape of the target")

    def rows(output: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Output and target (R, D), and how much each row counts, or `None` where each counts one."""
        output, wanted = select(output, batch), target(batch)
        if not matching(output, wanted.shape):
            raise InputError(
                f"objective: output {tuple(output.shape)} and target {tuple(wanted.shape)} differ in shape"
                + (
                    ". For classes, write gm.Objective.classification()"
                    if not wanted.is_floating_point() and output.shape[:-1] == wanted.shape
                    else ""
                )
            )
        output = _wide(output)
        wanted = wanted.to(output.device, output.dtype).reshape(output.shape)
        if output.ndim < 2:
            output, wanted = output.unsqueeze(-1), wanted.unsqueeze(-1)
        like = wanted[..., 0]
        weights, keep = weights_of(batch, like), kept(batch, like)
        if keep is not None:
            weights = keep.to(output.dtype) if weights is None else weights * keep
        if checks:
            counted = wanted if weights is None else wanted[weights > 0]
            if not bool(counted.isfinite().all()):
                bad = int((~counted.isfinite()).sum())
                raise InputError(
                    f"objective: {bad} of {counted.numel()} targets are NaN or infinite. Leave those samples out, or "
                    "give them weight 0: (x, y, weights)"
                )
        return output.flatten(0, -2), wanted.flatten(0, -2), None if weights is None else weights.flatten()

    def criterion(output: Any, batch: Any) -> tuple[Tensor, Tensor | int]:
        found, wanted, weights = rows(output, batch)
        if weights is None:
            return 0.5 * (found - wanted).square().sum(), len(found)
        losses = (found - wanted).square().sum(-1)
        return 0.5 * (torch.where(weights > 0, losses, 0.0) * weights).sum(), weights.sum()

    # The Hessian is the identity, times the weight of the row.

    def sampled(output: Any, batch: Any, generator: torch.Generator) -> Iterator[Tensor]:
        found, _, weights = rows(output, batch)
        noise = torch.empty_like(found).normal_(generator=generator)  # labels from N(output, 1)
        yield ((noise if weights is None else noise * weights.sqrt().unsqueeze(-1)) * found).sum()

    def divergence(output: Any, reference: Any, batch: Any) -> Tensor:
        found, _, weights = rows(output, batch)
        losses = (found - rows(reference, batch)[0]).square().sum(-1)
        return 0.5 * (losses if weights is None else torch.where(weights > 0, losses, 0.0) * weights).sum()

    def gauss_newton(output: Any, batch: Any, generator: torch.Generator) -> Iterator[Tensor]:
        found, _, weights = rows(output, batch)
        found = found if weights is None else found * weights.sqrt().unsqueeze(-1)
        columns = found * _signs(found, generator)
        for c in range(columns.shape[-1]):
            yield columns[:, c].sum()

    return {
        "predict": lambda model, batch: select(called(model, batch), batch),
        "criterion": criterion,
        "sampled": sampled,
        "gauss_newton": gauss_newton,
        "divergence": divergence,
        "rows": unpadded(None),
    }


def own_output(
    predict: Callable[[nn.Module, Any], Any] | None = None, teacher: nn.Module | None = None, remember: int = 0
) -> dict[str, Any]:
    """Squared error to a teacher's output, which is by default the model's own, as the fields of an `Objective`.

    Args:
        predict: `predict(model, batch) -> output`; by default the model is called.
        teacher: the model whose outputs are the targets; by default the outputs themselves, so that the loss is 0.
        remember: how many numbers of the teacher's outputs to keep, by the object that the batch is, where the teacher
            and the batches do not change.

    Returns: predict, criterion, sampled and rows; `sampled` is what curvature rests on.
    Raises: nothing of its own.
    Cost: with a teacher, one more forward pass for each batch.
    Source: the Gauss-Newton matrix of a squared error does not depend on its target (1412.1193, §8).

    >>> layer = nn.Linear(3, 2)
    >>> fields = own_output()
    >>> total, units = fields["criterion"](fields["predict"](layer, torch.ones(4, 3)), torch.ones(4, 3))
    >>> float(total), units
    (0.0, 4)
    """
    call, ungraded = predict or called, Ungraded()
    kept: dict[int, tuple[Any, list[Tensor]]] = {}  # with the batch, so that no other gets its id
    room = remember

    def wanted(teacher: nn.Module, batch: Any) -> list[Tensor]:
        nonlocal room
        if id(batch) in kept:
            return kept[id(batch)][1]
        with torch.no_grad():
            found = [one.detach() for one in _outputs(ungraded(call, teacher, batch))]
        size = sum(one.numel() for one in found)
        if size <= room:
            room, kept[id(batch)] = room - size, (batch, found)
        return found

    def pairs(model: nn.Module, batch: Any) -> list[tuple[Tensor, Tensor]]:
        found = _outputs(call(model, batch))
        if teacher is None:
            return [(one, one.detach()) for one in found]
        return list(zip(found, wanted(teacher, batch), strict=True))

    def counted(one: Tensor, batch: Any) -> Tensor:
        """The entries that are not padding: of an output (B, T, ...), those where the mask of tokens is true."""
        mask = token_mask(batch)
        return one[mask.to(one.device)] if mask is not None and one.shape[:2] == mask.shape else one

    def criterion(output: Any, batch: Any) -> tuple[Tensor, int]:
        errors = [counted(_wide(one) - _wide(target), batch).square().sum() for one, target in output]
        return 0.5 * torch.stack(errors).sum(), _num_rows(output)

    def sampled(output: Any, batch: Any, generator: torch.Generator) -> Iterator[Tensor]:
        parts = [counted(_wide(one), batch) for one, _ in output]
        noise = [torch.empty_like(one, requires_grad=False).normal_(generator=generator) for one in parts]
        yield torch.stack([(one * z).sum() for one, z in zip(parts, noise, strict=True)]).sum()

    return {"predict": pairs, "criterion": criterion, "sampled": sampled, "rows": unpadded(None)}


def _outputs(output: Any) -> list[Tensor]:
    """The tensors of floats of an output, without a loss: itself, or the entries of a tuple, dict or ModelOutput."""
    if isinstance(output, Tensor):
        found = [output]
    else:
        named = output if isinstance(output, Mapping) else fields(output)
        values = named.items() if named is not None else enumerate(output if isinstance(output, (tuple, list)) else ())
        found = [value for name, value in values if isinstance(value, Tensor) and name != "loss"]
    found = [one for one in found if one.is_floating_point() and one.numel()]
    if not found:
        raise InputError(
            f"objective: the model returned {described(output)}; wanted a tensor of floats, or a tuple, dict or "
            "ModelOutput with one. Else say which: predict=lambda model, batch: model(…)[…]"
        )
    return found


def _num_rows(output: Sequence[tuple[Tensor, Tensor]]) -> int:
    """The number of samples: the first dimension of the first output."""
    return output[0][0].shape[0] if output[0][0].ndim else 1


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random ±1: where several units share a layer's row (attention), their cross terms then cancel on average."""
    return torch.empty_like(like, requires_grad=False).bernoulli_(generator=generator).mul_(2).sub_(1)
