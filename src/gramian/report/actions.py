"""Actions: what to do about a finding, as a name in a closed table, with the code that does it.

An action is data, since reports do not depend on models. The packages above this one map an action's name to the
function that applies it, as `gramian.training.start` does.
"""

from __future__ import annotations

import json
import shlex
import string
from collections.abc import Mapping
from dataclasses import dataclass, field

from gramian.errors import InputError

from .formatting import visible

__all__ = ["ACTIONS", "Action"]

# Name of an action: its code, Python or a command line that begins with "gramian". Every {parameter} must be given.
# Python runs as it stands after `import torch, gramian as gm` with what `gm.inspect(model, batches, objective)` was
# given.
ACTIONS: dict[str, str] = {
    "isometric_": "gm.init.isometric_(model, next(iter(batches)))",
    "cast_to_bfloat16": "model.to(torch.bfloat16)",
    "tie": "model.get_submodule({module}).{attribute} = model.get_parameter({source})",
    "plan_compression": "plan = gm.compress(model, batches=batches, objective=objective)",
    "compress": "plan = gm.compress(model, batches=batches, objective=objective)\nsmall = plan.at(keep={keep}).apply()",
    "inspect_files": "gramian inspect {model}\ngramian inspect {other}",
    "extract_lora": "gramian inspect {model} --against {other} --extract-lora {rank}",
}

Argument = str | int | float | bool


@dataclass(frozen=True)
class Action:
    """One thing to do, by its name in `ACTIONS`, with a value for each parameter of its code.

    Args:
        name: a key of `ACTIONS`.
        arguments: a value for each `{parameter}` of that action's code, no more and no fewer.

    Raises:
        InputError: an unknown name, or arguments that do not fit the action.

    >>> Action("extract_lora", {"model": "tuned/", "other": "base/", "rank": 8}).code
    'gramian inspect tuned/ --against base/ --extract-lora 8'
    """

    name: str
    arguments: Mapping[str, Argument] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.name not in ACTIONS:
            raise InputError(f"action: expected one of {', '.join(ACTIONS)}; got {self.name!r}.")
        wanted = parameters(self.name)
        if set(self.arguments) != set(wanted):
            raise InputError(
                f"action {self.name}: expected the arguments {', '.join(wanted) or '(none)'}; "
                f"got {', '.join(self.arguments) or '(none)'}."
            )
        for key, value in self.arguments.items():
            if not isinstance(value, str | int | float) or (key == "attribute" and not str(value).isidentifier()):
                kind = "the name of an attribute" if key == "attribute" else "a word or a number"
                raise InputError(f"action {self.name}: expected {key} to be {kind}, got {value!r}.")

    @property
    def is_command(self) -> bool:
        """Whether the code is a command line and not Python."""
        return ACTIONS[self.name].startswith("gramian ")

    @property
    def code(self) -> str:
        """The line or lines that perform the action, with the arguments filled in."""
        quoted = {key: self._quoted(key, value) for key, value in self.arguments.items()}
        return ACTIONS[self.name].format_map(quoted)

    def _quoted(self, key: str, value: Argument) -> str:
        """Return the value as it stands in the code: names come from checkpoints, and users paste this code."""
        if self.is_command:
            return shlex.quote(str(value))
        if key == "attribute":
            return str(value)
        # JSON's quotes, then Python's escapes for what would act on a terminal: what is shown is what runs.
        return visible(json.dumps(value, ensure_ascii=False)) if isinstance(value, str) else repr(value)


def parameters(name: str) -> list[str]:
    """Return the names of an action's parameters.

    >>> parameters("extract_lora")
    ['model', 'other', 'rank']
    """
    return [key for _, key, _, _ in string.Formatter().parse(ACTIONS[name]) if key]
