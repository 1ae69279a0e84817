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

from .access import putting, steps_of
from .formatting import visible

__all__ = ["ACTIONS", "Action"]

# torch takes no group without names beside groups that have them, and no group with names beside those without.
_ADD = (
    'known = {{p for group in optimizer.param_groups for p in group["params"]}}\n'
    "new = [(name, p) for name, p in model.named_parameters() if p not in known]\n"
    'named = "param_names" in optimizer.param_groups[0]\n'
    'optimizer.add_param_group({{"params": new if named else [p for _, p in new]}})'
)

# Every number in floating point, also in the dicts and tuples with which a model is called.
_CAST = (
    "def cast(x):\n"
    "    if isinstance(x, dict):\n        return {{k: cast(v) for k, v in x.items()}}\n"
    "    if isinstance(x, (tuple, list)):\n        return tuple(map(cast, x))\n"
    "    return x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x\n\n"
)

# As `torch.optim.swa_utils.update_bn`, which calls the model itself and with one input.
_UPDATE = (
    "norms = {{m: m.momentum for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}}\n"
    "for m in norms:\n    m.reset_running_stats()\n    m.momentum = None\n"
    "mode = model.training\nmodel.train()\n"
    "with torch.no_grad():\n    for batch in batches:\n        {loss}(model, batch)\n"
    "model.train(mode)\nfor m in norms:\n    m.momentum = norms[m]"
)

# What stands above a hook.
_UNSAVED = "# Not in state_dict: put it into the data or into forward.\n"

# Name of an action: its code, Python or a command line that begins with "gramian". Every {parameter} must be given,
# but {more} stands for the keywords that `KEYWORDS` allows, and {hook} for a hook that changes what stands `at` a path.
# Python runs as it stands after `import torch, gramian as gm` with what `gm.inspect(model, batches, objective)` was
# given.
ACTIONS: dict[str, str] = {
    "isometric_": "gm.init.isometric_(model, next(iter(batches)){more})",
    "tie": "model.get_submodule({module}).{attribute} = model.get_parameter({source})",
    "plan_compression": "plan = gm.compress(model, batches=batches, objective=objective)",
    "compress": "plan = gm.compress(model, batches=batches, objective=objective)\nsmall = plan.at(keep={keep}).apply()",
    "inspect_files": "gramian inspect {model}\ngramian inspect {other}",
    "extract_lora": "gramian inspect {model} --against {other} --extract-lora {rank}",
    # Cures, which `gramian.remedies` performs by this very code on copies of what the names stand for.
    "reset": "gm.init.reset_(model, {names})",
    "reset_to_size": "gm.init.reset_(model, {names}, size={size})",
    "reset_all": "gm.init.reset_(model)",
    "rescale": "model.get_parameter({name}).data.mul_({factor})",
    "zero_non_finite": "for p in model.parameters():\n    p.data.nan_to_num_(0.0, 0.0, 0.0)",
    "fill_with_ones": "for name in {names}:\n    torch.nn.init.ones_(model.get_parameter(name))",
    "rectify": "for name in {names}:\n    model.set_submodule(name, torch.nn.ReLU())\n"
    "gm.init.isometric_(model, next(iter(batches)){more})",
    "remove": "model.set_submodule({module}, torch.nn.Identity())",
    "log_probabilities": _UNSAVED + "model.register_forward_hook("
    "lambda module, args, output: output.clamp(min=1e-30).log())",
    "set": "for name in {names}:\n    model.get_submodule(name).{attribute} = {value}",
    "unshare": "import copy\n\nmodel.set_submodule(\n    {module}, torch.nn.ModuleList(copy.deepcopy(m) for m in "
    "model.get_submodule({module}))\n)\n" + _ADD,
    "unfreeze": "model.requires_grad_(True)",
    "unfreeze_and_add": "model.requires_grad_(True)\n" + _ADD,
    "train_mode": "model.train()",
    "update_statistics": "torch.optim.swa_utils.update_bn(batches, model)",
    "update_statistics_by_loss": _UPDATE,
    "set_norm_momentum": "for name in {names}:\n    model.get_submodule(name).momentum = {momentum}\n"
    "torch.optim.swa_utils.update_bn(batches, model)",
    "cast_to_bfloat16": "model.to(torch.bfloat16)\n\n\n" + _CAST + "\n" + _UNSAVED + "model.register_forward_pre_hook("
    "lambda _, args, kwargs: (cast(args), cast(kwargs)), with_kwargs=True)",
    "standardize": "std, mean = torch.std_mean(torch.cat([{of} for batch in batches]), 0)\n"
    "std = std.where(std > 1e-6 * mean.abs(), torch.ones_like(std))  # constants aside\n" + _UNSAVED + "{hook}",
    "replace_non_finite": _UNSAVED + "{hook}",
    "shift_labels": "batches = [(x, y - {by}) for x, y in batches]",
    "add_to_optimizer": _ADD,
    "set_zero_rates": 'for group in optimizer.param_groups:\n    group["lr"] = group["lr"] or {rate}',
    "scale_rate": 'for group in optimizer.param_groups:\n    group["lr"] *= {factor}',
    "scale_rate_of": 'optimizer.param_groups[{group}]["lr"] *= {factor}',
    "set_momentum": 'for group in optimizer.param_groups:\n    group["momentum"] = {momentum}',
    "set_beta1": 'for group in optimizer.param_groups:\n    group["betas"] = ({beta1}, group["betas"][1])',
    "set_weight_decay": 'for group in optimizer.param_groups:\n    group["weight_decay"] = {decay}',
}

# What the hook of an action makes of {x}.
_HOOKED = {
    "standardize": "({x} - mean.to({x})) / std.to({x})",
    "replace_non_finite": "{x}.nan_to_num(0.0, 0.0, 0.0)",
}

# Keywords that an action may be given beside its parameters, and the values that each may have.
KEYWORDS: dict[str, dict[str, tuple[str | bool, ...]]] = {
    name: {"predict": ("objective", "objective.predict"), "overwrite": (True,)} for name in ("isometric_", "rectify")
}

# Parameters that are paths of data, and others that are pasted as they are, with what they may be.
_PATHS = ("of", "at")
_WORDS = {"loss": ("objective", "objective.loss")}

Argument = str | int | float | bool | tuple[str, ...]


@dataclass(frozen=True)
class Action:
    """One thing to do, by its name in `ACTIONS`, with a value for each parameter of its code.

    Args:
        name: a key of `ACTIONS`.
        arguments: a value for each `{parameter}` of that action's code, and any of its `KEYWORDS`.

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
        wanted, keywords = parameters(self.name), KEYWORDS.get(self.name, {})
        if set(self.arguments) - set(keywords) != set(wanted):
            raise InputError(
                f"action {self.name}: expected the arguments {', '.join(wanted) or '(none)'}; "
                f"got {', '.join(self.arguments) or '(none)'}."
            )
        # JSON has lists and no tuples.
        tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in self.arguments.items()}
        object.__setattr__(self, "arguments", tuples)
        for key, value in self.arguments.items():
            words = isinstance(value, tuple) and all(isinstance(word, str) for word in value)
            if not (words or isinstance(value, str | int | float)) or (
                key == "attribute" and not str(value).isidentifier()
            ):
                kind = "the name of an attribute" if key == "attribute" else "a word, a number or a list of words"
                raise InputError(f"action {self.name}: expected {key} to be {kind}, got {value!r}.")
            few = keywords.get(key) or _WORDS.get(key)
            if few is not None and value not in few:
                raise InputError(f"action {self.name}: expected {key} to be one of {few}, got {value!r}.")
            if key in _PATHS:
                steps_of(str(value))

    @property
    def is_command(self) -> bool:
        """Whether the code is a command line and not Python."""
        return ACTIONS[self.name].startswith("gramian ")

    @property
    def code(self) -> str:
        """The line or lines that perform the action, with the arguments filled in."""
        quoted = {key: self._quoted(key, value) for key, value in self.arguments.items()}
        more = "".join(f", {key}={quoted[key]}" for key in KEYWORDS.get(self.name, {}) if key in quoted)
        return ACTIONS[self.name].format_map(quoted | {"more": more, "hook": self._hook})

    @property
    def _hook(self) -> str:
        """The code that changes one of the tensors with which a module is called."""
        if self.name not in _HOOKED:
            return ""
        at, module = str(self.arguments["at"]), str(self.arguments["module"])
        new = putting(at, _HOOKED[self.name].format(x=at))
        called = f"model.get_submodule({self._quoted('module', module)})" if module else "model"
        if at.startswith("kwargs"):
            return f"{called}.register_forward_pre_hook(lambda _, args, kwargs: (args, {new}), with_kwargs=True)"
        return f"{called}.register_forward_pre_hook(lambda _, args: {new})"

    def _quoted(self, key: str, value: Argument) -> str:
        """Return the value as it stands in the code: names come from checkpoints, and users paste this code."""
        if self.is_command:
            return shlex.quote(str(value))
        if key in ("attribute", "predict", *_PATHS, *_WORDS):
            return str(value)
        # JSON's quotes, then Python's escapes for what would act on a terminal: what is shown is what runs.
        if not isinstance(value, str | tuple):
            return repr(value)
        return visible(json.dumps(value, ensure_ascii=False))


def parameters(name: str) -> list[str]:
    """Return the names of an action's parameters.

    >>> parameters("extract_lora")
    ['model', 'other', 'rank']
    """
    found = [key for _, key, _, _ in string.Formatter().parse(ACTIONS[name]) if key and key != "more"]
    words = [word for key in found for word in (("of", "module", "at") if key == "hook" else (key,))]
    return list(dict.fromkeys(words))
