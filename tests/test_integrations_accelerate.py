"""accelerate: alone, on two ranks under DDP, and under FSDP2, which replaces the parameters; DeepSpeed is refused.

accelerate chooses FSDP2 on accelerators only. The test sets it on two gloo processes, where its own code then shards
the model and puts the shards into the optimizer's groups.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cases import seeded
from distributed import run_on_ranks
from gramian.errors import UnsupportedError
from gramian.integrations import health_metrics
from gramian.optim import OPTIMIZERS

pytest.importorskip("accelerate")

STEPS = 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed = nn.Embedding(8, 8)
            self.fc1, self.norm, self.fc2 = nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 8)
            self.lm_head = nn.Linear(8, 8, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.fc2(torch.tanh(self.norm(self.fc1(self.embed(tokens))))))


def batch(step: int, rank: int, num_ranks: int) -> tuple[Tensor, Tensor]:
    tokens, labels = (torch.randint(8, (8,), generator=seeded(10 * step + i)) for i in range(2))
    return tokens[rank::num_ranks], labels[rank::num_ranks]


def make_accelerator(fsdp: bool, **options: Any) -> Any:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    if dist.is_initialized():
        os.environ |= {
            "RANK": str(dist.get_rank()),
            "WORLD_SIZE": str(dist.get_world_size()),
            "ACCELERATE_USE_CPU": "1",
        }
        os.environ |= {"LOCAL_RANK": os.environ["RANK"], "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    accelerator = Accelerator(cpu=True, **options)
    if fsdp:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="no_wrap", reshard_after_forward=True, cpu_ram_efficient_loading=False
        )
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    return accelerator


def advance(accelerator: Any, net: Any, optimizer: Any, steps: range) -> None:
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    for step in steps:
        with accelerator.accumulate(net):
            tokens, labels = batch(step, rank, num_ranks)
            accelerator.backward(nn.functional.cross_entropy(net(tokens), labels))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(net.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad()


def keep(accelerator: Any, net: Any, optimizer: Any, folder: str, what: str) -> None:
    """Saves or loads as `accelerator.save_state` and `load_state` do; under FSDP2, by the functions that these call."""
    from accelerate import utils

    if not hasattr(net, "unshard"):
        getattr(accelerator, f"{what}_state")(folder)
        return
    plugin = accelerator.state.fsdp_plugin
    getattr(utils, f"{what}_fsdp_model")(plugin, accelerator, net, folder)
    arguments = (optimizer, net, folder)
    getattr(utils, f"{what}_fsdp_optimizer")(plugin, accelerator, *arguments)


def train(name: str, fsdp: bool = False, folder: str = "") -> dict[str, Tensor]:
    """The weights after some steps; with a folder, the state is saved and loaded into another pair half-way."""
    cuts = [range(2), range(2, STEPS)] if folder else [range(STEPS)]
    for i, steps in enumerate(cuts):
        accelerator, net = make_accelerator(fsdp), Net()
        options = {"rtol": 1e-6} if name == "muon" else {}
        net, optimizer = accelerator.prepare(net, OPTIMIZERS[name].optimizer(net, lr=0.02, **options))
        if i:
            keep(accelerator, net, optimizer, folder, "load")
        advance(accelerator, net, optimizer, steps)
        if folder and not i:
            keep(accelerator, net, optimizer, folder, "save")
    assert health_metrics(optimizer)["optimizer/skipped"] == 0.0
    found = {n.removeprefix("module."): p.detach() for n, p in net.named_parameters()}
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for n, p in found.items()}


def plain(name: str) -> dict[str, Tensor]:
    net = Net()
    options = {"rtol": 1e-6} if name == "muon" else {}
    optimizer: Any = OPTIMIZERS[name].optimizer(net, lr=0.02, **options)
    for step in range(STEPS):
        tokens, labels = batch(step, 0, 1)
        nn.functional.cross_entropy(net(tokens), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach() for n, p in net.named_parameters()}


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=2e-4, rtol=2e-3, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("name", ["muon", "soap"])
def test_one_process_steps_as_without_accelerate(name: str, tmp_path: Path) -> None:
    for folder in ("", str(tmp_path)):
        for key, value in train(name, folder=folder).items():
            assert torch.equal(value, plain(name)[key]), key


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["muon"])
def test_two_ranks_step_as_one_and_go_on_from_a_saved_state(name: str, fsdp: bool, tmp_path: Path) -> None:
    whole = run_on_ranks(train, 2, name, fsdp)
    for found in whole:
        assert_close(found, plain(name))
    for found, again in zip(whole, run_on_ranks(train, 2, name, fsdp, str(tmp_path)), strict=True):
        for key, value in found.items():
            assert torch.equal(value, again[key]), key


def prepared_late() -> str:
    accelerator = make_accelerator(True)
    net = Net()
    optimizer: Any = OPTIMIZERS["muon"].optimizer(net)
    net(batch(0, 0, 1)[0]).sum().backward()
    optimizer.step()
    net, optimizer = accelerator.prepare(net, optimizer)
    net(batch(0, 0, 1)[0]).sum().backward()
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return ""


def test_preparing_after_the_first_step_is_refused() -> None:
    for message in run_on_ranks(prepared_late, 2):
        assert "replaced after the optimizer had stepped them" in message


def test_flat_parameters_of_deepspeed_are_refused() -> None:
    """As its ZeRO leaves the groups: one flat tensor each, inside accelerate's wrapper."""
    accelerator = make_accelerator(False)
    net = Net()
    optimizer = accelerator.prepare(OPTIMIZERS["muon"].optimizer(net))  # type: ignore[call-arg]
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))]
    with pytest.raises(UnsupportedError, match="DeepSpeed's ZeRO and FSDP1 flatten parameters"):
        optimizer.step()
