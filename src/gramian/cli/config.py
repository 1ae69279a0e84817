"""Options of a command from a TOML file."""

from __future__ import annotations

import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer

from gramian.errors import InputError, plain
from gramian.texts import read_text

__all__ = ["read_config"]

# The options that may be a table, which are `name=number,…` as flags; and a list, which are `a,b`.
TABLES = ("augment", "regularize")
LISTS = (*TABLES, "compare")


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """The callback of `--config FILE`: the file's values take the place of defaults, so that flags win.

    Keys are the names of the flags and arguments without dashes in front; `weight-decay` may be written `weight_decay`.
    What a flag takes as `name=number,…` may be a table, and what it takes as `a,b` a list.
    """
    if path is None or context.resilient_parsing:
        return path
    try:
        found = tomllib.loads(read_text(path))
    except OSError as error:
        raise InputError(f"--config {plain(path, 500)} cannot be read ({error.strerror}). Check the path") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"--config {plain(path, 500)} is not TOML: {plain(error, 300)}") from None
    parameters = {_key(parameter): parameter for parameter in context.command.params if not parameter.is_eager}
    values: dict[str, Any] = {}
    for name, value in found.items():
        key = name.replace("_", "-")
        if key not in parameters:
            near = get_close_matches(key, parameters, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(parameters)}"
            raise InputError(f"--config {plain(path, 500)}: unknown key {plain(name)!r}; {hint}")
        parameter = parameters[key]
        if parameter.name in values:
            raise InputError(f"--config {plain(path, 500)}: {key} is there twice, with - and with _")
        flag = _as_flag(path, key, value, getattr(parameter, "is_flag", False))
        try:
            parameter.process_value(context, flag)
        except typer.BadParameter as error:  # which would name the flag, that nobody has written
            told = f"{key} = {plain(repr(value), 100)}: {error.message}"
            raise InputError(f"--config {plain(path, 500)}: {told}") from None
        values[parameter.name] = flag
    context.default_map = values
    return path


def _key(parameter: Any) -> str:
    """The name of an option by its flag, as `weight-decay`; that of an argument as it is."""
    flags = [flag for flag in parameter.opts if flag.startswith("--")]
    return flags[0].removeprefix("--") if flags else parameter.name


def _as_flag(path: Path, key: str, value: Any, is_flag: bool) -> Any:
    """The value as the text that the flag would have, so that it is checked alike."""
    wanted = "true or false" if is_flag else "text or a number"
    if isinstance(value, bool) == is_flag:
        if is_flag or isinstance(value, (int, float, str)):
            return value if is_flag else str(value)
        if key in TABLES and isinstance(value, dict) and all(type(part) in (int, float) for part in value.values()):
            return ",".join(f"{name}={number!r}" for name, number in value.items())
        if key in LISTS and isinstance(value, list) and all(isinstance(part, str) for part in value):
            return ",".join(value)
    raise InputError(f"--config {plain(path, 500)}: {key} must be {wanted}; got {plain(value, 100)}")
