"""Two checkpoints: the difference that was planted is the difference that is reported, and the adapter restores it."""

from __future__ import annotations

import json
import math

import pytest
import torch

from gramian.checkpoint import clean_name, load_tensors, save_tensors
from gramian.errors import CheckpointError, GramianError
from gramian.inspection import compare_checkpoints, extract_lora
from gramian.inspection.comparing.comparison import subspace_angle
from gramian.inspection.weights.quadrature import leading_vectors


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pair(tmp_path):
    """A base and a fine-tune: rank 5 added to the projections, a norm and an embedding changed, the rest equal."""
    base = {f"layers.{i}.proj.weight": normal(48, 64, seed=i) for i in range(4)}
    base |= {f"layers.{i}.mlp.weight": normal(32, 32, seed=9 + i) for i in range(4)}
    base |= {"norm.weight": torch.ones(64), "embed_tokens.weight": normal(50, 64)}
    tuned = dict(base)
    for i in range(4):
        tuned[f"layers.{i}.proj.weight"] = base[f"layers.{i}.proj.weight"] + 0.01 * normal(48, 5) @ normal(5, 64)
    tuned["norm.weight"] = base["norm.weight"] * 2
    tuned["embed_tokens.weight"] = base["embed_tokens.weight"].index_fill(0, torch.tensor([3]), 1.0)
    save_tensors(tmp_path / "base.safetensors", base)
    save_tensors(tmp_path / "tuned.safetensors", tuned)
    return tmp_path / "tuned.safetensors", tmp_path / "base.safetensors"


@pytest.mark.parametrize("quick", [False, True])
def test_the_planted_rank_is_reported(pair, quick):
    report = compare_checkpoints(*pair, quick=quick)
    assert [layer.name for layer in report.layers] == [
        "embed_tokens.weight", *(f"layers.{i}.proj.weight" for i in range(4)), "norm.weight"
    ]  # fmt: skip
    for layer in report.layers[1:-1]:
        assert layer.numerical_rank == 5
        assert layer.rank_99[0] <= 5
    finding = next(f for f in report.findings if f.code == "low-rank-update")
    assert "rank-5" in finding.title
    new, old = load_tensors(pair[0])[0], load_tensors(pair[1])[0]
    name = "layers.1.proj.weight"
    expected = float((new[name] - old[name]).norm() / old[name].norm())
    assert report.layers[2].relative_change == pytest.approx(expected, rel=1e-5)
    assert "Equal in both" in " ".join(report.notes)


def test_equal_checkpoints_are_said_to_be(pair):
    report = compare_checkpoints(pair[1], pair[1])
    assert [f.code for f in report.findings] == ["no-difference"]
    assert report.status == "good"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapter_restores_the_difference(pair, tmp_path, dtype):
    for path in pair:
        tensors, _ = load_tensors(path)
        save_tensors(path, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    adapter = extract_lora(*pair, 5, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    factors, _ = load_tensors(tmp_path / "adapter" / "adapter_model.safetensors")
    new, old = load_tensors(pair[0])[0], load_tensors(pair[1])[0]
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == 5
    assert set(config["target_modules"]) == {f"layers.{i}.proj" for i in range(4)}
    assert adapter.saved == ("norm",)
    assert adapter.overwritten == ("embed_tokens.weight",)  # it may be tied to a head
    for name in ("norm.weight", "embed_tokens.weight"):
        torch.testing.assert_close(factors[f"base_model.model.{name}"], new[name], rtol=0, atol=0)
    for module in config["target_modules"]:
        a, b = (factors[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
        delta = new[f"{module}.weight"].double() - old[f"{module}.weight"].double()
        assert a.shape == (5, 64)
        assert b.shape == (48, 5)
        reported = adapter.errors[module]
        sigma = torch.linalg.svdvals(delta)
        best = float(sigma[5:].norm() / sigma.norm())
        assert reported == pytest.approx(float((delta - b @ a).norm() / delta.norm()), rel=1e-6, abs=1e-9)
        assert reported <= best * (1 + 1e-6) + 1e-6


def test_a_rank_beyond_the_matrix_is_cut_and_said_so(pair, tmp_path):
    extract_lora(*pair, 60, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) == {48}
    assert config["alpha_pattern"] == config["rank_pattern"]


def test_checkpoints_that_share_nothing_are_refused(pair, tmp_path):
    other = tmp_path / "other.safetensors"
    for tensors, message in (
        ({"w": torch.eye(3)}, "share no tensor"),
        ({"base_model.model.layers.0.proj.lora_A.weight": torch.ones(2, 64)}, "an adapter's factors"),
    ):
        save_tensors(other, tensors)
        for function in (compare_checkpoints, lambda a, b: extract_lora(a, b, 2, tmp_path / "x")):
            with pytest.raises(CheckpointError, match=message):
                function(pair[0], other)
    with pytest.raises(CheckpointError, match="nothing to extract"):
        extract_lora(pair[0], pair[0], 2, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_difference_that_is_not_finite_is_an_error(pair, tmp_path):
    tensors, _ = load_tensors(pair[0])
    tensors["layers.0.proj.weight"][0, 0] = math.nan
    save_tensors(pair[0], tensors)
    assert compare_checkpoints(*pair).findings[0].code == "non-finite-difference"
    with pytest.raises(GramianError, match="not finite"):
        extract_lora(*pair, 2, tmp_path / "x")


def test_a_rotation_is_the_angle_that_is_reported():
    u, v = torch.linalg.qr(normal(40, 3)).Q, torch.linalg.qr(normal(30, 6)).Q
    angle = math.radians(25.0)
    turned = torch.cat((v[:, :2], math.cos(angle) * v[:, 2:3] + math.sin(angle) * v[:, 3:4]), 1)
    strengths = torch.tensor([9.0, 8.5, 8.0])
    old, new = (u * strengths) @ v[:, :3].mT, (u * strengths) @ turned.mT
    reported, dim = subspace_angle(new, old)
    assert dim == 3
    assert reported == pytest.approx(25.0, abs=0.01)
    assert subspace_angle(torch.eye(9), torch.eye(9)) == (None, None)


def test_iteration_finds_the_vectors_that_lapack_does():
    u, v = torch.linalg.qr(normal(200, 20)).Q, torch.linalg.qr(normal(1100, 20)).Q
    w = (u * torch.logspace(1, -1, 20)) @ v.mT
    got, values = leading_vectors(w, 4)
    torch.testing.assert_close(values, torch.logspace(1, -1, 20)[:4].double(), rtol=1e-4, atol=0)
    assert float(torch.linalg.svdvals(got.mT @ v[:, :4].double()).min()) > 1 - 1e-5


def codes(report):
    return {finding.code for finding in report.findings}


def compare(tmp_path, new, old):
    for name, tensors in (("new", new), ("old", old)):
        save_tensors(tmp_path / f"{name}.safetensors", tensors)
    return compare_checkpoints(tmp_path / "new.safetensors", tmp_path / "old.safetensors")


NAN = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
OTHER_NAN = torch.tensor([0x7FC00002], dtype=torch.int32).view(torch.float32)

# One tensor of each kind, and the same with one bit changed.
BITS = {
    "bias": (torch.ones(5), torch.ones(5).index_fill(0, torch.tensor([2]), 1 + 2**-23)),
    "scalar": (torch.tensor(1.0), torch.tensor(2.0)),
    "counter": (torch.tensor(7), torch.tensor(8)),
    "integer": (torch.arange(6).reshape(2, 3), torch.arange(6).reshape(2, 3).flip(0)),
    "large integer": (torch.tensor([2**62]), torch.tensor([2**62 + 1])),
    "int8": (torch.ones(3, 3, dtype=torch.int8), torch.full((3, 3), -1, dtype=torch.int8)),
    "float8": (torch.ones(3, 3).to(torch.float8_e4m3fn), torch.full((3, 3), 2.0).to(torch.float8_e4m3fn)),
    "float8_e5m2": (torch.ones(4).to(torch.float8_e5m2), torch.full((4,), 2.0).to(torch.float8_e5m2)),
    "bool": (torch.tensor([True, False]), torch.tensor([True, True])),
    "complex": (torch.ones(2, 2, dtype=torch.complex64), torch.full((2, 2), 1j)),
    "signed zero": (torch.zeros(3), -torch.zeros(3)),
    "NaN": (NAN, OTHER_NAN),
    "experts": (torch.ones(2, 3, 4), torch.full((2, 3, 4), 2.0)),
}


@pytest.mark.parametrize("kind", BITS)
def test_every_tensor_is_compared_bit_by_bit(kind, tmp_path):
    new, old = BITS[kind]
    rest = {"w.weight": normal(4, 4), "empty": torch.zeros(0, 3)}
    same = compare(tmp_path, rest | {"x": new}, rest | {"x": new.clone()})
    assert codes(same) == {"no-difference"}
    assert "3 tensors, bit for bit" in same.findings[0].evidence
    report = compare(tmp_path, rest | {"x": new}, rest | {"x": old})
    assert "no-difference" not in codes(report)
    assert codes(report) == ({"non-finite-difference"} if kind == "NaN" else {"changed-vectors"})
    assert [layer.name for layer in report.layers] == ["x"]
    assert json.loads(report.to_json())["layers"][0]["name"] == "x"


def test_the_largest_change_of_a_vector_is_named(tmp_path):
    old = {"w.weight": normal(4, 4)} | {f"norm.{i}.weight": torch.ones(8) for i in range(3)}
    new = old | {"norm.1.weight": torch.full((8,), 1.5), "norm.2.weight": torch.full((8,), 1.01)}
    report = compare(tmp_path, new, old)
    finding = next(finding for finding in report.findings if finding.code == "changed-vectors")
    assert finding.where == "norm.1.weight"
    assert "norm.1.weight 0.5, norm.2.weight 0.01" in finding.evidence
    rows = {layer.name: layer.relative_change for layer in report.layers}
    assert rows == {"norm.1.weight": pytest.approx(0.5), "norm.2.weight": pytest.approx(0.01)}
    assert "Changed, but not analyzed as matrices: norm.1.weight, norm.2.weight" in report.notes


@pytest.mark.parametrize("name", ["w.weight", "norm.weight", "experts.unknown", "buffer"])
def test_nan_in_one_of_the_two_is_found_in_any_tensor(name, tmp_path):
    old = {"w.weight": normal(4, 4), "norm.weight": torch.ones(4), "experts.unknown": normal(2, 3, 4)}
    old["buffer"] = torch.full((3, 3), -math.inf).triu(1)  # infinite in both, which is no fault
    assert codes(compare(tmp_path, old, old)) == {"no-difference"}
    broken = old[name].clone()
    broken[0] = math.nan
    for new, other in ((broken, old[name]), (old[name], broken)):
        report = compare(tmp_path, old | {name: new}, old | {name: other})
        finding = next(finding for finding in report.findings if finding.code == "non-finite-difference")
        assert finding.severity == "error"
        assert finding.where == name


def test_equal_up_to_a_cast_is_said_to_be(tmp_path):
    old = {"w.weight": normal(6, 6), "norm.weight": normal(6, seed=1)}
    half = {name: tensor.bfloat16() for name, tensor in old.items()}
    report = compare(tmp_path, old, half)
    assert codes(report) == {"equal-after-cast"}
    assert "float32 → bfloat16: OTHER is MODEL rounded" in report.findings[0].title
    assert not report.layers
    assert "MODEL is OTHER rounded" in compare(tmp_path, half, old).findings[0].title
    same = {name: tensor.float() for name, tensor in half.items()}
    assert "the values are the same" in compare(tmp_path, same, half).findings[0].title
    # one entry by which it is no cast
    half["w.weight"] = half["w.weight"].clone()
    half["w.weight"][2, 2] += 1
    report = compare(tmp_path, old, half)
    assert [layer.name for layer in report.layers] == ["w.weight"]
    assert any(note.startswith("Equal up to the cast") and "norm.weight" in note for note in report.notes)


def test_one_tensor_of_another_shape_does_not_stop_the_comparison(tmp_path):
    old = {"embed_tokens.weight": normal(20, 6), "layers.0.w.weight": normal(6, 6, seed=1), "odd.weight": normal(3, 3)}
    old |= {"layers.1.w.weight": normal(6, 6, seed=2)}
    new = {name: tensor.clone() for name, tensor in old.items() if "layers.1" not in name}
    new["embed_tokens.weight"] = torch.cat((old["embed_tokens.weight"], normal(4, 6, seed=3)))
    new["odd.weight"], new["head.weight"] = normal(2, 5), normal(2, 6)
    report = compare(tmp_path, new, old)
    assert codes(report) == {"equal-in-common"}
    rows = {layer.name: layer for layer in report.layers}
    assert set(rows) == {"odd.weight", "head.weight", "layers.1.w.weight", "embed_tokens.weight[20:24]"}
    assert rows["embed_tokens.weight[20:24]"].shape == (4, 6)
    assert "rows 20 to 23, only in" in rows["embed_tokens.weight[20:24]"].note
    assert report.facts["rows that only one has, not compared"] == 4
    assert report.facts["tensors that were not compared"] == 1
    assert "4 rows that only one has" in report.findings[0].evidence
    assert "only in" in rows["layers.1.w.weight"].note
    notes = " ".join(report.notes)
    assert "embed_tokens.weight (24, 6) and (20, 6): the first 20 rows; 4 rows only in" in notes
    assert "not compared: odd.weight (2, 5) and (3, 3)" in notes
    new["embed_tokens.weight"][3] += 1
    report = compare(tmp_path, new, old)
    layer = next(layer for layer in report.layers if layer.name == "embed_tokens.weight")
    assert layer.shape == (20, 6)
    expected = math.sqrt(6) / float(old["embed_tokens.weight"].norm())
    assert layer.relative_change == pytest.approx(expected, rel=1e-5)
    assert layer.numerical_rank == 1


@pytest.mark.parametrize(
    ("new", "old"),
    [("", "model."), ("bert.", ""), ("model.model.", "model."), ("base_model.model.", ""), ("transformer.", "gpt."),
     ("a.b.c.", "d."), ("_orig_mod.module.", "")],
)  # fmt: skip
def test_prefixes_are_matched(new, old, tmp_path):
    body = {f"layers.{i}.{part}.weight": normal(6, 6, seed=7 * i + len(part)) for i in range(3) for part in ("q", "up")}
    body |= {"embed.weight": normal(9, 6), "norm.weight": torch.ones(6)}
    tuned = {name: tensor + 0.1 for name, tensor in body.items()}
    head = {"score.weight": normal(2, 6)}
    report = compare(
        tmp_path, {new + name: w for name, w in tuned.items()} | head, {old + name: w for name, w in body.items()}
    )
    changed = [layer for layer in report.layers if layer.kind != "unmatched"]
    assert len(changed) == len(body)
    assert [layer.name for layer in report.layers if layer.kind == "unmatched"] == ["score.weight"]
    if clean_name(new + "x") != clean_name(old + "x"):
        assert f"{len(body)} name{'s' * (len(body) != 1)} matched" in report.notes[0]


def test_prefixes_that_several_changes_explain_are_not_matched(tmp_path):
    tower = {f"layer.{i}.w.weight": normal(6, 6, seed=i) for i in range(3)}
    two = {f"{side}.{name}": tensor for side in ("query", "document") for name, tensor in tower.items()}
    with pytest.raises(CheckpointError, match="several prefixes fit equally well"):
        compare(tmp_path, tower, two)
    # another head is not the same head under another name
    heads = [{f"{head}.dense.weight": normal(6, 6), f"{head}.out.weight": normal(2, 6)} for head in ("head", "lm_head")]
    report = compare(tmp_path, tower | heads[0], tower | heads[1])
    assert codes(report) == {"equal-in-common"}
    assert len(report.layers) == 4


def test_each_file_says_what_its_own_tensors_hold(tmp_path):
    """A fused projection (in, out), as the config of the one tells, against (out, in)."""
    q, k, v = (normal(8, 8, seed=i) for i in range(3))
    delta = normal(8, 1) @ normal(1, 8)
    (tmp_path / "conv").mkdir()
    (tmp_path / "conv/config.json").write_text(json.dumps({"model_type": "gpt2", "n_head": 2, "n_embd": 8}))
    conv = {"h.0.attn.c_attn.weight": torch.cat((q + delta, k, v)).mT.contiguous(), "h.0.ln.weight": torch.ones(8)}
    save_tensors(tmp_path / "conv/model.safetensors", conv)
    linear = {"h.0.attn.c_attn.weight": torch.cat((q, k, v)), "h.0.ln.weight": torch.ones(8)}
    save_tensors(tmp_path / "linear.safetensors", linear)
    report = compare_checkpoints(tmp_path / "conv", tmp_path / "linear.safetensors")
    assert [layer.name for layer in report.layers] == ["h.0.attn.c_attn.weight[q]"]
    assert report.layers[0].numerical_rank == 1
    # the config of the other one is enough for both
    neox = {"layers.0.attention.query_key_value.weight": normal(24, 8), "layers.0.ln.weight": torch.ones(8)}
    changed = neox | {
        "layers.0.attention.query_key_value.weight": neox["layers.0.attention.query_key_value.weight"] + 1
    }
    save_tensors(tmp_path / "plain.safetensors", changed)
    (tmp_path / "conv/config.json").write_text(json.dumps({"model_type": "gpt_neox", "num_attention_heads": 2}))
    save_tensors(tmp_path / "conv/model.safetensors", neox)
    report = compare_checkpoints(tmp_path / "plain.safetensors", tmp_path / "conv")
    assert [layer.name.partition("[")[2] for layer in report.layers] == ["q]", "k]", "v]"]


def test_an_alias_is_compared_once_and_an_untied_head_with_the_table(tmp_path):
    table = normal(9, 4)
    tied = {"embed.weight": table, "head.weight": table, "layer.weight": normal(4, 4)}
    assert codes(compare(tmp_path, tied, tied)) == {"no-difference"}
    untied = tied | {"head.weight": table + normal(9, 1) @ normal(1, 4)}
    report = compare(tmp_path, untied, tied)
    assert [(layer.name, layer.numerical_rank) for layer in report.layers] == [("head.weight", 1)]


class Harmful:
    """What a file could run if it were unpickled."""

    def __reduce__(self):
        return (print, ("ran",))


def test_foreign_files_are_refused_or_compared(pair, tmp_path, capsys):
    torch.save({"w": torch.ones(2), "x": Harmful()}, tmp_path / "harmful.pt")
    for function in (compare_checkpoints, lambda a, b: extract_lora(a, b, 2, tmp_path / "x")):
        with pytest.raises(CheckpointError, match="refused"):
            function(pair[0], tmp_path / "harmful.pt")
    assert "ran" not in capsys.readouterr().out
    tensors, _ = load_tensors(pair[1])
    quantized = {name: (tensor * 10).to(torch.int8) if "proj" in name else tensor for name, tensor in tensors.items()}
    report = compare(tmp_path, quantized, tensors)
    assert [layer.kind for layer in report.layers] == ["quantized tensor"] * 4
    assert codes(report) == {"changed-vectors"}


PARTS = {
    "weight norm": torch.nn.utils.parametrizations.weight_norm,
    "old weight norm": torch.nn.utils.weight_norm,
    "spectral norm": torch.nn.utils.parametrizations.spectral_norm,
    "orthogonal": torch.nn.utils.parametrizations.orthogonal,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("kind", PARTS)
def test_a_weight_in_parts_is_compared_with_the_merged_one(kind, prefix, swapped, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(PARTS[kind](torch.nn.Linear(n, 12)) for n in (12, 12, 12)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        model.eval()(torch.zeros(1, 12))
    file = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    words = ("weight", "bias")
    merged = {f"{prefix}{i}.{word}": getattr(model[i], word).detach().contiguous() for i in range(3) for word in words}
    both = (merged, file) if swapped else (file, merged)
    report = compare(tmp_path, *both)
    assert "equal-up-to-rounding" in codes(report)
    assert not report.layers
    merged[f"{prefix}1.weight"] = merged[f"{prefix}1.weight"] + normal(12, 1) @ normal(1, 12, seed=1)
    (layer,) = compare(tmp_path, *both).layers
    assert layer.numerical_rank == 1
    wanted = float((normal(12, 1) @ normal(1, 12, seed=1)).norm())
    assert layer.frobenius_norm == pytest.approx(wanted, rel=1e-4)


def adapter(folder, seed, scale=1.0):
    """A LoRA of rank 2, whose factors `scale` moves from one to the other."""
    folder.mkdir()
    name = "base_model.model.layers.0.proj.lora_{}.weight"
    factors = {name.format("A"): normal(2, 12) * scale, name.format("B"): normal(12, 2, seed=seed) / scale}
    save_tensors(folder / "adapter_model.safetensors", factors)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    return folder


def test_an_adapter_is_compared_with_another_by_products_and_not_with_its_base(tmp_path):
    one, two, base = adapter(tmp_path / "one", 1), adapter(tmp_path / "two", 2), tmp_path / "base.safetensors"
    save_tensors(base, {"layers.0.proj.weight": normal(12, 12)})
    for files in ((one, base), (base, one)):
        with pytest.raises(CheckpointError, match="products are the difference from its base: run gramian inspect"):
            compare_checkpoints(*files)
    report = compare_checkpoints(one, two)
    (layer,) = report.layers
    assert layer.frobenius_norm == pytest.approx(
        float(((normal(12, 2, seed=1) - normal(12, 2, seed=2)) @ normal(2, 12)).norm())
    )
    assert not report.findings  # a low rank is by design, and the factors are no vectors
    same = compare_checkpoints(one, adapter(tmp_path / "three", 1, scale=4.0))
    assert codes(same) == {"equal-in-common"}
    assert "2 parts of equal weights that differ" in same.findings[0].evidence


@pytest.mark.parametrize("where", ["only in one", "new rows", "another shape"])
def test_what_is_not_compared_is_searched_for_nan(tmp_path, where):
    old = {"embed_tokens.weight": normal(20, 6), "layers.0.w.weight": normal(6, 6, seed=1)}
    new = dict(old)
    if where == "new rows":
        new["embed_tokens.weight"] = torch.cat((old["embed_tokens.weight"], torch.full((2, 6), float("nan"))))
    else:
        new["layers.0.w.bias"] = torch.tensor([1.0, float("inf")])
    if where == "another shape":
        old["layers.0.w.bias"] = torch.ones(3)
    (finding,) = compare(tmp_path, new, old).findings
    assert finding.code == "non-finite-difference"
    assert finding.where == ("embed_tokens.weight[20:22]" if where == "new rows" else "layers.0.w.bias")


def test_a_new_head_of_another_size_is_not_compared_row_by_row(tmp_path):
    old = {"layers.0.w.weight": normal(16, 16), "score.weight": normal(5, 16, seed=1)}
    new = {"layers.0.w.weight": old["layers.0.w.weight"] + 1, "score.weight": normal(3, 16, seed=2)}
    report = compare(tmp_path, new, old)
    assert codes(report) == {"low-rank-update"}
    assert {layer.name: layer.kind for layer in report.layers}["score.weight"] == "shape"
    assert any("(3, 16) and (5, 16), whose first rows have nothing in common" in note for note in report.notes)


def test_a_head_that_the_other_ties_is_said(tmp_path):
    table = normal(20, 6)
    for name, more in (("untied", {"lm_head.weight": table.clone()}), ("tied", {})):
        (tmp_path / name).mkdir()
        state = {"embed_tokens.weight": table, "layers.0.w.weight": normal(6, 6, seed=1), **more}
        save_tensors(tmp_path / name / "model.safetensors", state)
    (tmp_path / "tied" / "config.json").write_text('{"tie_word_embeddings": true}')
    (layer,) = compare_checkpoints(tmp_path / "untied", tmp_path / "tied").layers
    assert "equal to embed_tokens.weight, to which" in layer.note


def test_int8_is_compared_as_the_weight_that_its_scales_make(tmp_path):
    w = normal(16, 16)
    scale = w.abs().amax(1)
    whole = (w / scale[:, None] * 127).round().to(torch.int8)
    (layer,) = compare(tmp_path, {"a.weight": whole, "a.SCB": scale}, {"a.weight": w}).layers
    wanted = (whole * scale[:, None].double() / 127 - w).norm() / w.norm()
    assert layer.relative_change == pytest.approx(float(wanted), rel=1e-4)
    assert "dequantized from int8" in layer.note
    bare = compare(tmp_path, {"a.weight": whole}, {"a.weight": w})
    assert "Dequantize them first" in bare.findings[0].cause
    assert bare.layers[0].relative_change is None


def test_the_state_of_a_wrapped_model_is_compared_with_its_base(tmp_path):
    """PEFT's own names, without the adapter_config.json that says how factors are scaled."""
    start, base = (
        "base_model.model.layers.0.proj",
        {"layers.0.proj.weight": normal(12, 12), "head.weight": normal(4, 12)},
    )
    state = {
        f"{start}.base_layer.weight": base["layers.0.proj.weight"],
        f"{start}.lora_A.default.weight": normal(2, 12),
        f"{start}.lora_B.default.weight": normal(12, 2),
        "base_model.model.head.original_module.weight": base["head.weight"],
        "base_model.model.head.modules_to_save.default.weight": base["head.weight"] + normal(4, 12, seed=1),
    }
    report = compare(tmp_path, state, base)
    rows = {layer.name.rpartition("proj.")[-1]: layer.kind for layer in report.layers}
    assert {name for name, kind in rows.items() if kind == "unmatched"} == {
        "lora_A.default.weight", "lora_B.default.weight", "base_model.model.head.original_module.weight",
    }  # fmt: skip
    assert report.facts["tensors that are equal"] == 1
    assert report.facts["matrices that differ"] == 1
    with pytest.raises(CheckpointError, match="Or merge it first"):
        extract_lora(tmp_path / "new.safetensors", tmp_path / "old.safetensors", 1, tmp_path / "x")


def test_models_of_two_sizes_are_refused(tmp_path):
    one, two = ({"a.weight": normal(n, n), "norm.weight": torch.ones(n)} for n in (6, 8))
    with pytest.raises(CheckpointError, match="every tensor that both have is of another shape"):
        compare(tmp_path, one, two)
    one, two = ({"lm_head.weight": normal(n, 4), "lm_head.bias": torch.ones(n)} for n in (6, 8))
    assert (
        compare(tmp_path, one, two | {"lm_head.weight": torch.cat((one["lm_head.weight"], normal(2, 4)))}).facts[
            "rows that only one has, not compared"
        ]
        == 4
    )


@pytest.mark.filterwarnings("ignore")
def test_equal_weights_in_other_parts_are_not_called_equal_files(tmp_path):
    """A pruned model and its merged form; the old and the new form of weight norm."""
    w, mask = normal(6, 6), (normal(6, 6) > 0).float()
    v, g = normal(6, 6), normal(6, 1)
    start = "a.parametrizations.weight.original"
    for one, two in (
        ({"a.weight_orig": w, "a.weight_mask": mask}, {"a.weight": w * mask}),
        ({f"{start}0": g, f"{start}1": v}, {"a.weight_g": g, "a.weight_v": v}),
    ):
        (finding,) = compare(tmp_path, one, two).findings
        assert finding.code == "equal-in-common"
        assert "1 weight that the two store in other parts" in finding.evidence
        assert codes(compare(tmp_path, one, one)) == {"no-difference"}
