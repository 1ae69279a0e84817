"""What each verb must do on a family: called as its users call it, and compared with what does not ask gramian's table.

The oracles are the operations that torch dispatches and what hooks see (`family_oracles.py`), and files read back.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import gramian as gm
from family_models import Family
from family_oracles import hooked_moments, uses_of
from gramian.checkpoint import open_checkpoint
from gramian.errors import GramianError
from gramian.inspection.weights.matrices import find_holdings
from gramian.inspection.weights.of_model import applied
from gramian.optim.registry import OPTIMIZERS

Verdict = Literal["right", "alarm", "refused", "wrong", "crash"]


@dataclass
class Cell:
    """What a verb did on a family, with a figure or the reason."""

    verdict: Verdict
    note: str = ""
    details: str = field(default="", repr=False)


class Wrong(AssertionError):
    """A verb gave something else than its oracle."""


def wanted(condition: Any, message: str) -> None:
    if not condition:
        raise Wrong(message)


def check_blocks(family: Family) -> Cell:
    """Each parameter once; what is multiplied as a matrix is a block, along its columns; nothing else is hidden."""
    model, batch = family.model(), family.batch()
    found, rest = gm.blocks(model)
    held = [id(x.parameter) for x in (*found, *rest)]
    wanted(Counter(held) == Counter({id(p) for p in model.parameters()}), "not every parameter exactly once")
    uses = uses_of(model, lambda: family.loss(model, batch))
    hidden = left = 0
    for block in found:
        use = uses[id(block.parameter)]
        if block.role in ("hidden", "head"):
            hidden += block.parameter.numel() if "matrix" in use.kinds and block.role == "hidden" else 0
            wanted(not use.kinds or "matrix" in use.kinds, f"{block.name} is {block.role}, used as {use.shown}")
            for dim in use.contracted:
                columns = set(block.layout.sides[2])
                wanted(
                    set(block.layout.dims[dim]) & columns,
                    f"{block.name}: {block.layout.pattern!r}, but the product runs over dimension {dim}",
                )
        elif "matrix" in use.kinds:
            is_table = any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for _, m in block.owners)
            wanted(block.role == "embedding" and is_table, f"{block.name} is {block.role}, used as a matrix")
    for other in rest:
        if "matrix" in uses[id(other.parameter)].kinds:
            left += other.parameter.numel()
        if other.parameter.ndim > 1 and "unknown" in other.reason:
            raise Wrong(f"{other.name} {tuple(other.parameter.shape)}: {other.reason}")
    share = hidden / (hidden + left) if hidden + left else 1.0
    wanted(share >= 0.99, f"{share:.1%} of the hidden parameters take the matrix direction")
    return Cell("right", f"{share:.0%}")


Matrices = dict[str, tuple[Tensor, str]]


def matrices_of_model(model: nn.Module) -> Matrices:
    return {
        name: (matrix, block.role)
        for block in gm.blocks(model).blocks
        for name, matrix in zip(
            block.names, block.layout.pieces(applied(block)[0], block.role == "elementwise"), strict=True
        )
    }


def matrices_of_file(path: Path) -> Matrices:
    checkpoint = open_checkpoint(path)
    return {
        name: (matrix, holding.role)
        for holding in find_holdings(checkpoint)[0]
        for name, matrix in zip(holding.names, holding.split(checkpoint.load(holding.entry.name)), strict=True)
    }


def same_entries(a: Tensor, b: Tensor, name: str) -> bool:
    """Whether two matrices are equal: bit for bit, unless the weight is computed, which file and module do apart."""
    if a.shape != b.shape:
        return False
    return torch.allclose(a, b, rtol=1e-5, atol=1e-7) if "parametrizations" in name else torch.equal(a, b)


def compare(theirs: Matrices, ours: Matrices, what: str) -> None:
    for name in [*ours, *(theirs.keys() - ours.keys())]:
        there, here = theirs.get(name), ours.get(name)
        wanted(there is not None, f"{what} lacks {name}")
        wanted(here is not None, f"{what} has {name} {tuple(there[0].shape) if there else ''} besides")
        assert there is not None
        assert here is not None
        wanted(
            same_entries(there[0], here[0], name),
            f"{what}: {name} is {tuple(there[0].shape)}, wanted {tuple(here[0].shape)} or other entries",
        )
        wanted(there[1] == here[1], f"{what}: {name} is {there[1]}, wanted {here[1]}")


def check_file(family: Family) -> Cell:
    """A file with the model's metadata has its matrices, bit for bit, as the same names and roles."""
    model = family.model()
    with tempfile.TemporaryDirectory() as folder:
        gm.save_compressed(model, Path(folder) / "m.safetensors")
        compare(matrices_of_file(Path(folder) / "m.safetensors"), matrices_of_model(model), "the file")
    return Cell("right")


def check_pretrained(family: Family) -> Cell:
    """The library's own file, or a plain one, has the same matrices as far as names and shapes tell."""
    model = family.model()
    ours = matrices_of_model(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(folder)
        else:
            path /= "m.pt"
            torch.save(model.state_dict(), path)
        adapter = Path(folder) / "adapter_model.safetensors"
        if adapter.exists():  # PEFT writes the adapter alone, which holds the change of each weight
            path, ours = Path(folder), changes_by_peft(model)
        theirs = matrices_of_file(path)
        left_out = find_holdings(open_checkpoint(path))[1]
        tables = tuple(name for reason, names in left_out.items() if "sines" in reason for name in names)
    # A table of sines that a model keeps as a parameter is no weight to a file, which names it.
    ours = {name: matrix for name, matrix in ours.items() if not tables or not name.endswith(tables)}
    # Libraries rename what they write, so matrices are told by their entries. A file has no classes, which alone tell
    # the groups of a convolution and whether it is transposed.
    of_class = [b for b in gm.blocks(model).blocks if needs_the_class(b)]
    ours = {n: m for n, m in ours.items() if not n.startswith(tuple(b.name for b in of_class) or ("-",))}
    kernels = [b.parameter.detach() for b in of_class]
    theirs = {
        n: m
        for n, m in theirs.items()
        if not any(torch.isin(m[0], kernel).all() for kernel in kernels) and ".parametrizations." not in n
    }
    missing = [name for name, m in ours.items() if not any(same(m, other) for other in theirs.values())]
    if missing:
        name = missing[0]
        likely = [f"{n} {tuple(m.shape)} {r}" for n, (m, r) in theirs.items() if n.startswith(name.partition("[")[0])]
        matrix, role = ours[name]
        raise Wrong(
            f"{len(missing)} of {len(ours)} differ, first {name} {tuple(matrix.shape)} {role}; there {likely[:2]}"
        )
    more = [name for name, m in theirs.items() if not any(same(m, other) for other in ours.values())]
    wanted(not more, f"the file has {more[:2]} besides")
    return Cell("right")


def changes_by_peft(model: Any) -> Matrices:
    """What PEFT itself adds to each weight, cut as the weight is."""
    layouts = {block.module: block.layout for block in gm.blocks(model).blocks}
    return {
        f"{name}[{i}]": (part.detach(), "hidden")
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and "default" in getattr(module, "lora_A", {})
        for i, part in enumerate(layouts[module.base_layer].pieces(module.get_delta_weight("default")))
    }


def needs_the_class(block: gm.Block) -> bool:
    grouped = getattr(block.module, "groups", 1) > 1 and block.role != "elementwise"
    one_channel = isinstance(block.module, nn.Conv1d) and block.parameter.shape[1] == 1  # of waves, or depthwise
    return grouped or one_channel or "Transpose" in block.kind or "parametrizations" in block.name


def same(a: tuple[Tensor, str], b: tuple[Tensor, str]) -> bool:
    return a[1] == b[1] and a[0].shape == b[0].shape and torch.equal(a[0], b[0])


def check_capture(family: Family) -> Cell:
    """A and G of every linear layer and convolution that hooks reach; of all others, a reason where there is none."""
    model, batch = family.model(), family.batch()
    stats = gm.capture(model, [batch], family.loss)
    expected = hooked_moments(model, lambda: family.loss(model, batch), int(stats.units))
    found = gm.blocks(model).blocks
    checked = 0
    for block in found:
        sites = stats[block.name]
        moments = expected.get(block.module)
        if moments is None or block.aliases or len(sites) > 1:
            continue
        wanted(sites.A is not None, f"{block.name}: {sites.reason}, but a hook saw it")
        assert sites.A is not None
        for side, moment in (("A", sites.A), ("G", sites.G)):
            if moment is None or side not in moments:
                wanted(moment is None or not moment.matrix.any(), f"{block.name} has a {side} that no hook saw")
                continue
            right = expected_part(block, moments[side], side)
            got = moment.matrix.double().expand_as(right)
            error = float((got - right).abs().max() / right.abs().max().clamp(min=1e-300))
            wanted(error < 1e-4, f"{side} of {block.name} is off by {error:.1e}")
        checked += 1
    uses = uses_of(model, lambda: family.loss(model, batch))
    used = [b for b in found if b.role == "hidden" and "matrix" in uses[id(b.parameter)].kinds]
    lost = [b for b in used if all(s.A is None for s in stats[b.name])]
    total = sum(b.parameter.numel() for b in used)
    share = 1 - sum(b.parameter.numel() for b in lost) / total if total else 1.0
    note = f"{checked} layers, {share:.0%}"
    for block in lost:
        reason = stats[block.name][0].reason
        wanted(reason and "no batch" not in reason, f"{block.name} was used, and capture says {reason!r}")
        return Cell("refused", f"{note}: {block.name}: {reason}")
    wanted(checked, "no layer could be checked")
    return Cell("right", note)


def expected_part(block: gm.Block, whole: Tensor, side: str) -> Tensor:
    """The second moment of a whole layer for each of the block's matrices."""
    if side == "A":
        return whole
    numbers = torch.arange(whole.shape[-1])
    column = [1] * block.parameter.ndim
    out = next(d for d, size in enumerate(block.parameter.shape) if size == len(whole) and names_rows(block, d))
    column[out] = len(whole)
    rows = block.split(numbers.view(column).expand(block.parameter.shape))[..., 0]
    return whole[rows[..., :, None], rows[..., None, :]]


def names_rows(block: gm.Block, dim: int) -> bool:
    leading, rows, _ = block.layout.sides
    return bool(set(block.layout.dims[dim]) & {*leading, *rows})


def check_inspect(family: Family) -> Cell:
    """A standard initialization is healthy: no error, no warning."""
    model = family.model()
    report = gm.inspect(model, [family.batch()], family.loss)
    alarms = sorted({f.code for f in report.findings if f.severity in ("error", "warning")})
    return Cell("alarm", ", ".join(alarms)) if alarms else Cell("right", f"{len(report.layers)} layers")


def check_isometric(family: Family) -> Cell:
    """After it, ten steps of AdamW lower the loss, to less than where the standard initialization starts."""
    model, batch = family.model(), family.batch()
    first = float(family.loss(model, batch))
    gm.init.isometric_(model, batch, predict=family.loss)
    start = float(family.loss(model, batch))
    end = trained(model, family, torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3), 10)
    wanted(math.isfinite(end) and end < start, f"the loss went from {start:.3g} to {end:.3g}")
    wanted(end < first, f"{end:.3g} after ten steps; the standard initialization starts at {first:.3g}")
    return Cell("right", f"{start:.2f} → {end:.2f}")


def trained(model: nn.Module, family: Family, optimizer: torch.optim.Optimizer, num_steps: int) -> float:
    batch = family.batch()
    for _ in range(num_steps):
        optimizer.zero_grad()
        family.loss(model, batch).backward()
        optimizer.step()
    return float(family.loss(model, batch))


def check_optimizer(family: Family, name: str) -> Cell:
    """Three steps on one batch, at the usual rate or the first of its tenths at which the loss falls."""
    entry, losses = OPTIMIZERS[name], []
    for divisor in (1, 10, 100):
        model = family.model()
        first = float(family.loss(model, family.batch()))
        frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        last = trained(model, family, entry.make(model, entry.lr / divisor), 3)
        moved = [n for n, p in model.named_parameters() if n in frozen and not torch.equal(p, frozen[n])]
        wanted(not moved, f"moved {moved[:1]}, which is frozen")
        wanted(all(p.isfinite().all() for p in model.parameters()), f"weights are not finite at lr {entry.lr}")
        losses.append(last)
        if last < first:
            return Cell("right", "" if divisor == 1 else f"lr / {divisor}")
    raise Wrong(f"the loss went from {first:.4g} to {', '.join(f'{x:.4g}' for x in losses)} at lr, lr / 10, lr / 100")


def check_compress(family: Family) -> Cell:
    """The compressed model is as small as asked for, and the one from its file gives the same loss to the bit."""
    model, batch = family.model(), family.batch()
    plan = gm.compress(model, batches=[batch], objective=family.loss, keep=1.0)
    small = None
    for keep in (0.6, 0.8, 0.95):
        try:
            plan = plan.at(keep=keep)
            small = plan.apply()
            break
        except GramianError as error:
            if keep == 0.95 or "smallest possible keep" not in str(error):
                raise
    assert small is not None
    count = sum(p.numel() for p in small.parameters())
    total = sum(p.numel() for p in model.parameters())
    wanted(count == plan.parameters <= keep * total, f"{count:,} parameters, planned {plan.parameters:,} of {total:,}")
    loss = family.loss(small, batch)
    wanted(loss.isfinite(), f"the compressed model's loss is {float(loss)}")
    with tempfile.TemporaryDirectory() as folder:
        gm.save_compressed(small, Path(folder) / "small.safetensors")
        loaded = gm.load_compressed(family.model(seed=1), Path(folder) / "small.safetensors").eval()
    again = family.loss(loaded, batch)
    wanted(torch.equal(loss, again), f"loss {float(loss):.6g}, from the file {float(again):.6g}")
    return Cell("right", f"keep {keep}")


VERBS: dict[str, Callable[[Family], Cell]] = {
    "blocks": check_blocks,
    "file": check_file,
    "library's file": check_pretrained,
    "capture": check_capture,
    "inspect": check_inspect,
    "isometric_": check_isometric,
    **{name: partial(check_optimizer, name=name) for name in OPTIMIZERS},
    "compress": check_compress,
}
