"""Adapters from `--extract-lora`, loaded by PEFT itself into the base, give the fine-tuned model's outputs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gramian.checkpoint import load_tensors, save_tensors
from gramian.errors import CheckpointError
from gramian.inspection import Adapter, extract_lora

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
             {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "image_size": 32, "patch_size": 4, "num_labels": 3,
              "window_size": 4}),
    "whisper": ("WhisperForConditionalGeneration", BART | {"num_mel_bins": 8, "max_source_positions": 16,
                "max_target_positions": 32, "suppress_tokens": None, "begin_suppress_tokens": None}),
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


def build(name: str) -> nn.Module:
    """A tiny model of a family with random weights; no entry of its norms and biases is 0 or 1."""
    transformers = pytest.importorskip("transformers")
    cls, arguments = FAMILIES[name]
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
    tokens = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(5))
    inputs: dict[str, Tensor] = {"input_ids": tokens}
    if model.main_input_name == "pixel_values":
        side = config.image_size if hasattr(config, "image_size") else 32
        inputs = {"pixel_values": normal(2, getattr(config, "num_channels", 3), side, side)}
    elif model.main_input_name == "input_features":
        inputs = {"input_features": normal(2, 8, 32), "decoder_input_ids": tokens}
    elif config.is_encoder_decoder and "labels" not in inputs and "Classification" not in type(model).__name__:
        inputs |= {"decoder_input_ids": tokens}
    elif "Bart" in type(model).__name__:
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
    pytest.param(name, dtype, marks=() if name in FAST and dtype == torch.float32 else pytest.mark.slow)
    for name in FAMILIES
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_base_and_adapter_are_the_fine_tuned_model(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    error, effect, adapter = restore(tmp_path, name, dtype)
    assert not adapter.left_out
    assert effect > 1e-3
    assert error <= 1e-5
