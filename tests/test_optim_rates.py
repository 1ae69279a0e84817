"""The usual rates: L counts what a unit of the function passes through; narrow tables move faster."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gramian as gm


class _Experts(nn.Module):
    """Four experts, stacked or as modules of their own; the forward pass does not matter here."""

    def __init__(self, *, stacked: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        if stacked:
            self.experts = nn.Module()
            self.experts.gate_up_proj = nn.Parameter(torch.randn(4, 12, 8))
            self.experts.down_proj = nn.Parameter(torch.randn(4, 8, 6))
        else:
            parts = {"gate": (8, 6), "up": (8, 6), "down": (6, 8)}
            self.experts = nn.ModuleList(
                nn.ModuleDict({k: nn.Linear(*s, bias=False) for k, s in parts.items()}) for _ in range(4)
            )
        self.head = nn.Linear(8, 3)


@pytest.mark.parametrize("stacked", [True, False])
def test_experts_in_parallel_share_one_part_of_the_rate(stacked: bool) -> None:
    layouts = {"experts.gate_up_proj": "e (two o) i -> e two o i", "experts.down_proj": "e o i -> e o i"}
    optimizer = gm.optim.Muon(_Experts(stacked=stacked), lr=0.1, layouts=layouts if stacked else None)
    assert optimizer._num_matrices == 1 + 3


def test_fused_parts_and_groups_count_each_and_depthwise_kernels_not_at_all() -> None:
    model = nn.Sequential(
        nn.Conv1d(8, 16, 3, groups=4), nn.Conv1d(16, 16, 3, groups=16), nn.MultiheadAttention(16, 2), nn.Linear(16, 2)
    )
    assert gm.optim.Muon(model)._num_matrices == 4 + 0 + (3 + 1)


def test_narrow_embeddings_take_a_larger_usual_rate() -> None:
    def rates(width: int, **options: object) -> dict[str, float]:
        optimizer = gm.optim.Muon(
            nn.Sequential(nn.Embedding(9, width), nn.Linear(width, 4), nn.Linear(4, 2)), **options
        )
        return {name: g["lr"] for g in optimizer.param_groups for name in g.get("param_names", [])}

    assert rates(64)["0.weight"] == rates(64)["2.weight"] == 1e-2
    assert rates(600)["0.weight"] == pytest.approx(2.4 / 600)
    assert rates(2048)["0.weight"] == rates(2048)["2.weight"] == 3e-3
    assert rates(64, rest_lr=1e-3)["0.weight"] == 1e-3
    assert rates(64, scale="match_rms_adamw", lr=2e-3)["0.weight"] == 2e-3
    without = gm.optim.Muon(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)))
    assert without.param_groups[1]["lr"] == 3e-3
