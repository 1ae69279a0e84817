"""Every verb on every family: which cells are right, refused by name, wrong, or a crash.

    python tests/families.py                     # all families, a line for each
    python tests/families.py gpt2 "timm vit"     # some
    python tests/families.py --write             # all, and docs/families.md

A verb is called as its users call it, and what it gives is compared with something that does not ask gramian's table
of layers: which operations the weights take part in as torch dispatches them (`Uses`), and what hooks see.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import gramian as gm
from family_models import FAMILIES, Family
from family_oracles import hooked_moments, uses_of
from gramian.checkpoint import open_checkpoint
from gramian.errors import GramianError
from gramian.inspection.matrices import find_holdings
from gramian.optim.registry import OPTIMIZERS

Verdict = Literal["right", "alarm", "refused", "wrong", "crash"]
PAGE = Path(__file__).parents[1] / "docs" / "families.md"


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


# ---- the verbs -----------------------------------------------------------------------------------------------------


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
    share = hidden / (hidden + left) if hidden else 1.0
    wanted(share >= 0.99, f"{share:.1%} of the hidden parameters take the matrix direction")
    return Cell("right", f"{share:.0%}")


Matrices = dict[str, tuple[Tensor, str]]


def matrices_of_model(model: nn.Module) -> Matrices:
    return {
        name: (matrix, block.role)
        for block in gm.blocks(model).blocks
        for name, matrix in zip(block.names, block.pieces(), strict=True)
    }


def matrices_of_file(path: Path) -> Matrices:
    checkpoint = open_checkpoint(path)
    return {
        name: (matrix, holding.role)
        for holding in find_holdings(checkpoint)[0]
        for name, matrix in zip(holding.names, holding.split(checkpoint.load(holding.entry.name)), strict=True)
    }


def compare(theirs: Matrices, ours: Matrices, what: str) -> None:
    for name in [*ours, *(theirs.keys() - ours.keys())]:
        there, here = theirs.get(name), ours.get(name)
        wanted(there is not None, f"{what} lacks {name}")
        wanted(here is not None, f"{what} has {name} {tuple(there[0].shape) if there else ''} besides")
        assert there is not None
        assert here is not None
        same = there[0].shape == here[0].shape and torch.equal(there[0], here[0])
        wanted(same, f"{what}: {name} is {tuple(there[0].shape)}, wanted {tuple(here[0].shape)} or other entries")
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
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(folder)
        else:
            torch.save(model.state_dict(), Path(folder) / "m.pt")
        path = Path(folder) if hasattr(model, "save_pretrained") else Path(folder) / "m.pt"
        theirs = matrices_of_file(path)
    # Libraries rename what they write, so matrices are told by their entries; only a file without classes can be
    # wrong about groups and transposition, which the page says.
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
            if moment is None:
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


# ---- the runner ----------------------------------------------------------------------------------------------------


def run(family: Family, verb: str) -> Cell:
    """One cell; whatever a verb raises is a verdict."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            return VERBS[verb](family)
    except Wrong as error:
        return Cell("wrong", str(error))
    except GramianError as error:
        return Cell("refused", str(error), traceback.format_exc())
    except Exception as error:
        return Cell("crash", f"{type(error).__name__}: {error}", traceback.format_exc())


Matrix = dict[str, dict[str, Cell]]


def run_all(names: list[str], verbs: list[str], *, verbose: bool = False) -> Iterator[tuple[str, dict[str, Cell]]]:
    for name in names:
        start = time.monotonic()
        try:
            FAMILIES[name].model()
        except Exception as error:
            print(f"{name:20} cannot be built: {type(error).__name__}: {error}", flush=True)
            continue
        row = {verb: run(FAMILIES[name], verb) for verb in verbs}
        counts = Counter(cell.verdict for cell in row.values())
        print(f"{name:20} {time.monotonic() - start:5.1f} s  {dict(counts)}", flush=True)
        for verb, cell in row.items():
            if cell.verdict != "right":
                print(f"    {verb:15} {cell.verdict}: {cell.note[:300]}", flush=True)
                if verbose:
                    print(cell.details, flush=True)
        yield name, row


MARKS = {"right": "✓", "alarm": "alarm", "refused": "–", "wrong": "**wrong**", "crash": "**crash**"}


def page(matrix: Matrix) -> str:
    """The matrix as Markdown, with a line for each cell that is not right."""
    counts = {verb: Counter(row[verb].verdict for row in matrix.values()) for verb in VERBS}
    total = Counter(cell.verdict for row in matrix.values() for cell in row.values())
    lines = [
        "# Families",
        "",
        f"Every verb on {len(matrix)} models of public libraries, tiny and at random (`tests/family_models.py`), as "
        "`make test-families` measured it. Each verb is compared with something that does not ask gramian's table of "
        "layers: the operations that torch dispatches, hooks, a file read back (`tests/families.py`). ✓ right; – refused "
        "by name; alarm: a finding on a standard initialization; **wrong** and **crash** as they say. Of "
        f"{sum(total.values())} cells {total['right']} are right, {total['refused']} refused, {total['alarm']} alarms, "
        f"{total['wrong']} wrong and {total['crash']} crashes.",
        "",
        "| verb | right | refused | alarm | wrong | crash |",
        "|-|-|-|-|-|-|",
    ]
    kinds = ("right", "refused", "alarm", "wrong", "crash")
    lines += [f"| {verb} | " + " | ".join(str(counts[verb][kind]) for kind in kinds) + " |" for verb in VERBS]
    lines += [
        "",
        "`blocks` shows the share of hidden parameters, of those that torch multiplies as matrices, that take an "
        "optimizer's matrix direction; `capture` the number of layers compared with hooks, and the share of hidden "
        "parameters with second moments; an optimizer the rate where its usual one was too large for three steps.",
        "",
        "| family | library | " + " | ".join(VERBS) + " |",
        "|" + "-|" * (len(VERBS) + 2),
    ]
    for name, row in matrix.items():
        cells = [MARKS[c.verdict] + (f" {c.note}" if c.verdict == "right" and c.note else "") for c in row.values()]
        lines.append(f"| {name} | {FAMILIES[name].library} | " + " | ".join(cells) + " |")
    lines += ["", "## What is not right", ""]
    for name, row in matrix.items():
        for verb, cell in row.items():
            if cell.verdict != "right":
                note = " ".join(cell.note.split())[:240].replace("|", "\\|")
                lines.append(f"- {name}, {verb}, {cell.verdict}: `{note}`")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="by name; all by default")
    parser.add_argument("--verbs", default=",".join(VERBS), help="comma-separated")
    parser.add_argument("--write", action="store_true", help=f"writes docs/{PAGE.name}")
    parser.add_argument("--verbose", action="store_true", help="with tracebacks")
    options = parser.parse_args()
    if unknown := [name for name in options.families if name not in FAMILIES]:
        parser.error(f"no family {unknown[0]!r}; there are {', '.join(FAMILIES)}")
    torch.set_num_threads(1)
    verbs = [verb for verb in VERBS if verb in options.verbs.split(",")]
    matrix = dict(run_all(options.families or list(FAMILIES), verbs, verbose=options.verbose))
    total = Counter(cell.verdict for row in matrix.values() for cell in row.values())
    for verb in verbs:
        print(f"{verb:15} {dict(Counter(row[verb].verdict for row in matrix.values()))}")
    print(f"{len(matrix)} families, {sum(total.values())} cells: {dict(total)}")
    if options.write:
        PAGE.write_text(page(matrix), encoding="utf-8")
    return int(bool(total["wrong"] or total["crash"]))


if __name__ == "__main__":
    sys.exit(main())
