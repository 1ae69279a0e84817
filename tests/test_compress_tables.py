"""Tables and tied weights: one matrix with several uses is factored once, and every use has the factors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import gramian as gm
from gramian.compression import LowRank, Plan, compress
from gramian.compression.calibration.calibrating import Calibration
from gramian.compression.calibration.kronecker import nearest_kronecker
from gramian.compression.calibration.targets import targets
from gramian.compression.calibration.weighting import counted, weighting
from gramian.compression.layers.lowrank import matrix_of
from gramian.gram import DiagonalGram

DISTILL = gm.Objective.self_distillation()


class Decoder(nn.Module):
    """Tokens to scores by one table."""

    def __init__(self, vocabulary: int = 60, width: int = 24, *, tied: bool = True) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(vocabulary, width), nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        return self.head(x + torch.tanh(self.body(x)))


def tokens(num: int, seed: int, vocabulary: int = 60) -> Tensor:
    """Frequencies fall like one over the rank."""
    shares = 1 / torch.arange(1, vocabulary + 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(shares.expand(num, -1), 12, replacement=True, generator=generator)


def decoder(**options) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(**options)
    with torch.no_grad():  # with a spectrum, as trained tables have
        u, s, vt = torch.linalg.svd(model.table.weight, full_matrices=False)
        model.table.weight.copy_(u * (s[0] * 0.8 ** torch.arange(len(s))) @ vt)
    return model


BATCHES = list(tokens(256, 1).split(16))


@pytest.fixture(scope="module")
def tied() -> Plan:
    return compress(decoder(), batches=BATCHES, objective=DISTILL, include=["table", "head"], of="factorable", keep=0.5)


@pytest.fixture(scope="module")
def apart() -> Plan:
    return compress(decoder(tied=False), batches=BATCHES, objective=DISTILL, of="factorable", keep=0.4)


def test_a_table_and_its_head_share_their_factors(tied: Plan) -> None:
    model, plan = decoder(), tied
    assert plan.parameters_factorable == 60 * 24
    small = plan.apply()
    assert isinstance(small.table, LowRank)
    assert isinstance(small.head, LowRank)
    assert small.head[1].weight is small.table[0].weight
    assert small.head[0].weight is small.table[1].weight
    assert sum(p.numel() for p in small.parameters()) == plan.parameters
    assert "shared with head" in {row["name"]: row for row in plan.explain()}["table"]["reason"]
    x = BATCHES[0]
    w = matrix_of(small.table)
    torch.testing.assert_close(matrix_of(small.head), w)
    h = w[x]
    naive = (h + torch.tanh(small.body(h))) @ w.T + small.head.bias
    torch.testing.assert_close(small(x), naive)
    torch.testing.assert_close(plan.at(keep=1.0).apply()(x), model(x))
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(other(x), small(x))
        assert other.head[1].weight is other.table[0].weight
    exported = torch.export.export(small, (x,)).module()
    torch.testing.assert_close(exported(x), small(x))


def test_it_is_better_than_what_knows_of_one_use_or_none(tied: Plan, apart: Plan) -> None:
    """The distance to the outputs of the dense model, against the SVD and the weighting of each use alone."""
    model, x = decoder(), tokens(512, 7)
    plan = tied.at(keep=0.4)
    rank = plan.ranks["table"]

    def far(w: Tensor) -> float:
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.table.weight.copy_(w)
            return float((other(x) - model(x)).square().mean())

    u, s, vt = torch.linalg.svd(model.table.weight, full_matrices=False)
    one = next(s for s in apart.spectra if s.name == "table")
    ours = far(matrix_of(plan.apply().table))
    assert ours < 0.8 * far(u[:, :rank] * s[:rank] @ vt[:rank])
    assert ours < far((one.left[:, :rank] @ one.right[:rank]).float())


def test_the_cut_of_a_table_is_the_best_for_its_counts() -> None:
    """The oracle: the SVD of the table whose rows are scaled by the root of how often each was looked up."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(60, 24))
    plan = compress(model, batches=BATCHES, objective=DISTILL, keep=0.5)
    w, counts = model[0].weight.detach().double(), torch.cat(BATCHES).flatten().bincount(minlength=60).double()
    made = matrix_of(plan.apply()[0]).double()
    s = torch.linalg.svdvals(counts.sqrt()[:, None] * w)
    rank = plan.ranks["0"]
    best = float(s[rank:].square().sum())
    found = float((counts[:, None] * (made - w).square()).sum())
    assert best <= found * (1 + 1e-6)
    assert found < 1.1 * best  # the eighth kept apart, and the shrinkage of G


def test_rows_that_were_never_seen_have_a_share() -> None:
    counts = torch.tensor([50.0, 30, 1, 1, 0, 0, 0, 0], dtype=torch.float64)
    found, unseen = counted(DiagonalGram(8).add(counts, counts, 82))
    values = found.root.square() * 82
    assert unseen == 4
    torch.testing.assert_close(
        values[4:].sum() / values.sum(), torch.tensor(2 / 82, dtype=torch.float64), rtol=0.1, atol=0
    )
    positions = torch.tensor([9.0, 9, 8, 0, 0], dtype=torch.float64)
    found, _ = counted(DiagonalGram(5).add(positions, positions, 26))
    torch.testing.assert_close(found.root[3], found.root[2])


def test_the_rows_seen_are_those_of_the_side_with_the_columns() -> None:
    """Of a table that side is its output gradients, of a head its inputs; a quarter of the rows was differentiated."""
    model = decoder(tied=False)
    stats, rows = gm.capture(model, BATCHES[:4], DISTILL), 4 * 16 * 12

    def seen(of: nn.Module, blind: bool) -> dict[str, float]:
        calibration = Calibration(stats, distinct=0.5, differentiated=0.25)
        found, _ = targets(of, ["table", "head"], ())
        return {t.name: weighting(t, calibration, blind=blind).seen for t in found}

    assert seen(model, False) == {"table": rows / 8, "head": rows / 2}
    assert seen(model, True) == {"table": torch.inf, "head": rows / 2}
    stats = gm.capture(decoder(), BATCHES[:4], DISTILL)
    assert list(seen(decoder(), False).values()) == [rows / 2]


def test_the_nearest_kronecker_product_is_that_of_the_rearranged_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [x @ x.mT for x in torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)]
    columns = [x @ x.mT for x in torch.randn(3, 5, 5, generator=generator, dtype=torch.float64)]
    r, c = nearest_kronecker(rows, columns)
    whole = sum(torch.outer(a.flatten(), b.flatten()) for a, b in zip(rows, columns, strict=True))
    u, s, vt = torch.linalg.svd(whole)
    torch.testing.assert_close(torch.outer(r.flatten(), c.flatten()), s[0] * torch.outer(u[:, 0], vt[0]))


def test_linear_layers_with_one_weight_share_factors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    model[2].weight = model[0].weight
    batches = list(torch.randn(256, 32).split(32))
    plan = compress(model, batches=batches, objective=DISTILL, keep=0.6)
    small = plan.apply()
    assert small[0][0].weight is small[2][0].weight
    assert small[2][1].bias is not small[0][1].bias
    assert sum(p.numel() for p in small.parameters()) == plan.parameters


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 8}, {"size": 0.3}, {"sparsity": 0.5}])
def test_a_table_in_integers_looks_up_rows(options: dict, apart: Plan) -> None:
    model, x = decoder(tied=False), tokens(64, 3)
    small = apart.at(**options, of="factorable").apply()
    torch.testing.assert_close(small.table(x), matrix_of_any(small.table)[x])
    gap, size = (small(x) - model(x)).square().mean(), model(x).square().mean()
    assert gap < 0.1 * size
    assert small.table(x[0, 0]).shape == (24,)


def matrix_of_any(layer: nn.Module) -> Tensor:
    return layer.weight + 0


def test_a_tied_model_comes_back_from_a_file(tied: Plan, tmp_path) -> None:
    small = tied.apply()
    gm.save_compressed(small, tmp_path / "small.safetensors")
    loaded = gm.load_compressed(decoder(), tmp_path / "small.safetensors")
    assert torch.equal(loaded(BATCHES[0]), small(BATCHES[0]))
    with torch.device("meta"):
        skeleton = Decoder()
    loaded = gm.load_compressed(skeleton, tmp_path / "small.safetensors")
    assert torch.equal(loaded(BATCHES[0]), small(BATCHES[0]))
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_from_pretrained_ties_the_factors(name: str, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    import gramian.integrations.compressed  # noqa: F401

    torch.manual_seed(0)
    small = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    model = {
        "bert": lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(vocab_size=60, max_position_embeddings=16, **small)
        ),
        "t5": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=60)
        ),
    }[name]().eval()

    def scores(model: nn.Module, x: Tensor) -> Tensor:
        return model(input_ids=x, **({"decoder_input_ids": x} if name == "t5" else {})).logits

    uses = {
        "bert": ["bert.embeddings.word_embeddings", "cls.predictions.decoder"],
        "t5": ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"],
    }[name]
    objective = gm.Objective.self_distillation(predict=scores)
    only = compress(model, batches=BATCHES[:3], objective=objective, include=uses, keep=0.5, of="factorable")
    assert [(s.name, *s.tied) for s in only.spectra] == [tuple(uses)]
    made = only.apply()
    made.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(scores(loaded, BATCHES[0]), scores(made, BATCHES[0]))
    loaded.tie_weights()
    assert sum(p.numel() for p in loaded.parameters()) == only.parameters
    torch.testing.assert_close(scores(loaded, BATCHES[0]), scores(made, BATCHES[0]))
    transformers.AutoModel.from_pretrained(tmp_path)
