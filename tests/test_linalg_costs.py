"""The costs by which methods are chosen are measured where they decide, once for each machine, and replayed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import gramian.linalg as gl
from cases import seeded
from gramian import random
from gramian.linalg.engine import cost, measuring, thin
from gramian.linalg.engine.function import FUNCTIONS
from gramian.linalg.polar_factor.direction import cheapest

ROWS = ({"eigh32": 1, "float32": 2}, {"eigh64": 1, "float32": 2})
NAMES = {"float32", "eigh32", "eigh64"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, in a process that measures, in no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measuring, "SHORT", 0.0)
    token = cost._FIXED.set(False)
    cost.forget()
    yield tmp_path / "gramian" / "linalg.json"
    cost._FIXED.reset(token)
    cost.forget()


@pytest.fixture
def timed(monkeypatch):
    """Each operation takes as many seconds as its name is long; the list of those that were measured."""
    asked = []

    def measure(names):
        asked.extend(names)
        return {name: (1e-6 * len(name), 1e-4 * len(name), 1e-2 * len(name)) for name in names}

    monkeypatch.setattr(measuring, "measure", measure)
    return asked


def test_what_decides_is_measured_once_and_kept(cache, timed):
    found = cost.constants("cpu", ROWS, 512)
    assert set(timed) == NAMES
    assert found.source == "measured"
    assert found.factors["eigh64"] == pytest.approx((6 / 7,) * 3)
    assert found.factors["svd64"] == cost.DEFAULTS["cpu"].factors["svd64"]
    cost.forget()  # as another process
    assert cost.constants("cpu", ROWS, 512) == found
    cost.constants("cpu", (*ROWS, {"svd64": 1}), 512)
    assert timed == [*sorted(NAMES), "svd64"]
    (kept,) = json.loads(cache.read_text())["machines"].values()
    assert set(kept) == {*NAMES, "svd64"}
    assert [p.name for p in cache.parent.iterdir()] == [cache.name]


def test_little_work_a_gpu_and_fixed_costs_measure_nothing(cache, timed):
    assert cost.constants("cpu", ROWS, 20).source == "default"
    assert cost.constants("cuda", ROWS, 4096) == cost.DEFAULTS["cuda"]
    with cost.fixed():
        assert cost.constants("cpu", ROWS, 4096) == cost.defaults("cpu")
    gl.inv_root(torch.eye(6), 2)
    assert not timed
    assert not cache.exists()


def test_a_cache_of_another_machine_or_torch_is_measured_again(cache, timed, monkeypatch):
    cost.constants("cpu", ROWS, 512)
    for other in ("another processor", "three threads"):
        monkeypatch.setattr(cost, "machine", lambda kind, other=other: other)
        timed.clear()
        cost.constants("cpu", ROWS, 512)
        assert set(timed) == NAMES
    assert len(json.loads(cache.read_text())["machines"]) == 3
    assert torch.__version__ in next(iter(json.loads(cache.read_text())["machines"]))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"cpu": 3}', '{"format": 1, "machines": {}}', '{"format": 2, "machines": {"x": {"eigh32": 1}}}'],
)
def test_a_broken_or_old_cache_is_measured_again(cache, timed, text):
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    cost.constants("cpu", ROWS, 512)
    assert set(timed) == NAMES
    assert json.loads(cache.read_text())["format"] == cost.FORMAT


def test_a_folder_that_cannot_be_written_does_no_harm(cache, timed):
    cache.parent.write_text("a file where the folder would be")
    assert cost.constants("cpu", ROWS, 512).source == "measured"
    cost.constants("cpu", ROWS, 512)
    assert len(timed) == 3


def test_measured_costs_choose_the_method(cache, monkeypatch):
    m = torch.eye(64) + torch.ones(64, 64) / 64
    for slow, first in (("eigh32", "eigh64"), ("eigh64", "eigh32")):
        seconds = {name: (9e3 if name == slow else 1.0,) * 3 for name in cost.DEFAULTS["cpu"].factors}
        monkeypatch.setattr(measuring, "measure", lambda names, seconds=seconds: {n: seconds[n] for n in names})
        monkeypatch.setattr(cost, "WORTH", 0.0)
        monkeypatch.setattr(cost, "machine", lambda kind, slow=slow: slow)
        assert gl.inv_root_ex(m, 2)[1].method_names == [first]


def test_every_operation_is_measured_in_milliseconds_and_draws_nothing(cache):
    state = torch.get_rng_state()
    used = {name for f in FUNCTIONS.values() for row in f.methods.values() for name in row.operations(64, 64)}
    found = measuring.measure(sorted(used), sizes=(4, 8), seconds=0.0)
    assert all(len(times) == 3 and min(times) > 0 for times in found.values())
    assert used | {"bfloat16"} == set(cost.DEFAULTS["cpu"].factors)
    assert torch.equal(state, torch.get_rng_state())


def test_a_direction_depends_on_no_measurement(cache, timed):
    before = cheapest(1024, 1024, 8, 0.1, "cpu")
    cost.constants("cpu", ROWS, 512)
    cheapest.cache_clear()
    assert cheapest(1024, 1024, 8, 0.1, "cpu") == before


@pytest.mark.parametrize("turn", [False, True])
def test_thin_products_are_the_same_in_either_order(turn, monkeypatch):
    monkeypatch.setattr(thin, "turned", lambda device: turn)
    z = random.normal(2, 130, 16, generator=seeded(1), dtype=torch.float64)
    for a in (z.new_zeros(2, 130, 130).normal_(generator=seeded(2)), z.expand(2, 130, 16).mT):
        wanted = torch.einsum("bij,bjk->bik", a, z)
        assert torch.allclose(thin.times(a, z), wanted, atol=1e-12)
        assert torch.allclose(thin.times(a.mT.contiguous().mT, z), wanted, atol=1e-12)


def test_the_order_of_thin_products_is_timed_once_and_not_where_costs_are_fixed(cache, monkeypatch):
    asked = []
    monkeypatch.setattr(measuring, "_least", lambda *_: asked.append(0) or len(asked))
    measuring.turned.cache_clear()
    assert [thin.turned("cpu"), thin.turned("cpu"), thin.turned("cuda")] == [False] * 3
    assert len(asked) == 2
    for words, turn in (({"amx_bf16": True}, False), ({"avx512_bf16": True}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda words=words: words)
        with cost.fixed():
            assert thin.turned("cpu") is turn
    assert len(asked) == 2
    measuring.turned.cache_clear()


def test_calibration_measures_every_operation_at_every_size(cache, monkeypatch):
    from gramian.bench import calibration

    monkeypatch.setattr(calibration, "SIZES", (4, 8, 16))
    monkeypatch.setattr(calibration, "SECONDS", 0.0)
    path = calibration.keep_calibration()
    (kept,) = json.loads(path.read_text())["machines"].values()
    assert set(kept) == set(cost.DEFAULTS["cpu"].factors) - {"bfloat16"}


@pytest.mark.slow
def test_the_first_call_takes_little_more_than_the_second(tmp_path):
    code = """
import time, torch, gramian.linalg as gl
torch.set_num_threads(1)
torch.linalg.eigh(torch.eye(64)); torch.eye(300) @ torch.eye(300)
m = torch.eye(256) + torch.rand(256, 256, generator=torch.Generator().manual_seed(0)) / 512
m = m + m.T
times = []
for _ in range(2):
    start = time.process_time()
    gl.inv_root_ex(m, 4); gl.polar_ex(m); gl.svdvals_ex(m); gl.inv_ex(m); gl.sqrtm_ex(m)
    times.append(time.process_time() - start)
print(times[0] - times[1])
"""
    env = {"XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": "src", "PATH": ""}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert (tmp_path / "gramian" / "linalg.json").exists()
    assert float(out.stdout) < 0.9  # 0.3 s on an idle machine


def test_to_ask_where_the_constants_come_from_measures_nothing(cache, timed) -> None:
    assert cost.constants().source == "default"
    assert timed == []


@pytest.mark.parametrize("name", ["inv", "solve", "svdvals", "sqrtm", "polar"])
def test_a_large_batch_of_small_matrices_does_not_begin_with_the_last_resort(name):
    """Products of many small matrices were taken for those of one large one, and double-double ones for nothing."""
    from gramian.linalg.engine.escalation import ladder

    methods = FUNCTIONS[name].methods
    with cost.fixed():
        assert ladder(methods, (10_000, 4, 4), 1e-4, "cpu")[0] != list(methods)[-1]
