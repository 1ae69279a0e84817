"""A finding for which actions are asked, and what it names in its setting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from gramian.remedies.fitting import Fitting
from gramian.remedies.performing import Setting
from gramian.report import Action, Finding

__all__ = ["Asked", "Propose"]


@dataclass(frozen=True)
class Asked:
    """A finding, and the setting in which it was found."""

    finding: Finding
    setting: Setting

    @cached_property
    def fitting(self) -> Fitting:
        return Fitting(self.setting)

    @property
    def model(self) -> nn.Module:
        return self.setting.model

    @property
    def places(self) -> tuple[str, ...]:
        """The parameters and modules that the finding names; those that it only counts are missing."""
        known = {n for n, _ in self.model.named_parameters()} | {n for n, _ in self.model.named_modules() if n}
        words = self.finding.where.replace(" and ", ", ").split(", ")
        return tuple(word for word in words if word in known)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules that the finding names."""
        return {name: module for name, module in self.model.named_modules() if name in self.places}

    @property
    def group(self) -> int | None:
        """The optimizer's group whose modules the finding names; `None` where it names none, or there is one."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        first = self.finding.where.partition(",")[0].partition(" and ")[0]
        for i, group in enumerate(self.setting.groups if len(self.setting.groups) > 1 else ()):
            of = [names.get(id(p), "") for p in group["params"]]
            if any(name and (name == first or name.rpartition(".")[0] == first) for name in of):
                return i
        return None

    def parameters(self, condition: Callable[[Tensor], bool]) -> tuple[str, ...]:
        """The floating-point parameters that meet a condition."""
        return tuple(n for n, p in self.model.named_parameters() if p.is_floating_point() and condition(p.detach()))


Propose = Callable[[Asked], Iterator[Action]]
