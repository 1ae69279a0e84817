"""What cannot be stepped or be right is refused before anything moves; states find their parameters by name."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from cases import seeded
from directions import maker
from gramian.errors import InputError, UnsupportedError
from gramian.optim import SOAP, Muon
from gramian.optim.parameters import overlaps_itself
from gramian.optim.registry import MATRIX_OPTIMIZERS

pytestmark = pytest.mark.filterwarnings("ignore:.*parameters without names")

MAKERS: dict[str, Callable[..., Any]] = {name: maker(name) for name in MATRIX_OPTIMIZERS}
every = pytest.mark.parametrize("name", MAKERS)


def two_layers() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))


def set_gradients(model: nn.Module, seed: int = 0) -> None:
    g = seeded(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g).to(p.dtype)


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


# ---- memory that is shared


@pytest.mark.parametrize(
    ("tensor", "shares"),
    [
        (torch.zeros(3, 4), False),
        (torch.zeros(4, 3).t(), False),
        (torch.zeros(5, 4)[:, ::2], False),
        (torch.zeros(4).expand(3, 4), True),
        (torch.zeros(1).expand(6), True),
        (torch.zeros(1, 1).expand(1, 1), False),
        (torch.zeros(10).as_strided((4, 3), (2, 1)), True),
        (torch.zeros(12).as_strided((2, 2), (3, 2)), False),
        (torch.zeros(14).as_strided((3, 4), (2, 3)), False),
        (torch.zeros(0, 4), False),
        (torch.zeros(()), False),
    ],
)
def test_shared_entries_are_found(tensor: Tensor, shares: bool) -> None:
    offsets = torch.zeros(tensor.shape, dtype=torch.long)
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        offsets += (torch.arange(size) * stride).view(-1, *[1] * (tensor.ndim - dim - 1))
    assert (offsets.unique().numel() < tensor.numel()) == shares
    assert overlaps_itself(tensor) == shares


@every
def test_a_parameter_whose_entries_share_memory_is_refused(name: str) -> None:
    for p in (torch.ones(1).expand(6), torch.ones(1, 4).expand(3, 4), torch.ones(10).as_strided((4, 3), (2, 1))):
        with pytest.raises(InputError, match="has entries that share memory"):
            MAKERS[name]([Parameter(p)])


@every
def test_views_of_one_tensor_step_as_one_after_the_other(name: str) -> None:
    """Columns side by side keep to themselves; where two views overlap, both updates arrive."""
    base = torch.zeros(10, 3)
    columns = [Parameter(base[:, i]) for i in (0, 2)]
    optimizer = MAKERS[name](columns)
    for p in columns:
        p.grad = torch.ones(10)
    optimizer.step()
    assert not base[:, 1].any()
    once = base[0, 0].item()
    assert once < 0
    for make in (lambda t: t, lambda t: t[:, 0]):
        storage = torch.zeros(12) if make(torch.zeros(2, 2)).ndim == 2 else torch.zeros(12, 2)
        flat = storage if storage.ndim == 1 else storage[:, 0]
        views = [Parameter(flat[:8]), Parameter(flat[4:])]
        optimizer = MAKERS[name](views)
        for p in views:
            p.grad = torch.ones(8)
        optimizer.step()
        wanted = torch.full((12,), once)
        wanted[4:8] *= 2
        torch.testing.assert_close(flat, wanted)


# ---- refused before anything moves


def reshaped(model: nn.Sequential) -> None:
    model[2].bias.data = torch.ones(5)
    model[2].bias.grad = torch.ones(5)


def sparse(model: nn.Sequential) -> None:
    model[2].weight.grad = torch.ones(2, 4).to_sparse()


def replaced(model: nn.Sequential) -> None:
    model[2].zero_grad()
    model[2] = nn.Linear(4, 2)


def option(key: str, value: Any) -> Callable[[Any, nn.Sequential], None]:
    return lambda optimizer, _: optimizer.param_groups[0].update({key: value})


MISUSED: dict[str, tuple[Callable[[Any, nn.Sequential], None], str]] = {
    "reshaped": (lambda _, m: reshaped(m), r"'2\.bias' has shape \(5,\) now and had \(2,\)"),
    "sparse": (lambda _, m: sparse(m), r"sparse gradients are not supported, and '2\.weight' has one"),
    "replaced": (lambda _, m: replaced(m), r"new parameters in place of 2 .*'2\.weight'"),
    "a parameter put in": (
        lambda o, _: o.param_groups[0]["params"].append(Parameter(torch.ones(3))), "joins by add_param_group",
    ),
    "infinite rate": (option("lr", float("inf")), r"lr must be in \[0, ∞\), got inf"),
    "NaN as rate": (option("lr", float("nan")), r"lr must be in \[0, ∞\), got nan"),
    "negative rate": (option("lr", -0.1), r"lr must be in \[0, ∞\), got -0\.1"),
    "text as rate": (option("lr", "0.1"), r"lr must be in \[0, ∞\), got '0\.1'"),
    "two rates": (option("lr", torch.ones(2)), "Tensor lr must be 1-element"),
    "a rate to differentiate": (option("lr", torch.ones((), requires_grad=True)), "no step is differentiated"),
    "text as decay": (option("rest_weight_decay", "a"), "rest_weight_decay must be"),
}  # fmt: skip


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("case", MISUSED)
@every
def test_nothing_moves_where_one_thing_is_refused(name: str, case: str, stepped: bool) -> None:
    misuse, message = MISUSED[case]
    model = two_layers()
    optimizer = MAKERS[name](model)
    if stepped:
        set_gradients(model)
        optimizer.step()
    set_gradients(model, 1)
    params = list(model.parameters())
    before, kept = values(model)[:4], copy.deepcopy(optimizer.state_dict()["state"])
    misuse(optimizer, model)
    with pytest.raises((InputError, UnsupportedError), match=message) as caught:
        optimizer.step()
    assert "\n" not in str(caught.value)
    assert all(torch.equal(p, q) for p, q in zip(params[:4], before, strict=True))
    if "put in" not in case:
        torch.testing.assert_close(optimizer.state_dict()["state"], kept, rtol=0, atol=0)


@every
def test_parameters_without_numbers_are_refused(name: str) -> None:
    with torch.device("meta"):
        model = two_layers()
    optimizer = MAKERS[name](model)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    with pytest.raises(UnsupportedError, match=r"'0\.weight' is on the meta device"):
        optimizer.step()


def test_scalars_step_and_what_is_removed_stays() -> None:
    scale, w, v = Parameter(torch.ones(())), Parameter(torch.ones(3, 3)), Parameter(torch.ones(3, 3))
    optimizer = Muon([("scale", scale), ("w", w), ("v", v)])
    assert optimizer.explain()[0]["direction"] == "adamw"
    for p in (scale, w, v):
        p.grad = torch.ones_like(p)
    optimizer.param_groups[0]["params"] = [scale, w]
    optimizer.step()
    assert scale < 1
    assert not torch.equal(w, torch.ones(3, 3))
    assert torch.equal(v, torch.ones(3, 3))


LISTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "two parameters of one name": (
        lambda: [("w", Parameter(torch.ones(2, 2))), ("w", Parameter(torch.ones(2, 2)))], InputError, "the name 'w'",
    ),
    "names for some": (
        lambda: [{"params": [Parameter(torch.ones(2))], "param_names": ["a", "b"]}], InputError, "2 param_names",
    ),
    "a state dict": (lambda: two_layers().state_dict(), InputError, "got str"),
    "numbers": (lambda: [1.0, 2.0], InputError, "got float"),
    "no parameters in a group": (lambda: [{"lr": 0.1}], TypeError, "must be a dict with 'params'"),
}  # fmt: skip


@pytest.mark.parametrize("case", LISTS)
def test_lists_that_cannot_be_right_are_refused(case: str) -> None:
    make, kind, message = LISTS[case]
    with pytest.raises(kind, match=message):
        Muon(make())


# ---- states


@every
def test_a_state_finds_its_parameters_by_name(name: str) -> None:
    """Layers in another order step on as if they had never been moved."""
    model, twin = two_layers(), two_layers()
    optimizer = MAKERS[name](model)
    for seed in range(3):
        set_gradients(model, seed)
        optimizer.step()
    twin.load_state_dict(model.state_dict())
    again = MAKERS[name](list(reversed(list(twin.parameters()))), model=twin)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in (3, 4):
        set_gradients(model, seed), set_gradients(twin, seed)
        optimizer.step(), again.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_new_names_load_by_order_and_names_in_other_places_are_refused() -> None:
    def saved(names: list[str]) -> Any:
        params = [(n, Parameter(torch.eye(3) + i)) for i, n in enumerate(names)]
        optimizer = Muon(params)
        for _, p in params:
            p.grad = p.detach().clone()
        optimizer.step()
        return optimizer

    optimizer = saved(["a.weight", "b.weight", "c.weight"])
    renamed = saved(["x.weight", "b.weight", "z.weight"])
    renamed.load_state_dict(optimizer.state_dict())
    assert renamed.param_groups[0]["param_names"] == ["x.weight", "b.weight", "z.weight"]
    other = saved(["b.weight", "x.weight", "y.weight"])
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        InputError, match=r"in another order: it lacks x\.weight, y\.weight and has a\.weight, c\.weight"
    ):
        other.load_state_dict(optimizer.state_dict())
    assert other.state_dict()["param_groups"] == before["param_groups"]
    torch.testing.assert_close(other.state_dict()["state"], before["state"])


def test_a_state_of_other_shapes_is_refused_before_anything_changes() -> None:
    model, wider = two_layers(), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 2))
    first, second = Muon(model.parameters()), Muon(wider.parameters())
    set_gradients(model)
    first.step()
    with pytest.raises(InputError, match=r"'momentum' of '0' has shape \(4, 4\), and \(8, 4\) is wanted"):
        second.load_state_dict(first.state_dict())
    assert not second.state
    with pytest.raises(InputError, match="expected a state_dict"):
        second.load_state_dict({})
    with pytest.raises(InputError, match="6 parameters, and the optimizer's has 4"):
        Muon(two_layers()[:2]).load_state_dict(first.state_dict())


def test_states_of_others_are_refused_also_before_their_first_step() -> None:
    model = two_layers()
    muon = Muon(model)
    with pytest.raises(InputError, match=r"another optimizer.*load_adamw"):
        muon.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    with pytest.raises(InputError, match=r"another optimizer.*load_adamw"):
        muon.load_state_dict(torch.optim.Muon([model[0].weight, model[1].weight]).state_dict())
    with pytest.raises(InputError, match="another direction, Muon, where SOAP is wanted"):
        SOAP(model).load_state_dict(muon.state_dict())

    class Mine(Muon):
        pass

    Mine(model).load_state_dict(muon.state_dict())


@every
def test_a_model_with_frozen_layers_resumes_exactly(name: str) -> None:
    """L, which counts the layers that were trained, is kept: a layer that thaws does not change the others' steps."""
    model, twin = two_layers(), two_layers()
    model[0].requires_grad_(False)
    optimizer = MAKERS[name](model)
    again = MAKERS[name](twin)  # all of it trains
    again.load_state_dict(optimizer.state_dict())
    for seed in range(2):
        for m in (model, twin):
            set_gradients(m, seed)
            m[0].weight.grad = m[0].bias.grad = None
        optimizer.step(), again.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_model_that_is_cast_is_stepped_on_or_refused(overwrite: bool) -> None:
    """`model.to` keeps the parameters, swaps their tensors, or makes new ones, as torch is told."""
    model = two_layers()
    optimizer = Muon(model)
    set_gradients(model)
    optimizer.step()
    future = torch.__future__
    switch = (
        future.set_overwrite_module_params_on_conversion if overwrite else future.set_swap_module_params_on_conversion
    )
    switch(True)
    try:
        model.to(torch.float64)
    finally:
        switch(False)
    set_gradients(model, 1)
    if overwrite:
        optimizer.zero_grad()
        with pytest.raises(InputError, match="has new parameters in place of 6"):
            optimizer.step()
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert all(p.dtype == torch.float64 and p.isfinite().all() for p in model.parameters())


@every
@pytest.mark.parametrize("copied", [False, True])
def test_a_new_head_joins_as_the_head_that_it_is(name: str, copied: bool) -> None:
    """The model tells what a new layer is, also the copy of a model in a copy made with it; the old layer stays."""

    def trained(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        for seed in range(3):
            set_gradients(model, seed)
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    def with_new_head(model: nn.Sequential) -> nn.Sequential:
        torch.manual_seed(3)
        model[-1] = nn.Linear(model[-1].in_features, 3)
        return model

    model = two_layers()
    optimizer = MAKERS[name](model)
    with_new_head(model)
    if copied:
        model, optimizer = copy.deepcopy((model, optimizer))
    set_gradients(model)
    with pytest.raises(InputError, match=r"has new parameters in place of 2 .*add_param_group"):
        optimizer.step()
    stepped = {p for group in optimizer.param_groups for p in group["params"]}
    optimizer.add_param_group({"params": [(n, p) for n, p in model.named_parameters() if p not in stepped]})
    new = with_new_head(two_layers())
    for one, other in zip(trained(model, optimizer), trained(new, MAKERS[name](new)), strict=True):
        torch.testing.assert_close(one, other)


# ---- options that change later


@pytest.mark.parametrize(("name", "option", "value"), [("soap", "part_size", 2), ("muon", "part_size", 2)])
def test_an_option_that_sets_a_shape_counts_before_the_first_step_and_is_refused_after_it(
    name: str, option: str, value: int
) -> None:
    one, two, model = two_layers(), two_layers(), two_layers()
    optimizer, wanted = MAKERS[name](model), MAKERS[name](one, **{option: value})
    optimizer.param_groups[0][option] = value
    for net, stepper in ((model, optimizer), (one, wanted)):
        set_gradients(net)
        stepper.step()
    assert all(torch.equal(a, b) for a, b in zip(values(model), values(one), strict=True))
    late = MAKERS[name](two)
    set_gradients(two)
    late.step()
    before = values(two)
    late.param_groups[0][option] = value
    for _ in range(2):
        with pytest.raises(InputError, match=f"{option}={value}.*'0.weight'.*before the first step"):
            late.step()
    assert all(torch.equal(a, b) for a, b in zip(values(two), before, strict=True))


def test_sides_that_change_later_count() -> None:
    model = two_layers()
    optimizer = SOAP(model, sides="both")
    set_gradients(model)
    optimizer.step()
    optimizer.param_groups[0]["sides"] = "small"
    optimizer.step()
    state = optimizer.state[model[0].weight]
    assert any(key.startswith("left") for key in state) != any(key.startswith("right") for key in state)


def test_max_overhead_of_one_group_alone_is_refused() -> None:
    model = two_layers()
    optimizer = Muon([{"params": [model[0].weight]}, {"params": [model[1].weight]}], model=model)
    optimizer.param_groups[1]["max_overhead"] = 0.1
    set_gradients(model)
    with pytest.raises(InputError, match="max_overhead is of the whole optimizer"):
        optimizer.step()
