"""How a model is called with a batch, and which tensor of what it returns is the output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.rnn import PackedSequence

from gramian import placement
from gramian.arguments import arguments_of
from gramian.batch import LABELS, WEIGHTS, Parts, described, fields, has_arrays, is_pair, mapped, parts, tensors
from gramian.errors import InputError, UnsupportedError
from gramian.misuse import instead_of_inputs, instead_of_model

__all__ = [
    "as_model",
    "as_module",
    "called",
    "check_values",
    "prepared",
    "tensor_of",
    "unwrapped",
    "wrappings",
]


def as_model(model: Any, verb: str) -> nn.Module:
    """The model that a verb was given, checked to be a module with values that can be run.

    Args:
        model: what the user gave.
        verb: for the error: who asks.

    Returns: the model, as it is.
    Raises:
        InputError: it is no `nn.Module`, with what to write instead.
        UnsupportedError: weights that have no values: on the meta device, or of a lazy layer that has not run.
    Cost: a pass over the parameters.
    Source: this library's own.

    >>> as_model(nn.Linear, "inspect")
    Traceback (most recent call last):
    gramian.errors.InputError: inspect: expected a torch.nn.Module, got the class Linear. Give an instance: Linear(…)
    """
    check_values(as_module(model, verb), verb)
    return model


def as_module(model: Any, verb: str) -> nn.Module:
    """The model that a verb was given, checked to be a module; its weights may be on the meta device.

    Args:
        model: what the user gave.
        verb: for the error: who asks.

    Returns: the model, as it is.
    Raises:
        InputError: it is no `nn.Module`, with what to write instead.
    Cost: none.
    Source: this library's own.

    >>> as_module("model.pt", "blocks")
    Traceback (most recent call last):
    gramian.errors.InputError: blocks: expected a torch.nn.Module, got the path 'model.pt'. Make the model, ...
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"{verb}: expected a torch.nn.Module, got {instead_of_model(model)}")
    return model


def check_values(model: nn.Module, verb: str, *, lazy: bool = False) -> None:
    """Refuses a model whose weights have no values.

    Args:
        model: a module.
        verb: for the error: who asks.
        lazy: whether layers are allowed that get their shapes from the first batch.

    Returns: nothing.
    Raises:
        UnsupportedError: a parameter or buffer on the meta device, or of a lazy layer that has not run.
    Cost: a pass over the parameters.
    Source: this library's own.

    >>> check_values(nn.LazyLinear(2), "isometric_", lazy=True)
    >>> check_values(nn.Linear(3, 2, device="meta"), "isometric_")
    Traceback (most recent call last):
    gramian.errors.UnsupportedError: isometric_: weight is on the meta device and has no values. Load...
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
            if lazy:
                continue
            raise UnsupportedError(
                f"{verb}: {name} of a lazy layer has no shape yet. Run the model on one batch first: model(x)"
            )
        if tensor.device.type == "meta":
            raise UnsupportedError(
                f"{verb}: {name} is on the meta device and has no values. Load the weights first (from_pretrained "
                "without device_map='disk' or 'meta', or model.to_empty(device=…) and load_state_dict)"
            )


def wrappings(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it is given, and one by one what is inside `torch.compile` and the data-parallel wrappers.

    Args:
        model: a module.

    Returns: the module itself first, and the user's own module last.
    Raises: nothing of its own.
    Cost: none.
    Source: torch's wrappers.

    >>> [type(m).__name__ for m in wrappings(nn.DataParallel(nn.Linear(2, 2)))]
    ['DataParallel', 'Linear']
    """
    inner: Any = model
    while isinstance(inner, nn.Module):
        yield inner
        parallel = isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        inner = inner.module if parallel else getattr(inner, "_orig_mod", None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside `torch.compile` and the data-parallel wrappers.

    Args:
        model: a module, wrapped or not.

    Returns: the innermost of `wrappings`.
    Raises: nothing of its own.
    Cost: none.
    Source: torch's wrappers.

    >>> net = nn.Linear(2, 2)
    >>> unwrapped(nn.DataParallel(net)) is net
    True
    """
    return [*wrappings(model)][-1]


def prepared(model: nn.Module, batch: Any) -> Any:
    """The batch as the model and a criterion take it: tensors on the model's device, with the inputs of a decoder.

    NumPy arrays become tensors of their dtype. A batch is moved where all parameters are on one device and none is
    sharded; otherwise it stays where it is. Where a mapping has token labels (B, T) and the model is an encoder with a
    decoder, `decoder_input_ids` are the labels shifted to the right, as the model itself would make them if it were
    given the labels.

    Args:
        model: the module that will be called.
        batch: any batch.

    Returns: the batch itself where there is nothing to do; else a new one.
    Raises:
        InputError: a NumPy array of a dtype that torch has not.
    Cost: none, or a copy to the device.
    Source: `prepare_decoder_input_ids_from_labels` of Hugging Face transformers.

    >>> x = torch.ones(2, 3)
    >>> prepared(nn.Linear(3, 1), (x, x))[0] is x
    True
    """
    first = _first_parameter(model)
    if is_pair(batch) and (first is None or (batch[0].device == first.device == batch[1].device)):
        return batch
    batch = mapped(batch, lambda t: t) if has_arrays(batch) else batch
    if first is not None and _is_elsewhere(batch, first.device) and _is_on_one_device(model):
        batch = mapped(batch, lambda t: t.to(first.device), lambda value: _moved(value, first.device))
    return _with_decoder_inputs(model, batch)


def _first_parameter(model: nn.Module) -> Tensor | None:
    """That of `model.parameters()`, whose walk keeps a set of all modules, which every step would pay for."""
    for parameter in model._parameters.values():
        if parameter is not None:
            return parameter
    for module in model._modules.values():
        found = None if module is None else _first_parameter(module)
        if found is not None:
            return found
    return None


def _is_elsewhere(batch: Any, device: torch.device) -> bool:
    """Whether a tensor is on another device, or an object's tensors, which are not seen, may be."""
    found: list[bool] = []
    mapped(batch, lambda t: found.append(t.device != device), lambda value: found.append(_can_move(value)))
    return any(found)


def _is_on_one_device(model: nn.Module) -> bool:
    devices = {p.device for p in model.parameters()}
    whole = not any(map(placement.is_sharded, model.parameters()))
    return len(devices) == 1 and whole and devices != {torch.device("meta")}


def _can_move(value: Any) -> bool:
    """Whether this is an object with a method `to`, such as a graph or a packed sequence."""
    return callable(getattr(value, "to", None)) and not isinstance(value, (nn.Module, type))


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if _can_move(value) else value


def _with_decoder_inputs(model: nn.Module, batch: Any) -> Any:
    named = fields(batch)
    if named is None:
        return batch
    labels, taken = parts(batch).labels, arguments_of(model).names
    given = any(named.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    if given or "decoder_input_ids" not in taken or not isinstance(labels, Tensor) or labels.ndim != 2:
        return batch
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if make is not None:
        return named | {"decoder_input_ids": make(labels=labels)}
    config = getattr(model, "config", None)
    start, padding = (getattr(config, f"{name}_token_id", None) for name in ("decoder_start", "pad"))
    if start is None:
        return batch
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], 1)
    return named | {"decoder_input_ids": shifted.masked_fill(shifted < 0, start if padding is None else padding)}


def called(model: nn.Module, batch: Any) -> Any:
    """What a model returns for the inputs of a batch: `model(x)`, or `model(**inputs)` where they have names.

    A tuple or list of inputs is spread, `model(left, right)`, where forward takes as many arguments by position, those
    whose default is a value (and not `None`) left aside; otherwise it is one argument. Named inputs that forward does
    not take are left out, unless it has `**kwargs`. Where forward takes none of the names: `model(value)` if it
    requires as many arguments as there are inputs, else `model(inputs)` if it requires one. An object with `to` (a
    graph) is passed whole, or by its attributes where forward requires several arguments and it has all of them.
    Labels and weights are passed, by name, only if forward requires them.

    Args:
        model: any module.
        batch: any batch, `prepared` for the model.

    Returns: what the model returns.
    Raises:
        InputError: the batch lacks what forward requires, or the inputs are no tensors, or of another dtype than the
            weights.
    Cost: a forward pass.
    Source: this library's own; the names are those of Hugging Face transformers.

    >>> called(nn.Flatten(), {"input": torch.ones(2, 3, 1), "labels": torch.zeros(2)}).shape
    torch.Size([2, 3])
    """
    given = None if is_pair(batch) and len(arguments_of(model).required) < 2 else parts(batch)
    args, kwargs = ((batch[0],), {}) if given is None else _matched(model, given, fields(batch) or {})
    try:
        return model(*args, **kwargs)
    except (RuntimeError, TypeError, AttributeError) as error:
        if hint := instead_of_inputs(error, model, batch, [*args, *kwargs.values()]):
            raise InputError(hint) from error
        raise


def _matched(model: nn.Module, given: Parts, whole: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of the model."""
    inputs = given.inputs
    named = fields(inputs)
    is_object = named is None and not isinstance(inputs, (Tensor, tuple, list)) and _can_move(inputs)
    if named is None and not is_object:
        return _by_place(model, given)
    if named and not any(True for _ in tensors(named)):
        first = next(iter(named))
        raise InputError(
            f"the batch has no tensors: {first!r} is {described(named[first])}. Tokenize with padding=True, "
            "return_tensors='pt'; or give a DataLoader of dataset.with_format('torch')"
        )
    takes = arguments_of(model)
    names, required = takes.names, takes.required
    if is_object:
        has_all = len(required) > 1 and all(getattr(inputs, name, None) is not None for name in required)
        return ((), {name: getattr(inputs, name) for name in required}) if has_all else ((inputs,), {})
    assert named is not None
    kept = named if takes.any_name else {name: value for name, value in named.items() if name in names}
    kept = {name: whole[name] for name in required if name in (*LABELS, *WEIGHTS) and name in whole} | kept
    missing = [name for name in required if name not in kept]
    if not missing and (kept or not named):
        return (), kept
    if not kept or takes.any_name:
        values = [value for value in named.values() if isinstance(value, Tensor)]
        if len(values) == len(required):
            return tuple(values), {}
        if len(required) == 1:
            return (inputs,), {}
    raise InputError(
        f"the batch has {', '.join(map(str, named)) or 'no inputs'}, but forward of {type(model).__name__} requires "
        f"{', '.join(missing or names) or 'nothing'}. Rename the keys, or say how to call it: "
        "predict=lambda model, batch: model(…)"
    )


def _by_place(model: nn.Module, given: Parts) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with inputs that have no names: one, or as many as there are in a tuple."""
    takes, inputs = arguments_of(model), given.inputs
    several = isinstance(inputs, (tuple, list)) and not isinstance(inputs, PackedSequence)
    by_name = {**dict.fromkeys(LABELS, given.labels), **dict.fromkeys(WEIGHTS, given.weights)}
    extra = {name: by_name[name] for name in takes.required[1:] if by_name.get(name) is not None}
    required = [name for name in takes.required if name not in extra]
    most = len([name for name in takes.places if name not in extra])
    if several and len(inputs) > 1 and len(required) <= len(inputs) and (takes.any_place or len(inputs) <= most):
        return tuple(inputs), extra
    if len(required) <= 1:
        return (inputs,), extra
    have = f"{len(inputs)} inputs" if several else f"one input, {described(inputs)}"
    raise InputError(
        f"forward of {type(model).__name__} requires {', '.join(required)}, and the batch has {have}. Write "
        f"(({', '.join(required)}), labels), a dict with these keys, or predict=lambda model, batch: model(…)"
    )


def tensor_of(output: Any, fits: Callable[[Tensor], bool], wanted: str) -> Tensor:
    """The output tensor of a model that may return a tuple, a dict or a `ModelOutput`.

    Args:
        output: what the model returned. A tensor is returned as it is; `logits` come first; then the first tensor that
            fits.
        fits: whether a tensor can be the output.
        wanted: for the error: what fits, in words.

    Returns: the tensor.
    Raises:
        InputError: no tensor fits.
    Cost: none.
    Source: this library's own.

    >>> tensor_of({"loss": torch.ones(()), "scores": torch.ones(2, 3)}, lambda t: t.ndim == 2, "(B, C)").shape
    torch.Size([2, 3])
    """
    if isinstance(output, Tensor):
        return output
    named = fields(output)
    logits = (named or {}).get("logits", getattr(output, "logits", None))
    if isinstance(logits, Tensor):
        return logits
    values = named.values() if named is not None else output if isinstance(output, (tuple, list)) else ()
    found = [value for value in values if isinstance(value, Tensor)]
    for value in found:
        if fits(value):
            return value
    inside = f" with {', '.join(str(tuple(t.shape)) for t in found)}" if found else ""
    raise InputError(
        f"objective: the model returned {described(output)}{inside}; wanted a tensor {wanted}, or a tuple, dict or "
        "ModelOutput that has it (as 'logits', or the first that fits). Else say which: "
        "predict=lambda model, batch: model(…)[…]"
    )
