"""The families: models of public libraries, tiny and at random, each with a batch of its library's own kind.

A row says which class of which library, with which numbers, and what a batch is. Nothing is downloaded. A model is
built and its batch drawn from a seed, and the global generator is left as it was.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 96
LENGTH = 12
SAMPLES = 6
NUM_CLASSES = 5
SIZE = 32


@dataclass(frozen=True)
class Family:
    """One model of one library.

    Args:
        name: of the row.
        library: that has to be installed.
        make: the model.
        make_batch: a batch as the library's users have it.
        loss: `(model, batch) -> scalar mean`.
        small: whether it belongs to the part that the quick tests run.
    """

    name: str
    library: str
    make: Callable[[], nn.Module]
    make_batch: Callable[[], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    small: bool = False

    def model(self, seed: int = 0) -> nn.Module:
        """The model from a seed, in evaluation mode, so that no dropout hides what a step does."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.make().float().eval()

    def batch(self, seed: int = 0) -> Any:
        """The batch from a seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed + 1)
            return self.make_batch()


def library(name: str) -> Any:
    """A library, imported, after torchvision, which the others import too where it is installed."""
    if importlib.util.find_spec("torchvision"):
        import_torchvision()
    return importlib.import_module(name)


@cache
def import_torchvision() -> None:
    """Imports torchvision also where its compiled operators do not fit the installed torch.

    The wheels of the package index are compiled against CUDA. Beside a CPU build of torch their operators are missing,
    which no model needs; only what registers them must be passed over.
    """
    register = torch.library.register_fake

    def register_known(op: Any, *args: Any, **kwargs: Any) -> Any:
        return (lambda f: f) if str(op).startswith("torchvision::") else register(op, *args, **kwargs)

    torch.library.register_fake = register_known
    try:
        importlib.import_module("torchvision")
    finally:
        torch.library.register_fake = register


# ---- losses and batches --------------------------------------------------------------------------------------------


def own_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The loss that the model computes itself from the batch's labels."""
    return model(**batch).loss


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    output = model(batch[0])
    scores = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(scores.flatten(0, -2), batch[1].flatten())


def squared_error(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "target"}
    return F.mse_loss(model(**inputs).sample, batch["target"])


def tokens() -> dict[str, Tensor]:
    """Tokens of lengths that differ, padded on the right."""
    ids = torch.randint(3, VOCABULARY, (SAMPLES, LENGTH))
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH] * (SAMPLES - 2) + [LENGTH - 3, LENGTH - 5])[:, None]
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def text() -> dict[str, Tensor]:
    """For language models: each token is a label, padding is none."""
    batch = tokens()
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def full_text() -> dict[str, Tensor]:
    """The same without padding, for models that take no mask."""
    ids = torch.randint(3, VOCABULARY, (SAMPLES, LENGTH))
    return {"input_ids": ids, "labels": ids}


def masked_text() -> dict[str, Tensor]:
    """For masked language models: some tokens are hidden, and only they are labels."""
    batch = tokens()
    hidden = (torch.rand(SAMPLES, LENGTH) < 0.3) & (batch["attention_mask"] == 1)
    hidden[:, 0] = True
    labels = batch["input_ids"].masked_fill(~hidden, -100)
    return batch | {"input_ids": batch["input_ids"].masked_fill(hidden, 2), "labels": labels}


def classified_text() -> dict[str, Tensor]:
    return tokens() | {"labels": torch.randint(0, NUM_CLASSES, (SAMPLES,))}


def images(size: int = SIZE, channels: int = 3) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(SAMPLES, channels, size, size),
        "labels": torch.randint(0, NUM_CLASSES, (SAMPLES,)),
    }


def pairs(size: int = SIZE) -> tuple[Tensor, Tensor]:
    batch = images(size)
    return batch["pixel_values"], batch["labels"]


def captions() -> dict[str, Any]:
    return tokens() | {"pixel_values": images()["pixel_values"], "return_loss": True}


def speech() -> dict[str, Tensor]:
    return {"input_features": torch.randn(SAMPLES, 8, 24), "labels": torch.randint(3, VOCABULARY, (SAMPLES, LENGTH))}


def waves() -> dict[str, Tensor]:
    return {
        "input_values": torch.randn(SAMPLES, 400),
        "attention_mask": torch.ones(SAMPLES, 400, dtype=torch.long),
        "labels": torch.randint(3, 20, (SAMPLES, 4)),
    }


def next_tokens() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH + 1))
    return ids[:, :-1], ids[:, 1:]


def noisy() -> dict[str, Any]:
    """For diffusion: a noisy image, the time, and the noise."""
    shape = (SAMPLES, 3, 16, 16)
    batch = {"sample": torch.randn(shape), "timestep": torch.randint(0, 1000, (SAMPLES,))}
    return batch | {"target": torch.randn(shape)}


def noisy_classes() -> dict[str, Any]:
    """The same for a model that is told the class of the image."""
    batch = {"hidden_states" if name == "sample" else name: value for name, value in noisy().items()}
    return batch | {"class_labels": torch.randint(0, 10, (SAMPLES,))}


# ---- models --------------------------------------------------------------------------------------------------------


def transformers_model(cls: str, config: str, numbers: dict[str, Any]) -> nn.Module:
    transformers = library("transformers")
    return getattr(transformers, cls)(getattr(transformers, config)(**numbers))


def hf(
    name: str, cls: str, config: str, batch: Callable[[], Any] = text, *, small: bool = False, **numbers: Any
) -> Family:
    """A row of transformers: a class, its config, and the numbers that differ from those of `SMALL`."""
    return Family(name, "transformers", partial(transformers_model, cls, config, numbers), batch, own_loss, small)


def timm_model(name: str, **numbers: Any) -> nn.Module:
    return library("timm").create_model(name, num_classes=NUM_CLASSES, **numbers)


def mixer() -> nn.Module:
    library("timm")
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(NUM_CLASSES, SIZE, patch_size=8, num_blocks=2, embed_dim=32)


def torchvision_model(name: str, **numbers: Any) -> nn.Module:
    models = library("torchvision").models
    return getattr(models, name)(weights=None, num_classes=NUM_CLASSES, **numbers)


def image_model(name: str, source: str, size: int = SIZE, *, call: str = "", **numbers: Any) -> Family:
    make = {"timm": timm_model, "torchvision": torchvision_model}[source]
    return Family(name, source, partial(make, call or name, **numbers), partial(pairs, size), cross_entropy)


def inverted_residuals(version: int) -> nn.Module:
    """torchvision's MobileNets with few blocks."""
    library("torchvision")
    if version == 2:
        from torchvision.models import MobileNetV2

        return MobileNetV2(NUM_CLASSES, width_mult=0.25, inverted_residual_setting=[[1, 16, 1, 1], [4, 24, 2, 2]])
    from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

    blocks = [
        InvertedResidualConfig(16, 3, 32, 16, True, "RE", 2, 1, 1.0),
        InvertedResidualConfig(16, 3, 48, 24, True, "HS", 1, 1, 1.0),
    ]
    return MobileNetV3(blocks, 32, NUM_CLASSES)


def efficient_net() -> nn.Module:
    library("torchvision")
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    blocks = [MBConvConfig(1, 3, 1, 32, 16, 1), MBConvConfig(4, 3, 2, 16, 24, 2)]
    return EfficientNet(blocks, 0.0, num_classes=NUM_CLASSES, last_channel=64)


def dense_net() -> nn.Module:
    return library("torchvision").models.DenseNet(8, (2, 2), 16, num_classes=NUM_CLASSES)


def google_net() -> nn.Module:
    """Two of GoogLeNet's modules, whose branches are convolutions of different sizes."""
    library("torchvision")
    from torchvision.models.googlenet import BasicConv2d, Inception

    return nn.Sequential(
        BasicConv2d(3, 16, kernel_size=7, stride=2, padding=3),
        Inception(16, 8, 8, 16, 4, 8, 8),
        nn.MaxPool2d(3, stride=2),
        Inception(40, 8, 8, 16, 4, 8, 8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(40, NUM_CLASSES),
    )


def regnet() -> nn.Module:
    library("torchvision")
    from torchvision.models.regnet import BlockParams, RegNet

    return RegNet(BlockParams.from_init_params(2, 16, 8.0, 2.0, 8, se_ratio=0.25), NUM_CLASSES, stem_width=16)


def diffusers_model(cls: str, **numbers: Any) -> nn.Module:
    return getattr(library("diffusers"), cls)(**numbers)


def autoencoded(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(model(batch["sample"]).sample, batch["sample"])


def adapted(cls: str, config: str, numbers: dict[str, Any], targets: list[str], **options: Any) -> nn.Module:
    """A frozen model with a LoRA adapter, whose B starts at zero, as PEFT does it."""
    peft = library("peft")
    lora = peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(transformers_model(cls, config, numbers), lora)


class RecurrentLM(nn.Module):
    """A language model of torch's LSTM or GRU."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 24)
        self.rnn = cell(24, 32, num_layers=2, batch_first=True)
        self.decoder = nn.Linear(32, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(self.rnn(self.embed(ids))[0])


class GraphNetwork(nn.Module):
    """Nodes of one graph, classified: graph convolution, then attention over neighbors."""

    def __init__(self) -> None:
        super().__init__()
        layers = library("torch_geometric.nn")
        self.conv1 = layers.GCNConv(8, 16)
        self.conv2 = layers.GATv2Conv(16, 8, heads=2)
        self.conv3 = layers.SAGEConv(16, NUM_CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.conv1(x, edge_index).relu()
        x = self.conv2(x, edge_index).relu()
        return self.conv3(x, edge_index)


def graph() -> Any:
    x, edges = torch.randn(20, 8), torch.randint(0, 20, (2, 60))
    return library("torch_geometric.data").Data(x=x, edge_index=edges, y=torch.randint(0, NUM_CLASSES, (20,)))


def node_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch.x, batch.edge_index), batch.y)


class SentenceEncoder(nn.Module):
    """As sentence-transformers has MiniLM: BERT without its pooler in use, the mean over tokens, length one."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = transformers_model("BertModel", "BertConfig", ENCODER)

    def forward(self, **batch: Tensor) -> Tensor:
        hidden = self.bert(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def two_sentences() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return tokens(), tokens()


def contrastive(model: nn.Module, batch: tuple[dict[str, Tensor], dict[str, Tensor]]) -> Tensor:
    """Each sentence shall be nearest to its partner: the model runs twice."""
    first, second = (model(**side) for side in batch)
    return F.cross_entropy(20 * first @ second.T, torch.arange(SAMPLES))


# ---- numbers -------------------------------------------------------------------------------------------------------

TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER: dict[str, Any] = {
    **TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "use_cache": False,
}  # fmt: skip
GPT: dict[str, Any] = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS: dict[str, Any] = {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}
ENCODER: dict[str, Any] = {
    **TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "num_labels": NUM_CLASSES,
}  # fmt: skip
MLA: dict[str, Any] = {
    **DECODER, "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 4, "n_group": 2,
    "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16,
    "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 8,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIZE,
    "patch_size": 8, "num_labels": NUM_CLASSES,
}  # fmt: skip
LLAMA = {**DECODER, "tie_word_embeddings": False}
WAV2VEC2: dict[str, Any] = {
    **ENCODER, "vocab_size": 24, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0, "ctc_loss_reduction": "mean",
}  # fmt: skip
UNET: dict[str, Any] = {
    "sample_size": 16, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
}  # fmt: skip
VAE: dict[str, Any] = {
    "block_out_channels": (16, 32), "down_block_types": ("DownEncoderBlock2D",) * 2, "norm_num_groups": 8,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "sample_size": 16,
}  # fmt: skip
DIT: dict[str, Any] = {
    "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 3, "num_layers": 2, "norm_num_groups": 1,
    "sample_size": 16, "patch_size": 4, "num_embeds_ada_norm": 1000,
}  # fmt: skip
SWIN: dict[str, Any] = {"image_size": SIZE, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]}

# ---- the table -----------------------------------------------------------------------------------------------------

ROWS: tuple[Family, ...] = (
    # decoders
    hf("gpt2", "GPT2LMHeadModel", "GPT2Config", small=True, **GPT),
    hf("gpt1", "OpenAIGPTLMHeadModel", "OpenAIGPTConfig", **GPT),
    hf("gpt-bigcode", "GPTBigCodeForCausalLM", "GPTBigCodeConfig", **GPT),
    hf("gpt-neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", **DECODER),
    hf("codegen", "CodeGenForCausalLM", "CodeGenConfig", **GPT, rotary_dim=4),
    hf("bloom", "BloomForCausalLM", "BloomConfig", **TOKENS, hidden_size=32, n_layer=2, n_head=4),
    hf("opt", "OPTForCausalLM", "OPTConfig", **DECODER, ffn_dim=48, word_embed_proj_dim=32),
    hf("falcon multi-query", "FalconForCausalLM", "FalconConfig", **DECODER),
    hf("falcon", "FalconForCausalLM", "FalconConfig", **DECODER, new_decoder_architecture=True, num_kv_heads=2),
    hf("falcon per head", "FalconForCausalLM", "FalconConfig", **DECODER, multi_query=False, alibi=True, bias=True),
    hf("llama", "LlamaForCausalLM", "LlamaConfig", small=True, **LLAMA),
    hf("mistral", "MistralForCausalLM", "MistralConfig", **DECODER),
    hf("qwen2", "Qwen2ForCausalLM", "Qwen2Config", **DECODER),
    hf("qwen3", "Qwen3ForCausalLM", "Qwen3Config", **DECODER, head_dim=8),
    hf("gemma", "GemmaForCausalLM", "GemmaConfig", **DECODER, head_dim=8),
    hf("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", **DECODER, head_dim=8),
    hf("phi3", "Phi3ForCausalLM", "Phi3Config", small=True, **DECODER),
    hf("glm4", "Glm4ForCausalLM", "Glm4Config", **DECODER, head_dim=8),
    # mixtures of experts
    hf("mixtral", "MixtralForCausalLM", "MixtralConfig", small=True, **EXPERTS),
    hf(
        "qwen3-moe", "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
        **DECODER, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8,
    ),
    hf("gpt-oss", "GptOssForCausalLM", "GptOssConfig", small=True, **EXPERTS, head_dim=8),
    hf("granite-moe", "GraniteMoeForCausalLM", "GraniteMoeConfig", **EXPERTS),
    hf(
        "llama4", "Llama4ForCausalLM", "Llama4TextConfig",
        **EXPERTS | {"num_experts_per_tok": 1}, intermediate_size_mlp=64, head_dim=8, interleave_moe_layer_step=2,
    ),
    hf("deepseek-v3", "DeepseekV3ForCausalLM", "DeepseekV3Config", **MLA),
    hf(
        "switch", "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", **TOKENS, d_model=32,
        d_kv=8, d_ff=48, num_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_heads=4,
        num_experts=4, decoder_start_token_id=0, use_cache=False,
    ),
    # state spaces and linear attention
    hf("mamba", "MambaForCausalLM", "MambaConfig", full_text, **TOKENS, hidden_size=32, num_hidden_layers=2,
       state_size=4, use_cache=False),
    hf("mamba2", "Mamba2ForCausalLM", "Mamba2Config", full_text, **TOKENS, hidden_size=32, num_hidden_layers=2,
       state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=8, use_cache=False),
    hf("rwkv", "RwkvForCausalLM", "RwkvConfig", full_text, **TOKENS, hidden_size=32, num_hidden_layers=2,
       context_length=64, use_cache=False),
    # encoders, and encoders with decoders
    hf("bert", "BertForMaskedLM", "BertConfig", masked_text, small=True, **ENCODER),
    hf("roberta", "RobertaForSequenceClassification", "RobertaConfig", classified_text, **ENCODER),
    hf("distilbert", "DistilBertForSequenceClassification", "DistilBertConfig", classified_text, **TOKENS, dim=32,
       hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64, num_labels=NUM_CLASSES),
    hf("deberta-v2", "DebertaV2ForSequenceClassification", "DebertaV2Config", classified_text, **ENCODER,
       relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False, pooler_hidden_size=32),
    hf("albert", "AlbertForMaskedLM", "AlbertConfig", masked_text, **ENCODER, embedding_size=16),
    hf("electra", "ElectraForSequenceClassification", "ElectraConfig", classified_text, **ENCODER, embedding_size=16),
    hf("modernbert", "ModernBertForMaskedLM", "ModernBertConfig", masked_text, **ENCODER, local_attention=8,
       cls_token_id=1, sep_token_id=2),
    hf("t5", "T5ForConditionalGeneration", "T5Config", small=True, **TOKENS, d_model=32, d_kv=8, d_ff=48, num_layers=2,
       num_heads=4, decoder_start_token_id=0, use_cache=False),
    hf("bart", "BartForConditionalGeneration", "BartConfig", **TOKENS, d_model=32, encoder_layers=1, decoder_layers=1,
       encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
       max_position_embeddings=64, decoder_start_token_id=1, use_cache=False),
    Family("minilm", "transformers", SentenceEncoder, two_sentences, contrastive),
    # images, speech, both
    hf("vit", "ViTForImageClassification", "ViTConfig", images, small=True, **VISION),
    hf("swin", "SwinForImageClassification", "SwinConfig", images, **SWIN, window_size=4, num_labels=NUM_CLASSES),
    hf("convnext", "ConvNextForImageClassification", "ConvNextConfig", images, hidden_sizes=[16, 32], depths=[1, 1],
       num_stages=2, image_size=SIZE, num_labels=NUM_CLASSES),
    hf("resnet", "ResNetForImageClassification", "ResNetConfig", images, embedding_size=16, hidden_sizes=[16, 32],
       depths=[1, 1], num_labels=NUM_CLASSES),
    hf("clip", "CLIPModel", "CLIPConfig", captions, projection_dim=16,
       text_config={k: v for k, v in DECODER.items() if k != "num_key_value_heads"}, vision_config=VISION),
    hf("whisper", "WhisperForConditionalGeneration", "WhisperConfig", speech, **TOKENS, d_model=32, encoder_layers=1,
       decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
       num_mel_bins=8, max_source_positions=12, max_target_positions=32, decoder_start_token_id=1, use_cache=False),
    hf("wav2vec2", "Wav2Vec2ForCTC", "Wav2Vec2Config", waves, **WAV2VEC2),
    # torchvision
    Family("mobilenet-v2", "torchvision", partial(inverted_residuals, 2), pairs, cross_entropy),
    Family("mobilenet-v3", "torchvision", partial(inverted_residuals, 3), pairs, cross_entropy),
    Family("efficientnet", "torchvision", efficient_net, pairs, cross_entropy),
    image_model("shufflenet", "torchvision", call="shufflenet_v2_x0_5"),
    Family("densenet", "torchvision", dense_net, pairs, cross_entropy),
    Family("googlenet", "torchvision", google_net, pairs, cross_entropy),
    Family("regnet", "torchvision", regnet, pairs, cross_entropy),
    # timm
    image_model("timm vit", "timm", call="vit_tiny_patch16_224", img_size=SIZE, patch_size=8, embed_dim=32, depth=2,
                num_heads=4),
    image_model("timm swin", "timm", call="swin_tiny_patch4_window7_224", img_size=SIZE, window_size=4, embed_dim=16,
                depths=(1, 1), num_heads=(2, 4)),
    image_model("timm convnext", "timm", call="test_convnext3"),
    image_model("timm maxvit", "timm", 64, call="maxvit_rmlp_pico_rw_256", img_size=64, embed_dim=(32, 32),
                depths=(1, 1), stem_width=16),
    Family("timm mixer", "timm", mixer, pairs, cross_entropy),
    image_model("timm resnet", "timm", call="test_resnet"),
    image_model("timm nfnet", "timm", call="test_nfnet"),
    image_model("timm mambaout", "timm", call="test_mambaout"),
    # diffusers
    Family("unet", "diffusers", partial(diffusers_model, "UNet2DModel", **UNET), noisy, squared_error),
    Family("dit", "diffusers", partial(diffusers_model, "DiTTransformer2DModel", **DIT), noisy_classes, squared_error),
    Family("autoencoder-kl", "diffusers", partial(diffusers_model, "AutoencoderKL", **VAE), noisy, autoencoded),
    # torch and torch_geometric
    Family("lstm", "torch", partial(RecurrentLM, nn.LSTM), next_tokens, cross_entropy),
    Family("gru", "torch", partial(RecurrentLM, nn.GRU), next_tokens, cross_entropy),
    Family("graph network", "torch_geometric", GraphNetwork, graph, node_loss),
    # adapters
    Family("lora llama", "peft", partial(adapted, "LlamaForCausalLM", "LlamaConfig", LLAMA, ["q_proj", "down_proj"]),
           text, own_loss),
    Family("lora gpt2", "peft", partial(adapted, "GPT2LMHeadModel", "GPT2Config", GPT, ["c_attn"],
           fan_in_fan_out=True), text, own_loss),
)  # fmt: skip


FAMILIES: dict[str, Family] = {row.name: row for row in ROWS}
