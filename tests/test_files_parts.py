"""Weights that a file holds in parts are put together, and what is no weight is left out by name, with the reason."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import gramian as gm
from gramian.checkpoint import open_checkpoint
from gramian.inspection.weights.auxiliary import is_mask, is_table_of_waves
from gramian.inspection.weights.matrices import find_holdings
from gramian.inspection.weights.of_model import applied
from gramian.layers.listed import look_up_listed
from gramian.report.terminal import to_text


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def put(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder / "model.safetensors"


# ---- weight norm and spectral norm ---------------------------------------------------------------------------------

LAYERS = {
    "linear": lambda: nn.Linear(6, 4),
    "conv": lambda: nn.Conv2d(3, 5, 3),
    "transposed": lambda: nn.ConvTranspose1d(3, 5, 2),
}
NORMS = {
    "weight norm": lambda m: torch.nn.utils.parametrizations.weight_norm(m),
    "weight norm, dim 1": lambda m: torch.nn.utils.parametrizations.weight_norm(m, dim=1),
    "weight norm of the whole": lambda m: torch.nn.utils.parametrizations.weight_norm(m, dim=None),
    "old weight norm": lambda m: torch.nn.utils.weight_norm(m),
    "spectral norm": lambda m: torch.nn.utils.parametrizations.spectral_norm(m),
    "old spectral norm": lambda m: torch.nn.utils.spectral_norm(m),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("norm", NORMS)
def test_the_weight_that_is_applied_is_inspected(tmp_path: Path, norm: str, layer: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(NORMS[norm](LAYERS[layer]()))
        with torch.no_grad():
            for p in model.parameters():  # so that g is not ‖v‖
                p.mul_(1 + torch.rand_like(p))
    inputs = {"linear": (2, 6), "conv": (2, 3, 5, 5), "transposed": (2, 3, 7)}[layer]
    model.eval()(torch.zeros(inputs))  # the older ones set the weight in a forward pass
    wanted = model[0].weight.detach().clone()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    path = put(tmp_path, model.state_dict())
    checkpoint = open_checkpoint(path)
    (entry,) = (entry for entry in checkpoint.entries.values() if entry.made)
    assert entry.weight == "0.weight"
    torch.testing.assert_close(checkpoint.load(entry.name), wanted)
    (block,) = gm.blocks(model).blocks
    torch.testing.assert_close(applied(block)[0], wanted)
    model.train()
    ours, theirs = gm.inspect(model), gm.inspect(path)
    assert model.training
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert [row.name for row in ours.layers] == [row.name for row in theirs.layers] == [entry.name]
    if layer != "transposed" or "bias" in model.state_dict():
        assert theirs.layers[0].frobenius_norm == pytest.approx(float(wanted.norm()), rel=1e-5)
        assert ours.layers[0].frobenius_norm == pytest.approx(float(wanted.norm()), rel=1e-5)
    assert "norm" in theirs.layers[0].note
    assert "makes of it" in ours.layers[0].note


def test_parameters_that_are_called_like_parts_are_weights(tmp_path: Path) -> None:
    names = ("w_q", "w_k", "w_v", "w_g")
    path = put(tmp_path, {f"a.{name}": normal(8, 8, seed=k) for k, name in enumerate(names)})
    assert len(gm.inspect(path).layers) == 4


@pytest.mark.parametrize("shape", [(6, 6), (4, 7), (7, 4), (2, 4, 6)])
def test_an_orthogonal_parametrization_is_inspected_as_the_matrix_that_it_makes(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(shape[-1], shape[-2])
        model.weight = nn.Parameter(normal(*shape))
        model = torch.nn.utils.parametrizations.orthogonal(model)
        with torch.no_grad():
            model.parametrizations.weight.original += 0.3 * normal(*shape, seed=1).tril(-1)
    path = put(tmp_path, model.state_dict())
    (entry,) = (entry for entry in open_checkpoint(path).entries.values() if entry.made)
    assert entry.weight == "weight"
    torch.testing.assert_close(open_checkpoint(path).load(entry.name), model.weight.detach())
    if len(shape) == 2:
        (layer,) = gm.inspect(path).layers
        assert layer.condition == pytest.approx(1.0, rel=1e-5)
        assert "orthogonal" in layer.note


def test_a_base_that_is_not_orthogonal_is_another_parametrization(tmp_path: Path) -> None:
    parts = {"parametrizations.weight.original": normal(8, 8), "parametrizations.weight.0.base": normal(8, 8, seed=1)}
    assert not any(entry.made for entry in open_checkpoint(put(tmp_path, parts)).entries.values())


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, x))


@pytest.mark.parametrize("width", [40, 80, 140])
def test_what_is_not_the_applied_weight_is_said_at_any_width(tmp_path: Path, width: int) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", Symmetric())
    found = gm.inspect(put(tmp_path, model.state_dict()))
    assert "not the weight that is applied" in " ".join(to_text(found, width).split())
    model = nn.Sequential(nn.Linear(4, 4))
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", Doubled(), unsafe=True)
    assert "not as applied" in " ".join(to_text(gm.inspect(model), width).split())


# ---- pruning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_the_pruned_weight_is_inspected_in_memory_and_in_the_file(tmp_path: Path, layer: str) -> None:
    from torch.nn.utils import prune

    model = nn.Sequential(LAYERS[layer](), nn.Flatten())
    prune.random_unstructured(model[0], "weight", 0.5)
    prune.l1_unstructured(model[0], "weight", 0.2)  # two of them make a container
    with torch.no_grad():
        model[0].weight_orig += 1
    wanted = (model[0].weight_orig * model[0].weight_mask).detach()
    path = put(tmp_path, model.state_dict())
    checkpoint = open_checkpoint(path)
    (entry,) = (entry for entry in checkpoint.entries.values() if entry.made)
    assert entry.weight == "0.weight"
    torch.testing.assert_close(checkpoint.load(entry.name), wanted)
    (block,) = gm.blocks(model).blocks
    torch.testing.assert_close(applied(block)[0], wanted)
    for report in (gm.inspect(model), gm.inspect(path)):
        (row,) = report.layers
        assert row.frobenius_norm == pytest.approx(float(wanted.norm()), rel=1e-5)
        assert "prun" in row.note


# ---- adapters --------------------------------------------------------------------------------------------------------

FACTORS = {
    "base_model.model.l.q.lora_A.weight": normal(4, 12),
    "base_model.model.l.q.lora_B.weight": normal(8, 4, seed=1),
    "base_model.model.l.v.lora_A.weight": normal(2, 12, seed=2),
    "base_model.model.l.v.lora_B.weight": normal(8, 2, seed=3),
}
PLAIN = {"q": 16 / 4, "v": 16 / 2}
CONFIGS = {
    "alpha": ({"r": 4, "lora_alpha": 16, "rank_pattern": {"v": 2}}, PLAIN),
    "rank stabilized": ({"r": 4, "lora_alpha": 16, "use_rslora": True}, {"q": 16 / 2, "v": 16 / math.sqrt(2)}),
    "alpha pattern": ({"lora_alpha": 16, "alpha_pattern": {"l.v": 6}}, {"q": 4.0, "v": 3.0}),
    "expression": ({"lora_alpha": 16, "alpha_pattern": {r"^l\.[v]": 6, r".*\.v": 8}}, {"q": 4.0, "v": 4.0}),
    "groups of repetitions": ({"lora_alpha": 16, "alpha_pattern": {"(l+)+$": 1}}, PLAIN),
    "in out": ({"lora_alpha": 16, "fan_in_fan_out": True}, PLAIN),
    "none": (None, {"q": 1.0, "v": 1.0}),
    "broken": ({"lora_alpha": "x", "alpha_pattern": 3}, {"q": 1.0, "v": 1.0}),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_an_adapter_is_inspected_as_its_products(tmp_path: Path, case: str) -> None:
    config, factors = CONFIGS[case]
    save_file(FACTORS, tmp_path / "adapter_model.safetensors")
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path)
    for name, factor in factors.items():
        a, b = (FACTORS[f"base_model.model.l.{name}.lora_{word}.weight"] for word in "AB")
        wanted = factor * b @ a
        got = checkpoint.load(f"l.{name}.weight")
        torch.testing.assert_close(got.mT if case == "in out" else got, wanted)
    report = gm.inspect(tmp_path)
    assert [layer.name for layer in report.layers] == ["l.q.weight", "l.v.weight"]
    assert all("B A of a LoRA adapter" in layer.note for layer in report.layers)
    assert ("taken times 1" in report.layers[0].note) == (case in ("none", "broken"))


def test_an_embeddings_adapter_and_a_convolutions_and_kohyas(tmp_path: Path) -> None:
    file = {
        "base_model.model.e.lora_embedding_A": normal(2, 9),
        "base_model.model.e.lora_embedding_B": normal(5, 2, seed=1),
        "base_model.model.c.lora_A.weight": normal(2, 3, 3, 3, seed=2),
        "base_model.model.c.lora_B.weight": normal(6, 2, 1, 1, seed=3),
        "unet.k.lora_down.weight": normal(2, 7, seed=4),
        "unet.k.lora_up.weight": normal(5, 2, seed=5),
        "unet.k.alpha": torch.tensor(4.0),
    }
    save_file(file, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4}))
    checkpoint = open_checkpoint(tmp_path)
    a, b, c, d, e, f, _ = file.values()
    torch.testing.assert_close(checkpoint.load("e.weight"), 2 * (b @ a).mT)
    conv = torch.einsum("or,rihw->oihw", d.flatten(1), c)
    torch.testing.assert_close(checkpoint.load("c.weight"), 2 * conv)
    torch.testing.assert_close(checkpoint.load("unet.k.weight"), 2 * f @ e)


def test_a_linear_module_with_embedding_in_its_name_is_not_transposed(tmp_path: Path) -> None:
    a, b = normal(2, 9), normal(5, 2, seed=1)
    start = "base_model.model.encoder.embedding_hidden_mapping_in"
    save_file({f"{start}.lora_A.weight": a, f"{start}.lora_B.weight": b}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2}))
    got = open_checkpoint(tmp_path).load("encoder.embedding_hidden_mapping_in.weight")
    torch.testing.assert_close(got, b @ a)


@pytest.mark.parametrize("method", ["LoraConfig", "LoHaConfig", "LoKrConfig"])
def test_an_adapter_in_memory_and_in_its_file_is_no_trouble_before_training(tmp_path: Path, method: str) -> None:
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
        model = peft.get_peft_model(base, getattr(peft, method)(r=4, target_modules=["0", "2"]))
    model.save_pretrained(tmp_path)
    for report in (gm.inspect(model), gm.inspect(tmp_path)):
        assert "zero-weights" not in [finding.code for finding in report.findings]
        assert "has not been trained yet" in " ".join(report.notes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in ("lora_B", "hada", "lokr")):
                parameter.normal_()
    assert "trained" not in " ".join(gm.inspect(model).notes)


@pytest.mark.parametrize("stabilized", [False, True])
def test_the_product_is_what_peft_adds(tmp_path: Path, stabilized: bool) -> None:
    peft = pytest.importorskip("peft")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.v = nn.Linear(12, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.v(self.q(x))

    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q", "v"], rank_pattern={"v": 2}, alpha_pattern={"v": 5},
        use_rslora=stabilized, init_lora_weights=False,
    )  # fmt: skip
    model = peft.get_peft_model(Net(), config)
    model.save_pretrained(str(tmp_path))
    checkpoint = open_checkpoint(tmp_path)
    for name in ("q", "v"):
        layer = getattr(model.base_model.model, name)
        torch.testing.assert_close(checkpoint.load(f"{name}.weight"), layer.get_delta_weight("default"))


# ---- what is no weight ---------------------------------------------------------------------------------------------

BASE = {"a.weight": normal(8, 8), "a.bias": normal(8), "b.weight": normal(8, 8, seed=1)}
WAVES = torch.arange(16.0)[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)

# name: (tensors beside BASE, words of the reason)
OTHERS: dict[str, tuple[dict[str, Tensor], str]] = {
    "moments": ({"a.weight.exp_avg": normal(8, 8), "a.weight.exp_avg_sq": normal(8, 8) ** 2}, "an optimizer's state"),
    "moments of any word": ({"state.a.weight.rolling_mean": normal(8, 8)}, "an optimizer's state"),
    "optimizer": ({"optimizer.state.a.weight.exp_avg": normal(8, 8)}, "an optimizer's state"),
    "optimizer states": ({"optimizer_states.0.state.0.exp_avg": normal(8, 8)}, "an optimizer's state"),
    "optimizer of a part": ({"G.optimizer.m.x": normal(8, 8), "G.optimizer.m.y": normal(8)}, "an optimizer's state"),
    "ema": ({f"ema.{name}": t * 0.9 for name, t in BASE.items()}, "a running average"),
    "ema model": ({f"model_ema.{name.replace('.', '')}": t * 0.9 for name, t in BASE.items()}, "a running average"),
    "deep ema": ({f"x.ema_state_dict.{name}": t * 0.9 for name, t in BASE.items()}, "a running average"),
    "shadows": ({f"shadow_params.{k}": t * 0.9 for k, t in enumerate(BASE.values())}, "a running average"),
    "cached": ({"rotary_emb.cos_cached": WAVES.cos(), "rotary_emb.sin_cached": WAVES.sin()}, "sines and cosines"),
    "waves of any name": ({"pos.pe": torch.cat((WAVES.sin(), WAVES.cos()), 1)[None]}, "sines and cosines"),
    "half precision waves": ({"pe": torch.cat((WAVES.sin(), WAVES.cos()), 1).bfloat16()}, "sines and cosines"),
    "waves as an embedding": ({"embed_pos.weight": torch.cat((WAVES.sin(), WAVES.cos()), 1)}, "sines and cosines"),
    "inverse frequencies": ({"rotary_emb.inv_freq": 1 / (torch.arange(8) + 1.0)}, "sines and cosines"),
    "causal": ({"h.0.attn.bias": torch.ones(1, 1, 6, 6).tril(), "h.0.attn.masked_bias": torch.tensor(-1e4)}, "a mask"),
    "mask of any name": ({"a.window": torch.full((6, 6), -torch.inf).triu(1)}, "a mask"),
    "boolean": ({"causal": torch.ones(6, 6, dtype=torch.bool).tril()}, "bool"),
    "index": ({"relative_position_index": torch.arange(16).reshape(4, 4)}, "a mask"),
    "statistics": ({"n.running_mean": normal(8), "n.running_var": normal(8) ** 2}, "running statistics"),
    "cache": ({"attn.k_cache": torch.zeros(1, 8, 16)}, "a cache"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_it_is_left_out_by_name_and_not_diagnosed(tmp_path: Path, case: str) -> None:
    tensors, words = OTHERS[case]
    path = put(tmp_path, BASE | tensors)
    report = gm.inspect(path)
    assert {layer.name for layer in report.layers} == {"a.weight", "b.weight"}
    assert report.facts["parameters"] == 8 * 8 * 2 + 8
    (note,) = (note for note in report.notes if words in note)
    assert all(name in note for name in list(tensors)[:5])
    assert not report.findings


def test_a_file_of_a_running_average_alone_is_read(tmp_path: Path) -> None:
    path = put(tmp_path, {f"ema.{name}": t for name, t in BASE.items()})
    assert len(gm.inspect(path).layers) == 2
    torch.save({"ema_state_dict": BASE, "step": 3}, tmp_path / "m.pt")
    checkpoint = open_checkpoint(tmp_path / "m.pt")
    assert checkpoint.entries.keys() == BASE.keys()
    assert "a running average" in checkpoint.notes[0]
    torch.save({"ema": BASE, "net": BASE, "optimizer": {}}, tmp_path / "m.pt")
    assert "left out: ema (a running average), optimizer" in open_checkpoint(tmp_path / "m.pt").notes[0]


def test_weights_are_not_taken_for_masks_or_waves(tmp_path: Path) -> None:
    names = {
        "zero": torch.zeros(8, 8), "constant": torch.ones(8, 8), "identity": torch.eye(8), "random": normal(8, 8),
        "triangular": normal(8, 8).tril(), "bounded.weight": normal(64, 8).clamp(-1, 1),
        "embed": normal(8, 8).index_fill(0, torch.tensor(0), 0.0),
        "ternary": normal(8, 8).sign(), "two rows": torch.tensor([[1.0, 0.0], [1.0, 1.0]]),
    }  # fmt: skip
    assert not any(is_table_of_waves(t) or is_mask(t) for t in names.values())
    report = gm.inspect(put(tmp_path, {f"m.{name}": t for name, t in names.items()}))
    assert len(report.layers) == len(names)


# ---- numbers that are not finite -------------------------------------------------------------------------------------

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
)  # fmt: skip
HOLDERS = {
    "matrix": ("x.weight", (6, 4)),
    "vector": ("x.bias", (6,)),
    "scalar": ("x.scale", ()),
    "unknown": ("x.tensor", (2, 3, 4, 5, 6)),
    "average": ("ema.a.weight", (8, 8)),
    "moment": ("a.weight.exp_avg", (8, 8)),
    "statistics": ("n.running_var", (8,)),
}


@pytest.mark.parametrize("where", HOLDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_found_in_every_dtype_and_tensor(tmp_path: Path, dtype: torch.dtype, where: str) -> None:
    name, shape = HOLDERS[where]
    tensor = torch.ones(shape).to(dtype)
    flat = tensor.flatten().clone()
    code = {"float8_e8m0fnu": 0xFF, "float8_e4m3fnuz": 0x80, "float8_e5m2fnuz": 0x80}.get(str(dtype)[6:], 0x7F)
    if dtype.itemsize == 1:
        flat.view(torch.uint8)[-1] = code
    else:
        flat[-1] = torch.nan
    healthy = gm.inspect(put(tmp_path, BASE | {name: tensor}))
    assert not any(f.code == "non-finite-weights" for f in healthy.findings)
    report = gm.inspect(put(tmp_path, BASE | {name: flat.reshape(shape)}))
    (finding,) = (f for f in report.findings if f.code == "non-finite-weights")
    assert finding.where == name
    assert finding.title.startswith("1 ")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2], ids=str
)
def test_infinity_is_found(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.ones(6, 4)
    tensor[2, 3] = torch.inf
    report = gm.inspect(put(tmp_path, BASE | {"x.weight": tensor.to(dtype)}))
    assert any(f.code == "non-finite-weights" and f.where == "x.weight" for f in report.findings)


@pytest.mark.parametrize(("name", "bad"), [("m.mask", False), ("m.window", False), ("m.table", True), ("m.all", True)])
def test_a_masks_infinities_are_meant(tmp_path: Path, name: str, bad: bool) -> None:
    tensor = torch.zeros(4, 2, 3, 3).index_fill(3, torch.tensor(1), -torch.inf)
    tensor = {"m.table": tensor + 1, "m.all": torch.full((4, 2, 3, 3), -torch.inf)}.get(name, tensor)
    report = gm.inspect(put(tmp_path, BASE | {name: tensor}))
    assert any(f.code == "non-finite-weights" for f in report.findings) == bad


# ---- what a kernel assumes -------------------------------------------------------------------------------------------


def test_a_kernel_says_what_is_assumed_of_it(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3, bias=False))
    report = gm.inspect(put(tmp_path, model.state_dict()))
    assert all("groups 1 and not transposed, as assumed" in layer.note for layer in report.layers)
    assert all(layer.operator_norm for layer in report.layers)
    report = gm.inspect(save_with_metadata(tmp_path, model))
    assert not any("assumed" in layer.note for layer in report.layers)


def save_with_metadata(folder: Path, model: nn.Module) -> Path:
    save_file(dict(model.state_dict()), folder / "known.safetensors", metadata=gm.blocks(model).metadata())
    return folder / "known.safetensors"


def test_grouped_kernels_abstain(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 64, 3, groups=8), nn.Conv2d(64, 128, 3, groups=16),
        nn.Conv2d(128, 32, 1),
    )  # fmt: skip
    report = gm.inspect(put(tmp_path, model.state_dict()))
    assert {layer.name for layer in report.layers if layer.operator_norm is None} == {"2.weight", "3.weight"}
    assert all("probably grouped" in layer.note for layer in report.layers if layer.operator_norm is None)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_transposed_kernel_shows_in_its_bias(tmp_path: Path, dims: int, groups: int) -> None:
    cls = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    model = nn.Sequential(cls(4, 6, 3, groups=groups))
    of_file, of_model = gm.inspect(put(tmp_path, model.state_dict())), gm.inspect(model)
    assert [layer.shape for layer in of_file.layers] == [layer.shape for layer in of_model.layers]
    for ours, theirs in zip(of_model.layers, of_file.layers, strict=True):
        assert theirs.singular_values == pytest.approx(ours.singular_values)
        assert theirs.operator_norm is None
        assert "transposed" in theirs.note


# ---- rank and rounding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_no_rank(tmp_path: Path, dtype: torch.dtype) -> None:
    """Random matrices have full rank, whatever the dtype; products of thin factors have theirs."""
    full = {f"f{k}.weight": normal(96, 96, seed=k).to(dtype) for k in range(12)}
    full |= {"wide.weight": normal(256, 256, seed=50).to(dtype), "tall.weight": normal(300, 64, seed=51).to(dtype)}
    low = {"p.weight": (normal(96, 80, seed=60).double() @ normal(80, 96, seed=61).double()).to(dtype)}
    row = normal(96, 96, seed=62)
    row[5] = row[9]
    low |= {"r.weight": row.to(dtype)}
    report = gm.inspect(put(tmp_path, full | low))
    (finding,) = (f for f in report.findings if f.code == "rank-deficient")
    assert finding.where == "p.weight, r.weight"
    assert "rank 80 of 96" in finding.evidence


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_small_singular_values_without_a_gap_are_no_low_rank(tmp_path: Path, dtype: torch.dtype) -> None:
    """Rows and columns of very different sizes are rounded each on its own; a product of square matrices is full."""
    sizes = [normal(256, 1, seed=k).exp() for k in range(3)]
    w = [normal(256, 256, seed=10 + k) for k in range(6)]
    file = {
        "random.weight": w[0],
        "rows.weight": sizes[0].square() * w[1],
        "both.weight": sizes[1] * w[2] * sizes[2].mT,
        "product.weight": w[3] @ w[4] @ w[5] / 1000,
    }
    report = gm.inspect(put(tmp_path, {name: tensor.to(dtype) for name, tensor in file.items()}))
    assert "rank-deficient" not in [finding.code for finding in report.findings]


# ---- a file and a list of parameters --------------------------------------------------------------------------------

GRAY = {
    "first by depth": {"conv1.weight": (16, 1, 3, 3), "block.dw.weight": (16, 1, 3, 3), "fc.weight": (4, 16)},
    "first by name": {"stem.weight": (16, 1, 3, 3), "block.weight": (16, 1, 3, 3), "fc.weight": (4, 16)},
    "first by number": {"2.weight": (16, 1, 3, 3), "10.weight": (16, 1, 3, 3), "12.weight": (4, 16)},
}


@pytest.mark.parametrize("case", GRAY)
def test_which_kernel_is_depthwise_does_not_depend_on_order(tmp_path: Path, case: str) -> None:
    """A file sorts its names, a list has them in the order of the model: both find the same first kernel."""
    shapes = GRAY[case] | {f"{next(iter(GRAY[case]))[:-6]}bias": (16,)}
    first, second, head = list(GRAY[case])
    wanted = {first: "hidden", second: "elementwise", head: "head"}
    for order in (list(shapes), sorted(shapes), sorted(shapes, reverse=True)):
        found = look_up_listed({name: shapes[name] for name in order})
        assert [name for name, answer in found.items() if answer.role == "elementwise"] == [second]
    path = put(tmp_path, {name: normal(*shape) for name, shape in shapes.items()})
    holdings, _ = find_holdings(open_checkpoint(path))
    assert {h.entry.name: h.role for h in holdings} == wanted
    listed = look_up_listed(shapes)
    assert {name: answer.role for name, answer in listed.items() if answer.layout is not None} == wanted
