"""The tensors of the batches, as the rules for causes look at them: what the model is called with, and labels."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor, nn

from gramian.alignment import labels_of
from gramian.batch import main_input, parts
from gramian.errors import GramianError, some
from gramian.inspection.experiments.small_changes import Probes
from gramian.inspection.passes.batch_roles import Given, given_of, key
from gramian.inspection.passes.loss_inputs import VALUES
from gramian.inspection.passes.moments import moments
from gramian.inspection.passes.step_records import Observed

__all__ = ["SHOWN", "Fed"]

# Names that a finding spells out.
SHOWN = 6


class Fed:
    """What the batches hold, part of a `Context`."""

    model: nn.Module
    observed: Observed
    probes: Probes
    skipped: dict[str, str]

    @cached_property
    def has_float_inputs(self) -> bool:
        return all(main_input(batch).is_floating_point() for batch in self.observed.batches)

    @cached_property
    def targets(self) -> Tensor | None:
        """What the output of the first batch is compared with, where it is numbers and not classes."""
        output = self.observed.output
        for found in self.observed.criteria:
            if found.function in VALUES and output is not None and found.given.data_ptr() == output.data_ptr():
                return found.target if found.target.is_floating_point() else None
        return None

    @cached_property
    def labels(self) -> list[Tensor]:
        """The labels of the batches that have some."""
        found = []
        for batch in self.observed.batches:
            try:
                found.append(parts(batch).labels)
            except GramianError:
                continue
        return [y for y in found if isinstance(y, Tensor)]

    @cached_property
    def given(self) -> list[Given]:
        """The tensors of the batches, by key or place."""
        compared = {key(found.target) for found in self.observed.criteria}
        return given_of(self.observed.batches, self.observed.fed, compared)

    @cached_property
    def given_is_known(self) -> bool:
        """Whether the model was seen to be called with tensors of the batch."""
        return any(given.is_input for given in self.given)

    @cached_property
    def given_inputs(self) -> list[list[Tensor]]:
        """For each batch, the tensors that the model is called with; the main input where that is not known."""
        fed = [given for given in self.given if given.is_input]
        if fed:
            return [[given.values[i] for given in fed] for i in range(len(self.observed.batches))]
        others = [given.name for given in self.given if not given.is_label and not given.is_target]
        if len(others) > 1:
            self.skipped["inputs beside the main one"] = (
                f"the loss gives the model copies, so that it is not known which of {some(others, SHOWN)} it takes"
            )
        try:
            return [[main_input(batch)] for batch in self.observed.batches]
        except (GramianError, TypeError, ValueError, KeyError, IndexError):
            return []

    @cached_property
    def given_labels(self) -> list[Tensor | None]:
        """The labels of each batch: those with the name or place of labels; else, what only the loss takes."""
        fed = {id(given.values[0]) for given in self.given if given.is_input}
        found: list[Tensor | None] = []
        for batch in self.observed.batches:
            try:
                found.append(labels_of(batch))
            except (GramianError, TypeError, ValueError, KeyError, IndexError):
                found.append(None)
        if found and found[0] is not None and id(found[0]) not in fed:
            return found
        others = [given for given in self.given if given.is_target and not given.is_input]
        return list(others[0].values) if others else [None] * len(found) if fed else found

    @cached_property
    def are_compared(self) -> bool:
        """Whether the labels have the name of labels, or the loss is seen to compare an output with them.

        Beside others that only the loss takes, an output must be seen to depend on these alone.
        """
        labels = self.given_labels[0] if self.given_labels else None
        if labels is None:
            return False
        if self.beside_labels:
            return any(g.values[0] is labels and g.name in self.probes.labels for g in self.given)
        if any(given.is_label and given.values[0] is labels for given in self.given):
            return True
        targets = [found.target for found in self.observed.criteria]
        return any(
            key(t) == key(labels)
            or (t.numel() == labels.numel() and bool((t.flatten().cpu() == labels.flatten().cpu()).all()))
            for t in targets
        )

    @cached_property
    def beside_labels(self) -> list[str]:
        """What only the loss takes beside the labels, on which these may depend."""
        labels = self.given_labels[0] if self.given_labels else None
        others = [g for g in self.given if not g.is_input and not g.is_label and g.values[0] is not labels]
        return [g.name for g in others] if self.given_is_known else []

    @cached_property
    def num_labels(self) -> int:
        """The number of labels of the first batch where each sample has one; else 0."""
        try:
            labels = parts(self.observed.batches[0]).labels
        except (GramianError, IndexError):
            return 0
        return len(labels) if isinstance(labels, Tensor) and labels.ndim == 1 else 0

    def has_label_each(self, num: int) -> bool:
        """Whether the labels of the first batch are so many rows."""
        try:
            labels = parts(self.observed.batches[0]).labels
        except (GramianError, IndexError):
            return False
        return isinstance(labels, Tensor) and labels.ndim > 0 and len(labels) == num

    @cached_property
    def changes_inputs_first(self) -> bool:
        """Whether the first layer with weights is a norm, or gets other numbers than the batch holds."""
        for call in self.observed.calls:
            module = self.model.get_submodule(call.name)
            if any(True for _ in module.parameters(recurse=False)):
                try:
                    given = moments(main_input(self.observed.batches[0]).float()).rms
                except (GramianError, IndexError):
                    return False
                seen = call.input.rms if call.input is not None else given
                return "Norm" in call.kind or not 0.8 * given <= seen <= 1.25 * given
        return False
