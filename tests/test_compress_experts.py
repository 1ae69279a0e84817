"""Experts in one parameter are factored one by one, each by the rows that reach it."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gramian as gm
from cases import seeded
from gramian.compression.calibration.experts import rows_of_parts
from gramian.compression.calibration.shrinkage import pooled
from gramian.compression.layers.lowrank import LowRank
from gramian.gram import Gram

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 32,
    "head_dim": 12, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
TOKENS = torch.randint(2, 48, (40, 12), generator=seeded(0))
BATCHES = [{"input_ids": part, "labels": part} for part in TOKENS[:32].split(8)]
OBJECTIVE = gm.Objective.next_token()


def network(kind: str = "Mixtral") -> Any:
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SIZES)).eval()


def scores(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS[32:]).logits


def planned(model: nn.Module) -> gm.compression.Plan:
    return gm.compress(model, BATCHES, OBJECTIVE, include=["*experts*"], of="factorable", keep=0.5)


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_each_expert_is_factored_by_what_reaches_it(kind: str) -> None:
    """gpt-oss has its matrices (inputs, outputs), with gate and up in turn."""
    model = network(kind)
    plan, before = planned(model), scores(model)
    assert len(plan.spectra) == 8
    whole = plan.at(keep=1.0).apply()
    assert [type(m) for m in whole.modules()] == [type(m) for m in model.modules()]
    own = model.state_dict()
    assert own.keys() == whole.state_dict().keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in whole.state_dict().items())

    small, plainly = plan.apply(), copy.deepcopy(model)
    assert sum(p.numel() for p in small.parameters()) == plan.parameters
    experts = small.model.layers[0].mlp.experts
    for local in ("gate_up_proj", "down_proj"):
        stack = plainly.model.layers[0].mlp.experts.get_parameter(local).data
        for e, layer in enumerate(getattr(experts, f"each_{local}")):
            if isinstance(layer, LowRank):
                u, s, vt = torch.linalg.svd(stack[e], full_matrices=False)
                stack[e] = u[:, : layer.rank] * s[: layer.rank] @ vt[: layer.rank]
    error = float((scores(small) - before).square().mean())
    assert error < 0.9 * float((scores(plainly) - before).square().mean())
    for same in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(scores(same), scores(small))
    assert torch.equal(scores(gm.refit(plan.at(keep=1.0).apply(), model, BATCHES, OBJECTIVE)), before)


def test_they_are_saved_loaded_and_cut_again(tmp_path: Path) -> None:
    import gramian.integrations.compressed  # noqa: F401

    model = network()
    plan = planned(model)
    small = plan.apply()
    gm.save_compressed(small, tmp_path / "small.safetensors")
    gm.save_plan(plan, tmp_path / "plan.safetensors")
    small.save_pretrained(tmp_path / "small")
    loaded = gm.load_compressed(network(), tmp_path / "small.safetensors")
    folder = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert torch.equal(scores(loaded), scores(small))
    assert torch.equal(scores(folder), scores(small))
    assert gm.load_plan(model, tmp_path / "plan.safetensors").forms == plan.forms
    before = scores(small)
    again = gm.compress(small, BATCHES, OBJECTIVE, include=["*experts*"], of="factorable", keep=0.6)
    assert len(again.spectra) == 8
    assert again.parameters < plan.parameters
    assert torch.equal(scores(small), before)


@pytest.mark.slow
def test_who_does_not_know_them_does_not_load_them(tmp_path: Path) -> None:
    planned(network()).apply().save_pretrained(tmp_path)
    code = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "mismatched" in done.stderr


def test_an_expert_that_nothing_reaches_stays_dense_with_the_reason() -> None:
    model = network()
    with torch.no_grad():
        gate = model.model.layers[0].mlp.gate.weight
        gate[3] = 0  # whose score is never among the two largest
        gate[:3] *= 1e3
    stack = "model.layers.0.mlp.experts.down_proj"
    batches = [{"input_ids": TOKENS[:16], "labels": TOKENS[:16]}]
    reached = gm.capture(model, batches, OBJECTIVE)[stack].A.count
    plan = gm.compress(model, batches, OBJECTIVE, include=["*experts*"], of="factorable", keep=0.7)
    left = {name for name, why in plan.reasons.items() if why == "no row of the calibration reached it"}
    name = "model.layers.0.mlp.experts.each_down_proj"
    assert {f"{name}.{e}" for e in range(4) if reached[e] == 0} == {one for one in left if one.startswith(name)}


def test_rows_of_gate_and_up() -> None:
    def rows(kind: str) -> list[list[int]]:
        found = {block.name: block for block in gm.blocks(network(kind)).blocks}
        return rows_of_parts(found["model.layers.0.mlp.experts.gate_up_proj"]).tolist()

    assert rows("Mixtral") == 4 * [list(range(80))]
    assert rows("GptOss") == 4 * [[*range(0, 80, 2), *range(1, 80, 2)]]


def test_few_rows_take_the_pool_and_many_their_own() -> None:
    """The pool is the better estimate for experts that are alike, and no worse for those that are not."""
    d, scale = 16, torch.logspace(0, -1, 16)

    def error(num: int, alike: bool) -> float:
        """Of the pooled second moment, as a share of that of the sample itself, over ten samples."""
        scales = torch.stack([scale if alike else scale.roll(4 * e) for e in range(4)])
        true, errors = scales[0].square().diag(), []
        for seed in range(10):
            gram = Gram(d, (4,)).update(torch.randn(4, num, d, generator=seeded(seed)) * scales[:, None])
            found = pooled(gram, 0, torch.full((4,), float(num))).matrix
            errors.append([float((m - true).square().sum()) for m in (found, gram.matrix[0])])
        mixed, plain = torch.tensor(errors).sum(0).tolist()
        return mixed / plain

    assert error(8, True) < 0.5
    assert error(8, False) < 1
    assert error(4000, True) < 1
    assert error(4000, False) == pytest.approx(1, abs=0.05)
