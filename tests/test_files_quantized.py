"""A quantized weight is inspected as the numbers that it stands for: each scheme against the naive way, by entries."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import gramian as gm
from gramian.checkpoint import open_checkpoint
from gramian.inspection.weights.matrices import find_holdings

Case = tuple[dict[str, Tensor], dict, Tensor]  # the tensors of the file, its config, and the weight that they stand for

FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of a group of eight in each four bits, lowest first


def draw(*shape: int, low: int = 0, high: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def scales(*shape: int, seed: int = 1) -> Tensor:
    """Powers of two, so that the reference and the library round alike: not at all."""
    return 2.0 ** draw(*shape, low=-6, high=3, seed=seed).double()


def pack(numbers: list[int], bits: int) -> int:
    """Integers in a 32-bit word, the first in the lowest bits, as a signed integer."""
    word = sum(int(number) << (bits * k) for k, number in enumerate(numbers))
    return word - 2**32 if word >= 2**31 else word


def gptq(bits: int, act_order: bool, v2: bool) -> Case:
    rows, columns, group = 16, 64, 16
    q, s = draw(columns, rows, high=2**bits), scales(columns // group, rows)
    z = draw(columns // group, rows, low=1, high=2**bits, seed=2)
    index = torch.arange(columns) // group
    if act_order:
        index = index[torch.randperm(columns, generator=torch.Generator().manual_seed(3))]
    a, b, c, group_of = q.tolist(), z.tolist(), s.tolist(), index.tolist()
    w = torch.tensor([[(a[i][o] - b[group_of[i]][o]) * c[group_of[i]][o] for i in range(columns)] for o in range(rows)])
    per = 32 // bits
    stored = z if v2 else z - 1
    file = {
        "a.qweight": torch.tensor(
            [[pack(q[i : i + per, o].tolist(), bits) for o in range(rows)] for i in range(0, columns, per)],
            dtype=torch.int32,
        ),
        "a.qzeros": torch.tensor(
            [[pack(stored[g, o : o + per].tolist(), bits) for o in range(0, rows, per)] for g in range(len(z))],
            dtype=torch.int32,
        ),
        "a.scales": s.half(),
        "a.g_idx": index.int(),
    }
    config = {"bits": bits, "checkpoint_format": "gptq_v2" if v2 else "gptq"}
    return file, {"quantization_config": config}, w


def awq() -> Case:
    rows, columns, group = 16, 32, 8
    q, z, s = draw(columns, rows), draw(columns // group, rows, seed=2), scales(columns // group, rows)
    a, b, c = q.tolist(), z.tolist(), s.tolist()
    w = torch.tensor([[(a[i][o] - b[i // group][o]) * c[i // group][o] for i in range(columns)] for o in range(rows)])

    def packed(rows_of: Tensor) -> Tensor:
        return torch.tensor(
            [[pack([row[8 * k + AWQ[j]] for j in range(8)], 4) for k in range(rows // 8)] for row in rows_of.tolist()],
            dtype=torch.int32,
        )

    return {"a.qweight": packed(q), "a.qzeros": packed(z), "a.scales": s.half()}, {}, w


def bitsandbytes(kind: str, nested: bool) -> Case:
    shape, block = (12, 32), 64
    count = math.prod(shape)
    code = torch.linspace(-1, 1, 16) if kind == "nf4" else torch.tensor(FP4 + [-x for x in FP4]) / 6
    q, number = draw(count).tolist(), count // block
    file: dict[str, Tensor] = {}
    state: dict = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(shape)}
    if nested:
        inner, scale = torch.linspace(-1, 1, 256), scales(math.ceil(number / 4)).float()
        small = draw(number, high=256, seed=4)
        absmax = [float(inner[int(small[k])] * scale[k // 4]) + 0.5 for k in range(number)]
        file |= {"absmax": small.to(torch.uint8), "nested_absmax": scale, "nested_quant_map": inner}
        state |= {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": 0.5}
    else:
        absmax = scales(number).tolist()
        file["absmax"] = torch.tensor(absmax)
    w = torch.tensor([float(code[q[k]]) for k in range(count)]) * torch.tensor(
        [absmax[k // block] for k in range(count)]
    )
    bytes_ = torch.tensor([(q[k] << 4) | q[k + 1] for k in range(0, count, 2)], dtype=torch.uint8)
    file |= {
        "quant_map": code,
        f"quant_state.bitsandbytes__{kind}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    return {"a.weight": bytes_[:, None], **{f"a.weight.{name}": t for name, t in file.items()}}, {}, w.reshape(shape)


def llm_int8() -> Case:
    q, s = draw(8, 12, low=-127, high=128), scales(8).float()
    w = torch.tensor([[float(q[o, i]) * float(s[o] / 127) for i in range(12)] for o in range(8)])
    return {"a.weight": q.to(torch.int8), "a.SCB": s}, {}, w


def scaled(
    dtype: torch.dtype, shape: tuple[int, ...], name: str, block: tuple[int, int], config: dict | None = None
) -> Case:
    rows, columns = 200, 160
    q = draw(rows, columns, low=-8, high=9).to(dtype)
    s = scales(*shape).float()
    full = s.reshape(*shape, *(1,) * (2 - len(shape)))
    numbers, factors = q.float().tolist(), full.tolist()
    w = [
        [
            numbers[o][i] * factors[min(o // block[0], len(factors) - 1)][min(i // block[1], len(factors[0]) - 1)]
            for i in range(columns)
        ]
        for o in range(rows)
    ]
    return {"a.weight": q, f"a.{name}": s}, config or {}, torch.tensor(w)


def zero_points() -> Case:
    q, s, z = draw(6, 8, high=256), scales(6, 1).float(), draw(6, 1, high=256, seed=5)
    w = torch.tensor([[(int(q[o, i]) - int(z[o])) * float(s[o]) for i in range(8)] for o in range(6)])
    return {"a.weight": q.to(torch.uint8), "a.weight_scale": s, "a.weight_zero_point": z.to(torch.uint8)}, {}, w


def four_bit_floats(q: Tensor) -> Tensor:
    """The values of codes of e2m1: a sign, two bits of exponent, one of mantissa."""
    return torch.tensor([(-1.0 if c & 8 else 1.0) * FP4[c & 7] for c in q.flatten().tolist()]).reshape(q.shape)


def halves(q: Tensor) -> Tensor:
    """Codes in bytes, the first in the low half."""
    return (q[..., 0::2] | (q[..., 1::2] << 4)).to(torch.uint8)


def mxfp4() -> Case:
    experts, rows, groups = 2, 6, 3
    q, s = draw(experts, rows, groups, 32), draw(experts, rows, groups, low=120, high=130, seed=6)
    w = four_bit_floats(q) * torch.exp2(s.double() - 127).float()[..., None]
    file = {"mlp.experts.gate_up_proj_blocks": halves(q), "mlp.experts.gate_up_proj_scales": s.to(torch.uint8)}
    return file, {"model_type": "gpt_oss"}, w.reshape(experts, rows, groups * 32).mT


def nvfp4(divides: bool) -> Case:
    q, s = draw(4, 32), scales(4, 2).to(torch.float8_e4m3fn)
    whole = torch.tensor([0.25])
    w = four_bit_floats(q) * s.float().repeat_interleave(16, 1) * (4.0 if divides else 0.25)
    if divides:
        return {"a.weight_packed": halves(q), "a.weight_scale": s, "a.weight_global_scale": whole}, {}, w
    return {"a.weight": halves(q), "a.weight_scale": s, "a.weight_scale_2": whole}, {}, w


def compressed() -> Case:
    rows, columns, group = 6, 32, 8
    q, s = draw(rows, columns), scales(rows, columns // group)
    w = torch.tensor([[(int(q[o, i]) - 8) * float(s[o, i // group]) for i in range(columns)] for o in range(rows)])
    words = [[pack(q[o, i : i + 8].tolist(), 4) for i in range(0, columns, 8)] for o in range(rows)]
    file = {"a.weight_packed": torch.tensor(words, dtype=torch.int32), "a.weight_scale": s.bfloat16()}
    return file | {"a.weight_shape": torch.tensor([rows, columns])}, {}, w


E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
CASES: dict[str, tuple[Callable[[], Case], str]] = {
    "gptq 4": (lambda: gptq(4, False, False), "int4 (GPTQ)"),
    "gptq 8": (lambda: gptq(8, False, False), "int8 (GPTQ)"),
    "gptq 2": (lambda: gptq(2, False, False), "int2 (GPTQ)"),
    "gptq act order": (lambda: gptq(4, True, False), "int4 (GPTQ)"),
    "gptq v2": (lambda: gptq(4, False, True), "int4 (GPTQ)"),
    "awq": (awq, "int4 (AWQ)"),
    "nf4": (lambda: bitsandbytes("nf4", False), "nf4 (bitsandbytes)"),
    "fp4": (lambda: bitsandbytes("fp4", False), "fp4 (bitsandbytes)"),
    "nf4 nested": (lambda: bitsandbytes("nf4", True), "nf4 (bitsandbytes)"),
    "llm.int8": (llm_int8, "int8 (bitsandbytes LLM.int8)"),
    "fp8 tensor": (lambda: scaled(E4, (1,), "weight_scale", (200, 160)), "float8_e4m3fn (a scale per tensor)"),
    "fp8 scalar": (lambda: scaled(E5, (), "scale_weight", (200, 160)), "float8_e5m2 (a scale per tensor)"),
    "fp8 row": (lambda: scaled(E4, (200, 1), "weight_scale", (1, 160)), "float8_e4m3fn (a scale per row)"),
    "fp8 rows": (lambda: scaled(E4, (200,), "weight_scale", (1, 160)), "float8_e4m3fn (a scale per row)"),
    "fp8 deepseek": (lambda: scaled(E4, (2, 2), "weight_scale_inv", (128, 128)), "a scale per block"),
    "fp8 blocks of 64": (
        lambda: scaled(
            E4, (4, 3), "weight_scale_inv", (64, 64), {"quantization_config": {"weight_block_size": [64, 64]}}
        ),
        "a scale per block",
    ),
    "int8 row": (lambda: scaled(torch.int8, (200, 1), "weight_scale", (1, 160)), "int8 (a scale per row)"),
    "int8 groups": (lambda: scaled(torch.int8, (200, 10), "weight_scale", (1, 16)), "int8 (a scale per block)"),
    "uint8 zero points": (zero_points, "uint8 (a scale per row)"),
    "mxfp4": (mxfp4, "MXFP4"),
    "nvfp4": (lambda: nvfp4(False), "NVFP4"),
    "nvfp4 packed": (lambda: nvfp4(True), "NVFP4"),
    "compressed-tensors": (compressed, "int4 (compressed-tensors)"),
}  # fmt: skip


def write(folder: Path, case: Case) -> Path:
    save_file({name: t.contiguous() for name, t in case[0].items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(case[1]))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_each_scheme_gives_the_numbers_that_it_stands_for(tmp_path: Path, name: str) -> None:
    make, words = CASES[name]
    case = make()
    checkpoint = open_checkpoint(write(tmp_path, case))
    (entry,) = (entry for entry in checkpoint.entries.values() if entry.made)
    assert entry.shape == tuple(case[2].shape)
    got = checkpoint.load(entry.name)
    assert got.dtype == torch.float32
    assert torch.equal(got, case[2])
    report = gm.inspect(tmp_path)
    assert report.layers
    assert all(layer.name.startswith(entry.name) for layer in report.layers)
    assert all("dequantized from" in layer.note and words in layer.note for layer in report.layers)
    held = [holding.entry.name for holding in find_holdings(checkpoint)[0]]
    assert held == [entry.name]  # no scale, zero point or table is taken for a weight
    others = sum(math.prod(t.shape) for key, t in case[0].items() if key not in checkpoint.entries)
    assert others == 0 or entry.name not in case[0]
    assert report.facts["parameters"] == math.prod(entry.shape)


def test_a_block_as_large_as_a_row_is_not_called_a_row(tmp_path: Path) -> None:
    q = draw(256, 16384, low=-8, high=9).to(torch.float8_e4m3fn)
    path = write(tmp_path, ({"a.weight": q, "a.weight_scale_inv": scales(2, 128).float()}, {}, q.float()))
    made = open_checkpoint(path).entries["a.weight"].made
    assert made is not None
    assert made.how == "dequantized from float8_e4m3fn (a scale per block)"


def test_a_quantized_weight_compares_with_the_one_that_it_came_from(tmp_path: Path) -> None:
    for folder in ("quantized", "base"):
        (tmp_path / folder).mkdir()
    case = CASES["gptq 4"][0]()
    write(tmp_path / "quantized", case)
    write(tmp_path / "base", ({"a.weight": case[2]}, {}, case[2]))
    quantized, base = open_checkpoint(tmp_path / "quantized"), open_checkpoint(tmp_path / "base")
    assert torch.equal(quantized.load("a.weight"), base.load("a.weight"))


UNKNOWN = {
    "three bits": {
        "a.qweight": torch.zeros(6, 32, dtype=torch.int32),
        "a.qzeros": torch.zeros(4, 3, dtype=torch.int32),
        "a.scales": torch.ones(4, 32),
    },
    "half-quadratic": {
        "a.W_q": torch.zeros(8, 8, dtype=torch.uint8),
        "a.scale": torch.ones(8, 8),
        "a.zero": torch.ones(8, 8),
    },
    "codebooks": {"a.codes": torch.zeros(8, 4, 2, dtype=torch.int8), "a.codebooks": torch.ones(2, 256, 1, 8)},
    "no scale": {"a.weight": torch.zeros(8, 8, dtype=torch.int8)},
    "scales of another shape": {"a.weight": torch.zeros(8, 8, dtype=torch.int8), "a.weight_scale": torch.ones(3, 5)},
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_scheme_is_left_out_by_name(tmp_path: Path, name: str) -> None:
    save_file(UNKNOWN[name] | {"b.weight": torch.eye(4)}, tmp_path / "m.safetensors")
    report = gm.inspect(tmp_path / "m.safetensors")
    assert [layer.name for layer in report.layers] == ["b.weight"]
    said = " ".join(report.notes)
    assert all(key in said for key in UNKNOWN[name])
    assert "quantized" in said or "unknown" in said


BROKEN = {
    "state": ("nf4", "a.weight.quant_state.bitsandbytes__nf4", torch.tensor(list(b'{"shape": [4'), dtype=torch.uint8)),
    "state of another shape": (
        "nf4",
        "a.weight.quant_state.bitsandbytes__nf4",
        torch.tensor(list(b'{"shape": [400, 400], "blocksize": 64, "quant_type": "nf4"}'), dtype=torch.uint8),
    ),
    "shape": ("compressed-tensors", "a.weight_shape", torch.tensor([600, 32])),
}


@pytest.mark.parametrize("name", BROKEN)
def test_parts_that_do_not_fit_are_named(tmp_path: Path, name: str) -> None:
    case, key, tensor = BROKEN[name]
    file, config, w = CASES[case][0]()
    report = gm.inspect(write(tmp_path, (file | {key: tensor, "b.weight": torch.eye(4)}, config, w)))
    assert [layer.name for layer in report.layers] == ["b.weight"]
    assert "not dequantized" in " ".join(report.notes)


def test_nan_in_a_scale_is_found(tmp_path: Path) -> None:
    file, config, w = CASES["fp8 row"][0]()
    file["a.weight_scale"][3] = torch.nan
    report = gm.inspect(write(tmp_path, (file, config, w)))
    finding = next(f for f in report.findings if f.code == "non-finite-weights")
    assert "a.weight" in finding.where
    assert "a.weight_scale" in finding.where


def test_memory_is_one_weight_at_a_time(tmp_path: Path) -> None:
    """Of a file of many weights only one is dequantized when it is loaded."""
    file = {}
    for k in range(3):
        file |= {key.replace("a.", f"{k}."): t for key, t in CASES["awq"][0]()[0].items()}
    checkpoint = open_checkpoint(write(tmp_path, (file, {}, torch.zeros(0))))
    calls: list[str] = []
    for entry in checkpoint.entries.values():
        if entry.made:
            compute = entry.made.compute
            object.__setattr__(
                entry.made, "compute", lambda parts, c=compute, n=entry.name: calls.append(n) or c(parts)
            )
    checkpoint.load("1.weight")
    assert calls == ["1.weight"]
