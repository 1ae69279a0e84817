"""A small part of the families in the quick tests, and that their oracles notice what is wrong.

All of them: `make test-families`, which runs `tests/families.py`.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import gramian as gm
from families import run
from family_checks import VERBS, Wrong, check_blocks, check_capture, check_file, check_pretrained
from family_models import FAMILIES, Family
from gramian.layers import LAYERS, NAMED, Layer, NamedWeight, names

SMALL = [name for name, family in FAMILIES.items() if family.small]
CHEAP = ("blocks", "file", "library's file", "capture", "muon", "compress")


@pytest.mark.parametrize("verb", CHEAP)
@pytest.mark.parametrize("name", SMALL)
def test_verbs_are_right(name: str, verb: str) -> None:
    cell = run(FAMILIES[name], verb)
    assert cell.verdict == "right", f"{cell.note}\n{cell.details}"


def test_the_table_is_wide() -> None:
    assert len(FAMILIES) >= 45
    assert len({family.library for family in FAMILIES.values()}) >= 6
    assert len(SMALL) >= 8
    assert set(CHEAP) <= VERBS.keys()


def test_a_seed_fixes_model_and_batch() -> None:
    family, state = FAMILIES["gpt2"], torch.get_rng_state()
    first, second = (family.loss(family.model(), family.batch()) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


# ---- the oracles notice ----------------------------------------------------------------------------------------------


def without(monkeypatch: pytest.MonkeyPatch, name: str, *instead: NamedWeight) -> None:
    rows = tuple(row for row in NAMED if row.name != name)
    monkeypatch.setattr("gramian.layers.names.NAMED", (*instead, *rows))
    monkeypatch.setattr(names, "_rows_named", names._rows_named.__wrapped__)  # which keeps rows of the whole table


def test_a_decay_taken_for_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "A_log")
    monkeypatch.setattr("gramian.layers.lookup.acts_by_channel", lambda name, shape: "")  # the words tell it too
    with pytest.raises(Wrong, match="A_log is hidden, used as elementwise"):
        check_blocks(FAMILIES["mamba"])


def test_experts_in_the_wrong_orientation(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "experts.down_proj", NamedWeight("experts.down_proj", "e i o -> e o i"))
    with pytest.raises(Wrong, match="the product runs over dimension"):
        check_blocks(FAMILIES["mixtral"])


def test_experts_that_no_row_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "experts.down_proj")
    with pytest.raises(Wrong, match=r"experts\.down_proj"):
        check_blocks(FAMILIES["mixtral"])


def test_a_matrix_in_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gramian.layers.classes.LAYERS", (Layer(nn.Linear, "elementwise"), *LAYERS))
    with pytest.raises(Wrong, match="of the hidden parameters take the matrix direction"):
        check_blocks(FAMILIES["llama"])


def test_a_file_with_other_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["gpt2"].model()
    truth = gm.blocks(model).metadata()
    changed = {key: value.replace('"hidden"', '"elementwise"', 1) for key, value in truth.items()}
    monkeypatch.setattr("gramian.block.Blocks.metadata", lambda self: changed)
    with pytest.raises(Wrong, match="the file"):
        check_file(FAMILIES["gpt2"])


def test_a_library_file_read_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gramian.layers.listed.NAMED", ())
    with pytest.raises(Wrong, match="differ, first"):
        check_pretrained(FAMILIES["gpt2"])


@pytest.mark.parametrize("side", ["A", "G"])
def test_second_moments_that_are_off(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = gm.capture

    def off(*args: object) -> gm.Statistics:
        stats = capture(*args)  # pyright: ignore[reportArgumentType]
        moment = getattr(next(s for s in stats.sites() if s.op == "linear"), side)
        moment.sum.mul_(1.01)
        moment.total.mul_(1.01)
        return stats

    monkeypatch.setattr(gm, "capture", off)
    with pytest.raises(Wrong, match=f"{side} of .* is off by"):
        check_capture(FAMILIES["llama"])


def test_whatever_a_verb_raises_is_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(family: Family) -> None:
        raise KeyError(0)

    monkeypatch.setitem(VERBS, "blocks", raises)
    assert run(FAMILIES["gpt2"], "blocks").verdict == "crash"
