"""Every function of torch in the table of forms is read right, however its arguments are given; none may raise."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramian as gm
from cases import seeded
from gramian.recording.form import Form, Row
from gramian.recording.forms import FORMS

R, IN, OUT, E = 5, 4, 3, 2  # rows, inputs, outputs, matrices of a stack


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


class Call(NamedTuple):
    """A call of a function with a weight.

    `args` maps argument names to values, in the function's order; `"W"` stands for the weight. `rows` are those that
    the weight's matrix multiplies, (N, D), for a stack (E, N, D); `grads` makes the rows of gradients (N, D') of the
    gradient at the output. Both are written out by hand; that they are right shows in Σ g xᵀ, the weight's gradient.
    """

    func: Any
    weight: Tensor
    args: dict[str, Any]
    rows: Tensor
    grads: Callable[[Tensor], Tensor]
    transposed: bool = False
    num_positional: int = 99  # how many arguments torch takes by position
    layout: str = ""


def flat(g: Tensor) -> Tensor:
    return g.reshape(-1, g.shape[-1])


def unfolded(x: Tensor, k: int) -> Tensor:
    """The windows of x (N, C, L) as rows (N·positions, C·k), copied out."""
    return torch.stack([x[:, :, i : i + k].flatten(1) for i in range(x.shape[2] - k + 1)], 1).flatten(0, 1)


x, stack = normal(R, IN), normal(E, R, IN, seed=1)
long, tokens = normal(2, IN, 6, seed=2), torch.tensor([[0, 3, 1], [2, 2, 0]])
w, wt, ws, wst = (
    normal(OUT, IN, seed=3),
    normal(IN, OUT, seed=4),
    normal(E, IN, OUT, seed=5),
    normal(E, OUT, IN, seed=6),
)
kernel, kernel_t = normal(OUT, IN, 2, seed=7), normal(IN, OUT, 2, seed=8)
table, chosen = normal(4, OUT, seed=9), tokens.flatten()
onehot = F.one_hot(tokens.flatten(), 4).double()
vector, bias = normal(IN, seed=10), normal(R, OUT, seed=11)
T = True


def one_row(g: Tensor) -> Tensor:
    return g[None]


def one_row_each(g: Tensor) -> Tensor:
    return g[:, None]


def by_position(g: Tensor) -> Tensor:
    return flat(g.mT)


def by_stack(g: Tensor) -> Tensor:
    return g


CALLS: dict[str, Call] = {
    "linear": Call(F.linear, w, {"input": x, "weight": "W", "bias": normal(OUT)}, x, flat),
    "linear_left": Call(F.linear, w, {"input": "W", "weight": x}, x, lambda g: g.T),
    "matmul": Call(torch.matmul, wt, {"input": x, "other": "W"}, x, flat, T),
    "matmul_left": Call(torch.matmul, w, {"input": "W", "other": x.T}, x, lambda g: g.T),
    "matmul_vector": Call(torch.matmul, w, {"input": "W", "other": vector}, vector[None], one_row),
    "matmul_vector_right": Call(torch.matmul, wt, {"input": vector, "other": "W"}, vector[None], one_row, T),
    "matmul_stack": Call(torch.matmul, ws, {"input": stack, "other": "W"}, stack, by_stack, T),
    "matmul_stack_common": Call(torch.matmul, ws, {"input": x, "other": "W"}, x, by_stack, T),
    "matmul_stack_left": Call(torch.matmul, wst, {"input": "W", "other": stack.mT}, stack, lambda g: g.mT),
    "matmul_stack_left_common": Call(torch.matmul, wst, {"input": "W", "other": x.T}, x, lambda g: g.mT),
    "matmul_stack_vector": Call(torch.matmul, wst, {"input": "W", "other": vector}, vector[None], one_row_each),
    "matmul_vector_stack": Call(
        torch.matmul, ws, {"input": vector, "other": "W"}, vector[None], one_row_each, T
    ),
    "matmul_method": Call(Tensor.matmul, wt, {"self": x, "other": "W"}, x, flat, T, 99),
    "matmul_operator": Call(Tensor.__matmul__, wt, {"self": x, "other": "W"}, x, flat, T),
    "rmatmul": Call(Tensor.__rmatmul__, wt, {"self": "W", "other": x}, x, flat, T),
    "matmul_numpy": Call(torch.matmul, wt, {"x1": x, "x2": "W"}, x, flat, T, 0),
    "mm": Call(torch.mm, wt, {"input": x, "mat2": "W"}, x, flat, T),
    "mm_left": Call(torch.mm, w, {"input": "W", "mat2": x.T}, x, lambda g: g.T),
    "mm_method": Call(Tensor.mm, wt, {"self": x, "mat2": "W"}, x, flat, T),
    "bmm": Call(torch.bmm, ws, {"input": stack, "mat2": "W"}, stack, by_stack, T),
    "bmm_method": Call(Tensor.bmm, ws, {"self": stack, "mat2": "W"}, stack, by_stack, T),
    "mv": Call(torch.mv, w, {"input": "W", "vec": vector}, vector[None], one_row),
    "mv_method": Call(Tensor.mv, w, {"self": "W", "vec": vector}, vector[None], one_row),
    "inner": Call(torch.inner, w, {"input": x, "other": "W"}, x, flat),
    "inner_left": Call(torch.inner, w, {"input": "W", "other": x}, x, lambda g: g.T),
    "inner_method": Call(Tensor.inner, w, {"self": x, "other": "W"}, x, flat),
    "addmm": Call(torch.addmm, wt, {"input": bias, "mat1": x, "mat2": "W", "beta": 2}, x, flat, T, 3),
    "addmm_alpha": Call(torch.addmm, wt, {"input": bias, "mat1": x, "mat2": "W", "alpha": 3}, x, lambda g: 3 * g, T, 3),
    "addmm_method": Call(Tensor.addmm, wt, {"self": bias, "mat1": x, "mat2": "W"}, x, flat, T),
    "addmm_": Call(Tensor.addmm_, wt, {"self": bias, "mat1": x, "mat2": "W"}, x, flat, T),
    "addmv_": Call(Tensor.addmv_, w, {"self": normal(OUT), "mat": "W", "vec": vector}, vector[None], one_row),
    "baddbmm_": Call(
        Tensor.baddbmm_, ws, {"self": normal(E, R, OUT), "batch1": stack, "batch2": "W"}, stack, by_stack, T
    ),
    "addbmm_": Call(
        Tensor.addbmm_, ws, {"self": bias, "batch1": stack, "batch2": "W"}, stack, lambda g: g.expand(E, R, OUT), T
    ),
    "addmv_function_": Call(torch.addmv_, w, {"input": normal(OUT), "mat": "W", "vec": vector}, vector[None], one_row),
    "addmv_method": Call(
        Tensor.addmv, w, {"self": normal(OUT), "mat": "W", "vec": vector}, vector[None], one_row
    ),
    "addbmm_method": Call(
        Tensor.addbmm, ws, {"self": bias, "batch1": stack, "batch2": "W"}, stack, lambda g: g.expand(E, R, OUT), T
    ),
    "addmv": Call(torch.addmv, w, {"input": normal(OUT), "mat": "W", "vec": vector}, vector[None], one_row),
    "baddbmm": Call(
        torch.baddbmm, ws, {"input": normal(E, R, OUT), "batch1": stack, "batch2": "W", "beta": 0}, stack, by_stack,
        T, 3,
    ),
    "baddbmm_method": Call(
        Tensor.baddbmm, ws, {"self": normal(E, R, OUT), "batch1": stack, "batch2": "W", "alpha": 0.5}, stack,
        lambda g: 0.5 * g, T, 3,
    ),
    "addbmm": Call(
        torch.addbmm, ws, {"input": bias, "batch1": stack, "batch2": "W"}, stack, lambda g: g.expand(E, R, OUT), T, 3
    ),
    "sparse_mm": Call(torch.sparse.mm, wt, {"sparse": x.to_sparse(), "dense": "W"}, x, flat, T, 2),
    "linalg_matmul": Call(torch.linalg.matmul, wt, {"input": x, "other": "W"}, x, flat, T),
    "tensordot": Call(torch.tensordot, wt, {"a": x, "b": "W", "dims": 1}, x, flat, T),
    "tensordot_lists": Call(torch.tensordot, w, {"a": x, "b": "W", "dims": ([1], [1])}, x, flat),
    "tensordot_left": Call(torch.tensordot, w, {"a": "W", "b": x, "dims": ([-1], [1])}, x, lambda g: g.T),
    "einsum": Call(torch.einsum, wt, {"equation": "ri,io->ro", "*": (x, "W")}, x, flat, T),
    "einsum_list": Call(torch.einsum, wt, {"equation": "ai,io", "*": ([x, "W"],)}, x, flat, T),
    "einsum_sublists": Call(torch.einsum, wt, {"*": (x, [0, 1], "W", [1, 2], [0, 2])}, x, flat, T),
    "einsum_dots": Call(torch.einsum, w, {"equation": "...i,oi->...o", "*": (stack, "W")}, flat(stack), flat),
    "einsum_stack": Call(torch.einsum, wst, {"equation": "eri,eoi->ero", "*": (stack, "W")}, stack, by_stack),
    "multi_dot": Call(torch.linalg.multi_dot, wt, {"tensors": [x, "W"]}, x, flat, T),
    "multi_dot_left": Call(torch.linalg.multi_dot, w, {"tensors": ["W", x.T, normal(R, 2)]}, x, None, T),
    "chain_matmul": Call(torch.chain_matmul, wt, {"*": (bias.T, x, "W")}, bias.T @ x, flat, T),
    "bilinear": Call(
        F.bilinear, normal(2, OUT, IN), {"input1": normal(R, OUT), "input2": x, "weight": "W", "bias": normal(2)}, x,
        lambda g: torch.stack([g[:, [e]] * normal(R, OUT) for e in range(2)]), layout="e a b -> e a b",
    ),
    "conv1d": Call(
        F.conv1d, kernel, {"input": long, "weight": "W", "bias": normal(OUT)}, unfolded(long, 2), by_position
    ),
    "conv1d_padded": Call(
        F.conv1d, kernel, {"input": long, "weight": "W", "bias": None, "stride": 1, "padding": "same", "dilation": 1},
        unfolded(F.pad(long, (0, 1)), 2), by_position,
    ),
    "conv2d": Call(
        F.conv2d, kernel[:, :, None], {"input": long[:, :, None], "weight": "W"}, unfolded(long, 2),
        lambda g: flat(g[:, :, 0].mT),
    ),
    "conv3d": Call(
        F.conv3d, kernel[:, :, None, None], {"input": long[:, :, None, None], "weight": "W"}, unfolded(long, 2),
        lambda g: flat(g[:, :, 0, 0].mT),
    ),
    "conv_transpose1d": Call(
        F.conv_transpose1d, kernel_t, {"input": long, "weight": "W", "bias": None, "stride": 1, "padding": 0},
        flat(long.mT), lambda g: unfolded(g, 2), layout="i o w -> (o w) i",
    ),
    "conv_transpose2d": Call(
        F.conv_transpose2d, kernel_t[:, :, None], {"input": long[:, :, None], "weight": "W", "groups": 1},
        flat(long.mT), lambda g: unfolded(g[:, :, 0], 2), num_positional=2, layout="i o h w -> (o h w) i",
    ),
    "conv_transpose3d": Call(
        F.conv_transpose3d, kernel_t[:, :, None, None], {"input": long[:, :, None, None], "weight": "W"},
        flat(long.mT), lambda g: unfolded(g[:, :, 0, 0], 2), layout="i o d h w -> (o d h w) i",
    ),
    "embedding": Call(F.embedding, table, {"input": tokens, "weight": "W", "padding_idx": None}, onehot, flat, T),
    "embedding_bag": Call(
        F.embedding_bag, table, {"input": tokens, "weight": "W", "offsets": None, "mode": "sum"}, onehot,
        lambda g: g.repeat_interleave(3, 0), T, 3,
    ),
    "indexing": Call(Tensor.__getitem__, table, {"self": "W", "index": tokens - 4}, onehot, flat, T),
    "index_select": Call(torch.index_select, table, {"input": "W", "dim": 0, "index": chosen}, onehot, flat, T),
    "index_select_method": Call(
        Tensor.index_select, table, {"self": "W", "dim": 0, "index": chosen}, onehot, flat, T
    ),
}  # fmt: skip
CALLS["multi_dot_left"] = CALLS["multi_dot_left"]._replace(
    rows=(x.T @ normal(R, 2)).T, grads=lambda g: g.T, transposed=False
)


class Holder(nn.Module):
    """One parameter, in a call of a function."""

    def __init__(self, call: Call, num_positional: int = 99) -> None:
        super().__init__()
        self.call, self.num_positional = call, num_positional
        self.embed_table = nn.Parameter(call.weight.clone())  # the name tells `indexing` that it is looked up

    def put(self, value: Any) -> Any:
        if isinstance(value, str) and value == "W":
            return self.embed_table
        if isinstance(value, (list, tuple)) and any(isinstance(v, (Tensor, str, list)) for v in value):
            return type(value)(map(self.put, value))
        return value.clone() if isinstance(value, Tensor) else value

    def forward(self, batch: Tensor) -> Tensor:
        args = {name: self.put(value) for name, value in self.call.args.items()}
        rest = args.pop("*", ())
        names = list(args)
        by_position = names if rest else names[: self.num_positional]
        named = {name: args[name] for name in names if name not in by_position}
        return self.call.func(*(args[name] for name in by_position), *rest, **named)


LAYOUTS = {3: "e o i -> e o i"}
KERNELS = {3: "o i w -> o (i w)", 4: "o i h w -> o (i h w)", 5: "o i d h w -> o (i d h w)"}


def layouts_of(call: Call) -> dict[str, str]:
    own = KERNELS if call.func in (F.conv1d, F.conv2d, F.conv3d) else LAYOUTS
    return {"embed_table": call.layout or own[call.weight.ndim]} if call.weight.ndim > 2 else {}


def capture(model: nn.Module, call: Call) -> tuple[gm.Statistics, Tensor]:
    """The statistics of one pass in which the gradient at the output is a fixed one, and that gradient."""
    shape = model(torch.zeros(1)).shape
    at_output = normal(*shape, seed=20).to(call.weight.dtype)

    def criterion(output: Tensor, batch: Tensor) -> tuple[Tensor, int]:
        return (output * at_output).sum(), 1

    objective = gm.Objective(lambda m, b: m(b), criterion)
    return gm.capture(model, [torch.zeros(1)], objective, layouts=layouts_of(call)), at_output


def second(t: Tensor) -> Tensor:
    return t.mT @ t


def ways(call: Call) -> list[int]:
    """How many arguments are given by position: from as few as torch allows to all."""
    first = 2 if call.func is Tensor.__getitem__ else int("self" in call.args)
    return list(range(first, min(len(call.args), call.num_positional) + 1)) if "*" not in call.args else [0]


CASES = [pytest.param(name, num, id=f"{name}-{num}") for name, call in CALLS.items() for num in ways(call)]


@pytest.mark.parametrize(("name", "num_positional"), CASES)
def test_every_way_to_call_a_function_gives_the_same_sums(name: str, num_positional: int) -> None:
    call = CALLS[name]
    model = Holder(call, num_positional)
    stats, at_output = capture(model, call)
    grads = call.grads(at_output)
    sides = (call.rows, grads) if call.transposed else (grads, call.rows)
    (model(torch.zeros(1)) * at_output).sum().backward()
    weight = gm.blocks(model, layouts_of(call)).blocks[0]
    torch.testing.assert_close(weight.split(model.embed_table.grad), sides[0].mT @ sides[1])  # the oracle is right
    site = stats["embed_table"].only
    assert site.A is not None, site.reason
    assert site.G is not None, site.reason
    assert site.transposed == call.transposed
    a, rows = second(call.rows), call.rows.shape[-2]
    got = torch.diag_embed(site.A.diagonal) if isinstance(site.A, gm.DiagonalGram) else site.A.matrix
    torch.testing.assert_close(got, a / rows)
    assert (site.A.count == rows).all()
    torch.testing.assert_close(site.G.matrix, second(grads))
    assert not stats.other_uses


def test_every_row_of_the_table_has_a_call() -> None:
    grouped = {f for f, row in FORMS.items() if row.reader.__name__ == "grouped"}
    assert set(FORMS) - grouped == {call.func for call in CALLS.values()}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_without_a_weight_is_let_through(name: str) -> None:
    call = CALLS[name]
    holder = Holder(call, min(1, call.num_positional))
    data = call._replace(args={k: data_for(v, call.weight) for k, v in call.args.items()})

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(1, 1)

        def forward(self, batch: Tensor) -> Tensor:
            return holder.__class__.forward(plain, batch).sum() + self.linear(batch)

    plain = Holder(data, ways(call)[0])
    stats = gm.capture(Beside(), [torch.ones(2, 1)], lambda m, b: m(b).mean())
    assert stats["linear.weight"].G is not None


def data_for(value: Any, weight: Tensor) -> Any:
    if isinstance(value, str) and value == "W":
        return weight
    if isinstance(value, (list, tuple)) and any(isinstance(v, (Tensor, str, list)) for v in value):
        return type(value)(data_for(v, weight) for v in value)
    return value


def test_out_and_slices_of_it() -> None:
    """A product written into a part of a larger tensor: the gradient arrives through that tensor."""

    class Into(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(wt.clone(), requires_grad=False)

        def forward(self, batch: Tensor) -> Tensor:
            out = torch.zeros(2 * R, OUT, dtype=x.dtype)
            torch.mm(x, self.weight, out=out[R:])
            return out

    g = normal(2 * R, OUT, seed=20)
    objective = gm.Objective(lambda m, b: m(b), lambda output, b: ((output * g).sum(), 1))
    site = gm.capture(Into(), [torch.zeros(1)], objective)["weight"].only
    torch.testing.assert_close(site.A.matrix, second(x) / R)
    torch.testing.assert_close(site.G.matrix, second(g[R:]))


def test_a_call_that_no_row_reads_is_named() -> None:
    """A function that torch takes and the table cannot read must not stop the model."""

    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(wt.clone()) for _ in range(3))

        def forward(self, batch: Tensor) -> Tensor:
            y = torch.addmm(2, bias, 3, x, self.a)  # deprecated: beta, input, alpha, mat1, mat2
            y = y + torch.cdist(x, self.b.T)
            return y + F.linear(x, self.c.view(2, 2, OUT)[0].T[:, :1].expand(OUT, IN))

    with pytest.warns(UserWarning, match="deprecated"):
        stats = gm.capture(Strange(), [torch.ones(2)], lambda m, b: m(b).mean())
    assert {name: stats[name].reason for name in stats} == {
        "a": "used only by addmm, which is not captured",
        "b": "used only by cdist, which is not captured",
        "c": "used only by linear (of a slice or reshape of it), which is not captured",
    }


def test_a_call_that_a_row_reads_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A form whose rows do not fit the weight: the model runs, and the site says why it has nothing."""

    def misread(is_weight: Any, input: Tensor, weight: Tensor, bias: Any = None) -> Form:
        return Form("linear", weight, input, lambda mask: iter([input[:, 1:]]), flat, (1,), (0,))

    monkeypatch.setitem(FORMS, F.linear, Row("input weight bias", misread))
    stats = gm.capture(nn.Linear(IN, OUT).double(), [x], lambda m, b: m(b).mean())
    assert stats["weight"].A is stats["weight"].G is None
    assert re.match("its use in linear was not understood: (ShapeError|RuntimeError): .+", stats["weight"].reason)
    assert stats.coverage == 0.0
