"""Adapters from `--extract-lora`, loaded by PEFT itself into the base, give the fine-tuned model's outputs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gramian.checkpoint import load_tensors, save_tensors
from gramian.errors import CheckpointError
from gramian.inspection import Adapter, extract_lora
from gramian.inspection.comparing.peft_format import MAMBA

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32}
PADDED = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = TINY | {"num_key_value_heads": 2, "max_position_embeddings": 64}
BART = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
} | PADDED  # fmt: skip
VIT = {k: v for k, v in TINY.items() if k != "vocab_size"} | {"image_size": 16, "patch_size": 4, "num_labels": 3}

# Family: the class, the config's arguments, and what it is given.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", GPT),
    "gpt2 untied": ("GPT2LMHeadModel", GPT | {"tie_word_embeddings": False}),
    "gpt2 classifier": ("GPT2ForSequenceClassification", GPT | {"num_labels": 3, "pad_token_id": 0}),
    "openai-gpt": ("OpenAIGPTLMHeadModel", GPT),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", GPT),
    "gpt_neox": ("GPTNeoXForCausalLM", TINY),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
         "vocab_size": 64, "intermediate_size": 48},
    ),
    "gptj": ("GPTJForCausalLM", GPT | {"rotary_dim": 4}),
    "codegen": ("CodeGenForCausalLM", GPT | {"rotary_dim": 4}),
    "bloom": ("BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}),
    "opt": ("OPTForCausalLM", TINY | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    "falcon": ("FalconForCausalLM", TINY),
    "mpt": ("MptForCausalLM", {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 64, "max_seq_len": 64}),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama tied": ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "llama classifier": ("LlamaForSequenceClassification", LLAMA | {"num_labels": 3, "pad_token_id": 0}),
    "mistral": ("MistralForCausalLM", LLAMA),
    "qwen2": ("Qwen2ForCausalLM", LLAMA),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | {"head_dim": 8}),
    "gemma": ("GemmaForCausalLM", LLAMA | {"head_dim": 8} | PADDED),
    "gemma2": ("Gemma2ForCausalLM", LLAMA | {"head_dim": 8} | PADDED),
    "phi": ("PhiForCausalLM", TINY),
    "phi3": ("Phi3ForCausalLM", LLAMA | PADDED),
    "olmo2": ("Olmo2ForCausalLM", LLAMA | PADDED),
    "stablelm": ("StableLmForCausalLM", LLAMA),
    "starcoder2": ("Starcoder2ForCausalLM", LLAMA | PADDED),
    "cohere": ("CohereForCausalLM", LLAMA | PADDED),
    "granite": ("GraniteForCausalLM", LLAMA | PADDED),
    "gemma3": ("Gemma3ForCausalLM", LLAMA | {"head_dim": 8} | PADDED),
    "glm4": ("Glm4ForCausalLM", LLAMA | {"head_dim": 8} | PADDED),
    "olmo": ("OlmoForCausalLM", LLAMA | PADDED),
    "nemotron": ("NemotronForCausalLM", LLAMA | PADDED),
    "persimmon": ("PersimmonForCausalLM", TINY),
    "mpnet": ("MPNetForMaskedLM", TINY | PADDED),
    "xlm-roberta": ("XLMRobertaForTokenClassification", TINY | {"num_labels": 3} | PADDED),
    "camembert": ("CamembertForMaskedLM", TINY | PADDED),
    "squeezebert": ("SqueezeBertForMaskedLM", TINY | {"embedding_size": 32}),
    "funnel": ("FunnelForMaskedLM", {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "block_sizes": [1, 1],
               "vocab_size": 64}),
    "xlnet": ("XLNetLMHeadModel", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": 64}),
    "pegasus": ("PegasusForConditionalGeneration", BART),
    "umt5": ("UMT5ForConditionalGeneration",
           {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
            "decoder_start_token_id": 0}),
    "rwkv": ("RwkvForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64,
             "attention_hidden_size": 32, "intermediate_size": 48}),
    "mamba": ("MambaForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4}),
    "bert": ("BertForMaskedLM", TINY),
    "bert classifier": ("BertForSequenceClassification", TINY | {"num_labels": 3}),
    "bert tokens": ("BertForTokenClassification", TINY | {"num_labels": 3}),
    "distilbert classifier": (
        "DistilBertForSequenceClassification",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 64, "num_labels": 3},
    ),
    "roberta": ("RobertaForMaskedLM", TINY | PADDED),
    "roberta classifier": ("RobertaForSequenceClassification", TINY | {"num_labels": 3} | PADDED),
    "electra": ("ElectraForMaskedLM", TINY | {"embedding_size": 16}),
    "albert": ("AlbertForMaskedLM", TINY | {"embedding_size": 16} | PADDED),
    "deberta-v2": ("DebertaV2ForSequenceClassification", TINY | {"num_labels": 3}),
    "modernbert": ("ModernBertForMaskedLM", TINY | PADDED | {"cls_token_id": 1, "sep_token_id": 2}),
    "t5": ("T5ForConditionalGeneration",
           {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
            "decoder_start_token_id": 0}),
    "t5 untied": ("T5ForConditionalGeneration",
           {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
            "decoder_start_token_id": 0, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
    "bart": ("BartForConditionalGeneration", BART),
    "bart classifier": ("BartForSequenceClassification", BART | {"num_labels": 3}),
    "marian": ("MarianMTModel", BART),
    "vit": ("ViTForImageClassification", VIT),
    "deit": ("DeiTForImageClassification", VIT),
    "dinov2": ("Dinov2ForImageClassification", VIT),
    "convnext": ("ConvNextForImageClassification",
                 {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_labels": 3, "image_size": 32}),
    "resnet": ("ResNetForImageClassification",
               {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_labels": 3}),
    "swin": ("SwinForImageClassification",
             {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "image_size": 32, "patch_size": 4,
              "num_labels": 3, "window_size": 4}),
    "whisper": ("WhisperForConditionalGeneration", BART | {"num_mel_bins": 8, "max_source_positions": 16,
                "max_target_positions": 32, "suppress_tokens": None, "begin_suppress_tokens": None}),
}  # fmt: skip

MOE = LLAMA | PADDED | {"num_local_experts": 4}
EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", MOE),
    "qwen3_moe": ("Qwen3MoeForCausalLM",
                  MOE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}),
    "gpt_oss": ("GptOssForCausalLM", MOE | {"head_dim": 8, "layer_types": ["full_attention"] * 2}),
    "granitemoe": ("GraniteMoeForCausalLM", MOE),
}  # fmt: skip

FAST = (
    "gpt2",
    "gpt2 classifier",
    "openai-gpt",
    "llama",
    "qwen2",
    "bert classifier",
    "distilbert classifier",
    "t5",
    "vit",
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(name: str, table: dict[str, tuple[str, dict[str, Any]]] = FAMILIES) -> nn.Module:
    """A tiny model of a family with random weights; no entry of its norms and biases is 0 or 1."""
    transformers = pytest.importorskip("transformers")
    cls, arguments = table[name]
    torch.manual_seed(0)
    cls = getattr(transformers, cls)
    model = cls(cls.config_class(**arguments)).eval()
    change(model, 0.02, seed=1)
    return model


def change(model: nn.Module, size: float, seed: int) -> None:
    """Adds full-rank noise to every parameter, and to the statistics of batch norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer += size * torch.rand(buffer.shape, generator=generator)


def outputs(model: nn.Module) -> Tensor:
    """What the model says to a fixed input."""
    model = model.eval()
    config: Any = model.config
    cls = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    tokens = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(5))
    inputs: dict[str, Tensor] = {"input_ids": tokens}
    if model.main_input_name == "pixel_values":
        side = config.image_size if hasattr(config, "image_size") else 32
        inputs = {"pixel_values": normal(2, getattr(config, "num_channels", 3), side, side)}
    elif model.main_input_name == "input_features":
        inputs = {"input_features": normal(2, 8, 32), "decoder_input_ids": tokens}
    elif config.is_encoder_decoder and "Classification" not in cls:
        inputs |= {"decoder_input_ids": tokens}
    elif config.is_encoder_decoder:  # the classifier reads the last end-of-sequence token
        inputs["input_ids"] = torch.cat((tokens[:, :-1], torch.full((2, 1), config.eos_token_id)), 1)
    with torch.no_grad():
        return model(**inputs).logits.double()


def restore(tmp_path: Path, name: str, dtype: torch.dtype, rank: int = 10_000) -> tuple[float, float, Adapter]:
    """The error of base and adapter against the fine-tune's outputs, their difference from the base's, the adapter."""
    peft = pytest.importorskip("peft")
    model = build(name).to(dtype)
    model.save_pretrained(tmp_path / "base")
    before = outputs(type(model).from_pretrained(tmp_path / "base", dtype=torch.float32))
    model = model.float()
    change(model, 0.02, seed=2)
    model.to(dtype).save_pretrained(tmp_path / "tuned")
    wanted = outputs(type(model).from_pretrained(tmp_path / "tuned", dtype=torch.float32))
    adapter = extract_lora(tmp_path / "tuned", tmp_path / "base", rank, tmp_path / "adapter")
    base = type(model).from_pretrained(tmp_path / "base", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out|.*fan_in_fan_out")
        loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    adapted = {
        name.removeprefix("base_model.model.")
        for name, module in loaded.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert adapted == set(adapter.errors)
    got = outputs(loaded)
    size = float(wanted.norm())
    return float((got - wanted).norm()) / size, float((before - wanted).norm()) / size, adapter


CASES = [
    pytest.param(name, dtype, marks=() if name in FAST and dtype == torch.float32 else pytest.mark.families)
    for name in FAMILIES
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_base_and_adapter_are_the_fine_tuned_model(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    error, effect, adapter = restore(tmp_path, name, dtype)
    assert not adapter.left_out
    assert effect > 1e-3
    assert error <= 1e-5


@pytest.mark.families
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe"])
def test_experts_are_left_out_by_name_and_the_rest_is_right(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = build(name, EXPERTS)
    model.save_pretrained(tmp_path / "base")
    change(model, 0.02, seed=2)
    model.save_pretrained(tmp_path / "tuned")
    adapter = extract_lora(tmp_path / "tuned", tmp_path / "base", 100, tmp_path / "adapter")
    new, old = (load_tensors(tmp_path / f"{folder}/model.safetensors")[0] for folder in ("tuned", "base"))
    stacked = set(adapter.left_out)
    assert stacked >= {name for name, tensor in new.items() if tensor.ndim == 3 or ".experts." in name}
    assert all("mlp" in name or "block_sparse_moe" in name for name in stacked)
    assert "Changed, but not in the adapter" in " ".join(adapter.notes())
    save_tensors(
        tmp_path / "tuned/model.safetensors",
        {name: old[name] if name in stacked else tensor for name, tensor in new.items()},
        {"format": "pt"},
    )
    wanted = outputs(type(model).from_pretrained(tmp_path / "tuned"))
    loaded = peft.PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), str(tmp_path / "adapter"))
    assert float((outputs(loaded) - wanted).norm() / wanted.norm()) <= 1e-5


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_the_adapter_merges(name: str, tmp_path: Path) -> None:
    """Whether all adapted modules have biases (GPT-2) or some (Qwen 2)."""
    peft = pytest.importorskip("peft")
    restore(tmp_path, name, torch.float32)
    cls = type(build(name))
    loaded = peft.PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter"))
    wanted = outputs(cls.from_pretrained(tmp_path / "tuned"))
    assert float((outputs(loaded.merge_and_unload()) - wanted).norm() / wanted.norm()) <= 1e-5


def test_a_low_rank_adapter_is_the_best_of_its_rank(tmp_path: Path) -> None:
    error, effect, adapter = restore(tmp_path, "llama", torch.float32, rank=4)
    assert 1e-3 < error < effect
    new, old = (load_tensors(tmp_path / f"{folder}/model.safetensors")[0] for folder in ("tuned", "base"))
    for module, reported in adapter.errors.items():
        sigma = torch.linalg.svdvals((new[f"{module}.weight"] - old[f"{module}.weight"]).double())
        rank = min(4, len(sigma))
        assert reported == pytest.approx(float(sigma[rank:].norm() / sigma.norm()), rel=1e-5, abs=1e-6)


def test_a_resized_vocabulary_and_a_new_head_are_whole_in_the_adapter(tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    arguments = FAMILIES["bert classifier"][1]
    torch.manual_seed(0)
    transformers.BertForMaskedLM(transformers.BertConfig(**arguments)).save_pretrained(tmp_path / "base")
    tuned = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    tuned.resize_token_embeddings(70)
    change(tuned, 0.02, seed=3)
    tuned.eval().save_pretrained(tmp_path / "tuned")
    adapter = extract_lora(tmp_path / "tuned", tmp_path / "base", 100, tmp_path / "adapter")
    assert "classifier" in adapter.saved
    remarks = " ".join(adapter.notes())
    assert "resize the base" in remarks
    assert "(70, 32), in the base (64, 32)" in remarks
    assert "Only in the model" in remarks
    base = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    base.resize_token_embeddings(70)
    wanted = outputs(tuned)
    got = outputs(peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")))
    assert float((got - wanted).norm() / wanted.norm()) <= 1e-5


def test_square_weights_take_the_orientation_that_the_biases_of_their_kind_tell(tmp_path: Path) -> None:
    """Without a config: transformers' Conv1D is (in, out); nanoGPT, under the same names, has nn.Linear."""
    for name, in_out in (("conv1d", True), ("linear", False)):
        base = {
            "h.0.attn.c_proj.weight": normal(8, 8),
            "h.0.mlp.c_proj.weight": normal(*((32, 8) if in_out else (8, 32)), seed=1),
            "head.weight": normal(8, 8, seed=2),
        }
        base |= {"h.0.attn.c_proj.bias": torch.zeros(8), "h.0.mlp.c_proj.bias": torch.zeros(8)}
        delta = {key: normal(*w.shape, seed=3) for key, w in base.items() if key.endswith("weight")}
        save_tensors(tmp_path / f"{name}.base.safetensors", base)
        save_tensors(tmp_path / f"{name}.safetensors", base | {key: base[key] + d for key, d in delta.items()})
        extract_lora(tmp_path / f"{name}.safetensors", tmp_path / f"{name}.base.safetensors", 8, tmp_path / name)
        tensors, _ = load_tensors(tmp_path / name / "adapter_model.safetensors")
        for key, d in delta.items():
            module = f"base_model.model.{key.removesuffix('.weight')}"
            got = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
            turned = in_out and "c_proj" in key
            torch.testing.assert_close(got, d.mT if turned else d, rtol=1e-4, atol=1e-5)


class Nested(nn.Module):
    """Modules whose paths end in one another's, and one whose name ends in another's."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"proj": nn.Linear(6, 6), "norm": nn.LayerNorm(6)})
        self.norm = nn.LayerNorm(6)
        self.prenorm = nn.LayerNorm(6)
        self.conv = nn.Conv2d(1, 4, 3)
        self.config: Any = {"model_type": "custom"}

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.prenorm(self.block["norm"](self.block["proj"](self.proj(x)))))
        return self.conv(x[:, None, None, :].expand(-1, 1, 6, 6)).flatten(1)


def test_only_the_modules_that_changed_are_adapted(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = Nested()
    save_tensors(tmp_path / "base.safetensors", model.state_dict())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in (model.proj.weight, model.norm.weight, model.conv.weight):
            parameter += torch.randn(parameter.shape)
    save_tensors(tmp_path / "tuned.safetensors", model.state_dict())
    extract_lora(tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", 16, tmp_path / "adapter")
    base = Nested()
    base.load_state_dict(before)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    inner = loaded.base_model.model
    lora, saved = peft.tuners.lora.LoraLayer, peft.utils.ModulesToSaveWrapper
    names = {name for name, module in inner.named_modules() if isinstance(module, lora)}
    assert names == {"proj"}
    assert {name for name, module in inner.named_modules() if isinstance(module, saved)} == {"conv"}
    x = normal(5, 6)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)


class Uncalled(nn.Module):
    """Layers whose weights torch uses without calling them, grouped and transposed kernels, a plain parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.position = nn.Parameter(torch.randn(1, 9, 16))
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.lstm = nn.LSTM(16, 12, batch_first=True)
        self.grouped = nn.Conv2d(12, 24, 3, padding=1, groups=3)
        self.plain = nn.Conv2d(24, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.transposed = nn.ConvTranspose2d(12, 6, 2)
        self.head = nn.Linear(6, 5)
        self.config: Any = {"model_type": "custom"}

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.lstm(self.encoder(self.embed(tokens) + self.position))[0]
        x = self.norm(self.plain(self.grouped(x.mT.unflatten(2, (3, 3)))))
        return self.head(self.transposed(x).mean((2, 3)))


def test_modules_that_peft_cannot_adapt_are_whole(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = Uncalled().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_tensors(tmp_path / "base.safetensors", before)
    change(model, 0.1, seed=6)
    save_tensors(tmp_path / "tuned.safetensors", model.state_dict())
    adapter = extract_lora(tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", 99, tmp_path / "adapter")
    assert set(adapter.errors) == {"plain", "head"}
    assert {"norm", "lstm", "grouped", "transposed"} <= set(adapter.saved)
    assert "position" in adapter.overwritten
    assert not adapter.left_out
    base = Uncalled().eval()
    base.load_state_dict(before)
    tokens = torch.arange(18).reshape(2, 9)
    with torch.no_grad():
        assert float((base(tokens) - model(tokens)).norm()) > 0.1 * float(model(tokens).norm())
        loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        torch.testing.assert_close(loaded(tokens), model(tokens), rtol=1e-4, atol=1e-5)


def test_a_difference_of_rounding_is_said_to_be_one(tmp_path: Path) -> None:
    base = {f"layers.{i}.proj.weight": normal(48, 48, seed=i) for i in range(3)}
    save_tensors(tmp_path / "base.safetensors", base)
    # the cast itself, and what merging and unmerging an adapter in bfloat16 leaves
    half = {name: w.bfloat16() for name, w in base.items()}
    save_tensors(tmp_path / "half.safetensors", half)
    delta = (normal(48, 2, seed=7) @ normal(2, 48, seed=8)).bfloat16()
    merged = half | {"layers.0.proj.weight": half["layers.0.proj.weight"] + delta - delta}
    assert not torch.equal(merged["layers.0.proj.weight"], half["layers.0.proj.weight"])
    save_tensors(tmp_path / "merged.safetensors", merged)
    for tuned, other in (("half", "base"), ("merged", "half")):
        with pytest.raises(CheckpointError, match="only by rounding"):
            extract_lora(tmp_path / f"{tuned}.safetensors", tmp_path / f"{other}.safetensors", 4, tmp_path / "x")
    merged["layers.1.proj.weight"] = (base["layers.1.proj.weight"] + normal(48, 1) @ normal(1, 48)).bfloat16()
    save_tensors(tmp_path / "merged.safetensors", merged)
    adapter = extract_lora(tmp_path / "merged.safetensors", tmp_path / "half.safetensors", 1, tmp_path / "x")
    assert set(adapter.errors) == {"layers.1.proj"}
    assert adapter.rounding == ("layers.0.proj.weight",)
    assert "no more than rounding" in " ".join(adapter.notes())


def test_what_layouts_skip_is_left_out_and_named(tmp_path: Path) -> None:
    base = {"a.weight": normal(6, 6), "b.weight": normal(6, 6), "norm.weight": torch.ones(6)}
    save_tensors(tmp_path / "base.safetensors", base)
    save_tensors(tmp_path / "tuned.safetensors", {name: w + normal(*w.shape, seed=4) for name, w in base.items()})
    adapter = extract_lora(
        tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", 2, tmp_path / "x", layouts={"b.*": "skip"}
    )
    assert adapter.left_out == ("b.weight",)
    assert set(json.loads((tmp_path / "x/adapter_config.json").read_text())["target_modules"]) == {"a"}


def test_where_no_linear_module_changed_the_others_are_named(tmp_path: Path) -> None:
    base = {"a.weight": normal(6, 6), "norm.weight": torch.ones(6)}
    save_tensors(tmp_path / "base.safetensors", base)
    save_tensors(tmp_path / "tuned.safetensors", base | {"norm.weight": 2 * torch.ones(6)})
    with pytest.raises(CheckpointError, match=r"nothing to extract; changed: norm\.weight"):
        extract_lora(tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", 2, tmp_path / "x")
    quantized = {"a.weight": torch.zeros(6, 6, dtype=torch.int8), "norm.weight": torch.ones(6)}
    save_tensors(tmp_path / "tuned.safetensors", quantized)
    with pytest.raises(CheckpointError, match="Dequantize"):
        extract_lora(tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", 2, tmp_path / "x")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["parametrizations", "weight_norm"])
def test_a_module_under_weight_norm_is_named_as_not_held(tmp_path: Path, form: str) -> None:
    utils = nn.utils
    norm = utils.weight_norm if form == "weight_norm" else utils.parametrizations.weight_norm
    base = nn.Sequential(nn.Linear(8, 8), norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    save_tensors(tmp_path / "base.safetensors", base.state_dict())
    with torch.no_grad():
        for p in base.parameters():
            p.mul_(1.5)
    save_tensors(tmp_path / "tuned.safetensors", base.state_dict())
    found = extract_lora(tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", 2, tmp_path / "adapter")
    old = form == "weight_norm"
    names = {f"1.weight_{k}" for k in "gv"} if old else {f"1.parametrizations.weight.original{k}" for k in "01"}
    assert set(found.left_out) == names
    tensors = load_tensors(tmp_path / "adapter" / "adapter_model.safetensors")[0]
    assert not any("parametrizations" in key or "weight_v" in key for key in tensors)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert not any("parametrizations" in module for module in config["modules_to_save"] or ())


def test_peft_refuses_these_types_of_models_and_no_others() -> None:
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from peft import LoraConfig
    from peft.tuners import tuners_utils

    def is_refused(model_type: str) -> bool:
        model = nn.Module()
        model.config = SimpleNamespace(model_type=model_type)
        try:
            tuners_utils._check_lora_target_modules_mamba(LoraConfig(), model, "out_proj")
        except ValueError:
            return True
        return False

    known = {*transformers.CONFIG_MAPPING.keys(), *MAMBA}
    assert {model_type for model_type in known if is_refused(model_type)} == set(MAMBA)


def test_many_experts_that_no_adapter_holds_are_told_by_kind_with_their_number() -> None:
    start = "model.layers"
    names = tuple(f"{start}.{i}.mlp.experts.{k}.{word}.weight" for i in range(8) for k in range(16) for word in "ud")
    adapter = Adapter(Path(), 4, {"a": 0.0}, 0.0, left_out=("norm.weight", *names))
    (note,) = (note for note in adapter.notes() if note.startswith("Changed, but not in the adapter"))
    assert "norm.weight" in note
    assert "model.layers.*.mlp.experts.*.d.weight (128)" in note
    assert note.endswith("(257 tensors)")
