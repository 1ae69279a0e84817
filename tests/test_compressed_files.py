"""A factored model comes back from a file, a folder, a pickle or a graph as it was, or not at all."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import gramian as gm
from gramian.checkpoint import save_tensors
from gramian.compression import LowRank
from gramian.compression.layers.modules import replaced
from gramian.compression.storage.ranks import ranks_of
from gramian.errors import CheckpointError, InputError
from gramian.layers import is_affine, operation_of
from zoo import ZOO

transformers = pytest.importorskip("transformers")

from gramian.integrations import compressed  # noqa: E402

SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48}
TOKENS = torch.arange(14).reshape(2, 7)
PIXELS = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 50}


def bert() -> nn.Module:
    config = transformers.BertConfig(num_attention_heads=2, vocab_size=50, max_position_embeddings=16, **SMALL)
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    ends = {"bos_token_id": 1, "eos_token_id": 1}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=16, **ends)
    )


def llama() -> nn.Module:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **heads, **SMALL))


def t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))


def vit() -> nn.Module:
    config = transformers.ViTConfig(num_attention_heads=2, image_size=16, patch_size=4, **SMALL)
    return transformers.ViTForImageClassification(config)


def siglip() -> nn.Module:
    """Its initialization draws the weights of projections by their names, whatever layers they have become."""
    vision = {"num_attention_heads": 2, "image_size": 16, "patch_size": 4, **SMALL}
    return transformers.SiglipForImageClassification(transformers.SiglipConfig(vision_config=vision))


FAMILIES = {f.__name__: f for f in (bert, gpt2, llama, t5, vit, siglip)}


@torch.no_grad()
def scores(model: nn.Module) -> Tensor:
    model.eval()
    if isinstance(model, transformers.T5ForConditionalGeneration):
        return model(input_ids=TOKENS, decoder_input_ids=TOKENS).logits
    return model(PIXELS if model.main_input_name == "pixel_values" else TOKENS).logits


def made(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return FAMILIES[name]().eval()


def factored(model: nn.Module, rank: int = 3) -> nn.Module:
    """The model with every linear layer but a tied head factored, with values of their own."""
    tied = {id(m) for m in model.modules() if isinstance(m, nn.Embedding)}
    weights = {id(m.weight) for m in model.modules() if id(m) in tied}
    for name, layer in list(model.named_modules()):
        if operation_of(layer).factors and is_affine(layer) and id(layer.weight) not in weights:
            low = LowRank(layer, min(rank, *layer.weight.shape))
            for parameter in low.parameters():
                nn.init.normal_(parameter, std=0.2)
            model = replaced(model, name, low)
    compressed_support().attach(model)
    return model


def compressed_support():
    from gramian.compression.storage.files import pretrained_support

    support = pretrained_support()
    assert support is not None
    return support


@pytest.mark.parametrize("name", FAMILIES)
def test_from_pretrained_gives_the_same_model(name: str, tmp_path) -> None:
    small = factored(made(name))
    small.save_pretrained(tmp_path)
    loaded, info = type(small).from_pretrained(tmp_path, output_loading_info=True)
    torch.testing.assert_close(scores(loaded), scores(small), rtol=1e-6, atol=1e-6)
    assert ranks_of(loaded) == ranks_of(small) != {}
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    headless = transformers.AutoModel.from_pretrained(tmp_path)
    assert len(ranks_of(headless)) >= len(ranks_of(small)) - 1


@pytest.mark.parametrize("name", FAMILIES)
def test_without_gramian_it_raises_and_initializes_nothing_again(name: str, tmp_path, monkeypatch) -> None:
    small = factored(made(name))
    small.save_pretrained(tmp_path)
    from transformers.quantizers import auto

    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, compressed.METHOD)
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, compressed.METHOD)
    with pytest.raises(RuntimeError):
        type(small).from_pretrained(tmp_path)
    with pytest.raises(RuntimeError):
        transformers.AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("where", ["dense", "meta"])
@pytest.mark.parametrize("form", ["folder", "in_folder", "file"])
def test_load_compressed_takes_all_forms(name: str, where: str, form: str, tmp_path) -> None:
    small = factored(made(name))
    path = tmp_path / ("small.safetensors" if form == "file" else "folder")
    gm.save_compressed(small, path)
    with torch.device("meta" if where == "meta" else "cpu"):
        skeleton = made(name, seed=1)
    if where == "meta" and form == "file" and [n for n, b in skeleton.named_buffers() if n not in small.state_dict()]:
        with pytest.raises(CheckpointError, match="does not hold the buffers"):
            gm.load_compressed(skeleton, path)
        return
    loaded = gm.load_compressed(skeleton, path / "model.safetensors" if form == "in_folder" else path)
    assert loaded is skeleton
    assert torch.equal(scores(loaded), scores(small))
    tied = {name for group in (small, loaded) for name, p in group.named_parameters(remove_duplicate=True)}
    assert tied == {name for name, _ in small.named_parameters()}


def test_a_plan_of_a_transformer_saves_and_loads(tmp_path) -> None:
    model = made("bert")
    tokens = torch.randint(14, (24, 7), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": tokens, "labels": torch.arange(24) % 2}]
    small = gm.compress(model, batches=batches, objective=gm.Objective.classification(), keep=0.8).apply()
    assert ranks_of(small)
    small.save_pretrained(tmp_path)
    assert torch.equal(scores(type(small).from_pretrained(tmp_path)), scores(small))
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "dense")
    assert torch.equal(scores(type(model).from_pretrained(tmp_path / "dense")), scores(model))


def test_a_part_is_saved_and_loaded_with_and_without_a_head(tmp_path) -> None:
    small = factored(made("bert"))
    small.bert.save_pretrained(tmp_path / "part")
    small.save_pretrained(tmp_path / "whole")
    states = small.bert(TOKENS)[0]
    for part in ("part", "whole"):
        inner = transformers.BertModel.from_pretrained(tmp_path / part).eval()
        assert torch.equal(inner(TOKENS)[0], states)
    headed = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "part").eval()
    assert torch.equal(headed.bert(TOKENS)[0], states)


def test_a_loaded_model_is_an_ordinary_one(tmp_path) -> None:
    """It is cast, trained by a Trainer's rules, copied, pickled, compressed again and saved again."""
    from transformers.trainer_utils import validate_quantization_for_training

    factored(made("bert")).save_pretrained(tmp_path / "a")
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "a")
    validate_quantization_for_training(loaded)
    assert {p.dtype for p in copy.deepcopy(loaded).half().parameters()} == {torch.float16}
    loaded(TOKENS, labels=torch.tensor([0, 1])).loss.backward()
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.sub_(parameter.grad if parameter.grad is not None else 0, alpha=0.1)
    loaded.zero_grad()
    for place, model in enumerate((loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded)))):
        model.save_pretrained(tmp_path / str(place), max_shard_size="5KB")
        assert len(list((tmp_path / str(place)).glob("*.safetensors"))) > 1
        again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / str(place))
        assert torch.equal(scores(again), scores(loaded))
        assert torch.equal(scores(gm.load_compressed(made("bert"), tmp_path / str(place))), scores(loaded))
    wide = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    assert {p.dtype for p in wide.parameters()} == {torch.bfloat16}


def test_a_folder_that_does_not_fit_is_refused_by_name(tmp_path) -> None:
    small = factored(made("bert"))
    small.save_pretrained(tmp_path / "small")
    made("bert").save_pretrained(tmp_path / "dense")
    config = transformers.BertConfig(num_attention_heads=2, vocab_size=50, max_position_embeddings=16, **SMALL)
    others = {
        r"not in LlamaForCausalLM": made("llama"),
        r"does not fit BertForSequenceClassification": transformers.BertForSequenceClassification(
            transformers.BertConfig(**config.to_dict() | {"hidden_size": 64})
        ),
        r"does not fit BertForMaskedLM": transformers.BertForMaskedLM(config),
    }
    for message, model in others.items():
        before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
        with pytest.raises(CheckpointError, match=message) as caught:
            gm.load_compressed(model, tmp_path / "small")
        assert "\n" not in str(caught.value)
        after = model.state_dict(keep_vars=True)
        assert {name: id(t) for name, t in after.items()} == {name: key for name, (key, _) in before.items()}
        assert all(torch.equal(after[name], t) for name, (_, t) in before.items())
    with pytest.raises(CheckpointError, match="names no ranks"):
        gm.load_compressed(made("bert"), tmp_path / "dense")
    (tmp_path / "small" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        gm.load_compressed(made("bert"), tmp_path / "small")


class Tied(nn.Module):
    """A table that is the head too, a layer in two places, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(20, 16), nn.Linear(16, 16)
        self.twice, self.head = self.inner, nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((1,), 2.0))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.twice(torch.tanh(self.inner(self.embed(tokens)))) * self.scale)


def test_a_skeleton_on_the_meta_device_becomes_the_file(tmp_path) -> None:
    torch.manual_seed(0)
    small = Tied()
    low = LowRank(small.inner, 3)
    for parameter in low.parameters():
        nn.init.normal_(parameter)
    small = replaced(small, "inner", low)
    gm.save_compressed(small, tmp_path / "x.safetensors")
    with torch.device("meta"):
        skeleton = Tied()
    loaded = gm.load_compressed(skeleton, tmp_path / "x.safetensors")
    assert loaded.head.weight is loaded.embed.weight
    assert loaded.twice is loaded.inner
    assert torch.equal(loaded(TOKENS), small(TOKENS))
    loaded(TOKENS).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())
    (tmp_path / "x.safetensors").write_bytes(b"")  # nothing of it is still mapped
    assert torch.equal(loaded(TOKENS), small(TOKENS))


def test_a_buffer_that_no_file_holds_is_named(tmp_path) -> None:
    def net() -> nn.Module:
        model = nn.Sequential(nn.Linear(8, 8))
        model.register_buffer("angles", torch.ones(3), persistent=False)
        return model

    gm.save_compressed(replaced(net(), "0", LowRank(nn.Linear(8, 8), 2)), tmp_path / "x.safetensors")
    with torch.device("meta"):
        skeleton = net()
    with pytest.raises(CheckpointError, match="does not hold the buffers angles") as caught:
        gm.load_compressed(skeleton, tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)
    assert type(skeleton[0]) is nn.Linear


def mlp_plan() -> tuple[nn.Module, gm.Plan, Tensor]:
    case = ZOO["mlp"]
    model, batches = case.make_model(0).eval(), case.make_batches(0)[:2]
    plan = gm.compress(model, batches=batches, objective=gm.Objective.classification(), keep=0.5)
    return model, plan, batches[0][0]


def test_compressing_again_is_saved_and_loaded(tmp_path) -> None:
    _, plan, x = mlp_plan()
    small, batches = plan.apply(), ZOO["mlp"].make_batches(0)[:2]
    twice = gm.compress(small, batches=batches, objective=gm.Objective.classification(), keep=0.7).apply()
    gm.save_compressed(twice, tmp_path / "x.safetensors")
    assert torch.equal(gm.load_compressed(ZOO["mlp"].make_model(1), tmp_path / "x.safetensors")(x), twice(x))


def nested() -> nn.Module:
    """A factor that was factored again."""
    torch.manual_seed(0)
    outer = LowRank(nn.Linear(16, 12), 5)
    outer[0] = LowRank(outer[0], 2)
    for parameter in outer.parameters():
        nn.init.normal_(parameter)
    return nn.Sequential(outer, nn.ReLU(), nn.Linear(12, 3))


def test_a_factor_that_was_factored_again_is_saved_and_loaded(tmp_path) -> None:
    small, x = nested(), torch.randn(4, 16)
    assert ranks_of(small) == {"0": 5, "0.0": 2}
    gm.save_compressed(small, tmp_path / "x.safetensors")
    dense = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    assert torch.equal(gm.load_compressed(dense, tmp_path / "x.safetensors")(x), small(x))


def as_pickle(model: nn.Module, x: Tensor) -> Tensor:
    return pickle.loads(pickle.dumps(model))(x)


def as_copy(model: nn.Module, x: Tensor) -> Tensor:
    return copy.deepcopy(model)(x)


def exported(model: nn.Module, x: Tensor) -> Tensor:
    return torch.export.export(model, (x,)).module()(x)


def compiled(model: nn.Module, x: Tensor) -> Tensor:
    torch._dynamo.reset()  # the limit on compilations of one function holds for the process
    return torch.compile(model, backend="eager", fullgraph=True)(x)


def as_onnx(model: nn.Module, x: Tensor) -> Tensor:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=True)
    session = runtime.InferenceSession(file.getvalue())
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("way", [as_pickle, as_copy, exported, compiled, as_onnx])
@pytest.mark.parametrize("name", ["mlp", "residual_cnn", "nested"])
def test_a_factored_model_survives(way, name: str) -> None:
    if name == "nested":
        small, x = nested().eval(), torch.randn(4, 16)
    else:
        case = ZOO[name]
        model, batches = case.make_model(0).eval(), case.make_batches(0)[:1]
        objective = getattr(gm.Objective, case.objective)()
        small, x = gm.compress(model, batches=batches, objective=objective, keep=0.9).apply(), batches[0][0]
        assert ranks_of(small)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(way(small, x), small(x), rtol=1e-5, atol=1e-6)


def test_a_plan_is_saved_and_loaded(tmp_path) -> None:
    model, plan, x = mlp_plan()
    gm.save_plan(plan, tmp_path / "plan.safetensors")
    loaded = gm.load_plan(copy.deepcopy(model), tmp_path / "plan.safetensors")
    assert (loaded.ranks, loaded.keep, loaded.reasons) == (plan.ranks, plan.keep, plan.reasons)
    assert str(loaded) == str(plan)
    for keep in (0.3, 0.5, 0.9):
        assert torch.equal(loaded.at(keep=keep).apply()(x), plan.at(keep=keep).apply()(x))
        assert loaded.at(keep=keep).predicted_loss == plan.at(keep=keep).predicted_loss
    wrapped = gm.load_plan(nn.DataParallel(model), tmp_path / "plan.safetensors")
    assert wrapped.ranks == plan.ranks


def test_a_plan_for_another_model_is_refused_by_name(tmp_path) -> None:
    model, plan, _ = mlp_plan()
    path = tmp_path / "plan.safetensors"
    gm.save_plan(plan, path)
    with pytest.raises(CheckpointError, match=r"plan for another model than Sequential: .* planned"):
        gm.load_plan(ZOO["residual_cnn"].make_model(0), path)
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    with pytest.raises(CheckpointError, match=r"plan for other weights: 0 changed") as caught:
        gm.load_plan(model, path)
    assert "\n" not in str(caught.value)
    save_tensors(path, model.state_dict())
    with pytest.raises(CheckpointError, match="not written by save_plan"):
        gm.load_plan(model, path)
    with pytest.raises(InputError):
        gm.save_plan(plan, tmp_path / "missing" / "plan.safetensors")
