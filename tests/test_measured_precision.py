"""Measurements take full float32 products whatever torch was told; what the model does follows the user's setting."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gramian as gm
from gramian import random
from gramian.gram import sums
from gramian.inspection.weights.convolution import conv_norm
from gramian.inspection.weights.quadrature import leading_vectors
from gramian.inspection.weights.quick import describe_quickly
from gramian.operators import end_to_end_jacobian, hessian, layer_gains, line_curvature
from gramian.recording.correlation import moment_of_windows

MKLDNN = torch.backends.mkldnn
PRODUCTS = ("mm", "bmm", "addmm", "mv", "convolution", "convolution_backward", "mkldnn_rnn_layer")


class Products(TorchDispatchMode):
    """Notes under which settings float32 products and convolutions run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in PRODUCTS and any(isinstance(x, torch.Tensor) and x.dtype == torch.float32 for x in args):
            setting = MKLDNN.conv if name.startswith("convolution") else MKLDNN.matmul
            self.seen.append((name, setting.fp32_precision))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def narrow():
    """float32 products and convolutions in bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    MKLDNN.conv.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        MKLDNN.matmul.fp32_precision = MKLDNN.conv.fp32_precision = "none"
        torch.backends.cuda.matmul.fp32_precision = "none"


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3))


def batch():
    return torch.randn(16, 2, 6, 6, generator=seeded()), torch.arange(16) % 3


OBJECTIVE = gm.Objective.classification()


def along():
    model = network()
    parts = {p: torch.ones_like(p) for p in model.parameters()}
    return torch.tensor(line_curvature(model, batch(), OBJECTIVE, parts).curvature)


MEASURED = {
    "describe_quickly": lambda: describe_quickly(random.normal(300, 280, generator=seeded())).spectral_norm,
    "conv_norm": lambda: conv_norm(random.normal(16, 16, 9, generator=seeded()).unflatten(2, (3, 3)), (32, 32))[0],
    "leading_vectors": lambda: leading_vectors(random.normal(1200, 1100, generator=seeded()), 2)[1],
    "sums": lambda: sums(random.normal(300, 280, generator=seeded())).total,
    "moment_of_windows": lambda: moment_of_windows(batch()[0], (3, 3), ((1, 1), (1, 1)), (1, 1)).total,
    "hessian": lambda: gm.linalg.eigvalsh_top(hessian(network(), [batch()], OBJECTIVE), 2, rtol=1e-3),
    "product with the Hessian": lambda: hessian(network(), [batch()], OBJECTIVE).matvec(torch.ones(623)),
    "line_curvature": along,
    "end_to_end_jacobian": lambda: end_to_end_jacobian(network(), batch(), OBJECTIVE),
    "layer_gains": lambda: layer_gains(network(), batch(), OBJECTIVE)["3.weight"].chi,
}


@pytest.mark.parametrize("name", MEASURED)
def test_a_measurement_takes_full_products(name, narrow):
    with Products() as products:
        found = MEASURED[name]()
    assert products.seen
    assert {setting for _, setting in products.seen} <= {"ieee", "none"}
    assert MKLDNN.matmul.fp32_precision == MKLDNN.conv.fp32_precision == "bf16"  # restored
    torch.set_float32_matmul_precision("highest")
    MKLDNN.matmul.fp32_precision = MKLDNN.conv.fp32_precision = "none"
    wanted = MEASURED[name]()
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(wanted))


SEEN: list[str] = []


class Noting(nn.Linear):
    def forward(self, input):
        SEEN.append(MKLDNN.matmul.fp32_precision)
        return super().forward(input)


@pytest.mark.parametrize("verb", ["capture", "inspect"])
def test_the_model_runs_as_the_user_set_it(verb, narrow):
    torch.manual_seed(0)
    model = nn.Sequential(Noting(4, 8), nn.Tanh(), nn.Linear(8, 3))
    SEEN.clear()
    batches = [(torch.randn(32, 4, generator=seeded()), torch.arange(32) % 3)]
    if verb == "capture":
        gm.capture(model, batches, OBJECTIVE)
        assert set(SEEN) == {"bf16"}
    else:
        gm.inspect(model, batches, OBJECTIVE)
        assert "bf16" in SEEN  # the experiments; gains and Jacobians are measured in full precision
    assert MKLDNN.matmul.fp32_precision == "bf16"
