"""The table of families: which class of which library, with which numbers, and what a batch is."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from family_builders import (
    NUM_CLASSES,
    SIZE,
    VOCABULARY,
    Family,
    GraphNetwork,
    RecurrentLM,
    SentenceEncoder,
    adapted,
    autoencoded,
    captions,
    classified_text,
    contrastive,
    cross_entropy,
    dense_net,
    diffusers_model,
    efficient_net,
    full_text,
    google_net,
    graph,
    hf,
    images,
    inverted_residuals,
    masked_text,
    mixer,
    next_tokens,
    node_loss,
    noisy,
    noisy_classes,
    own_loss,
    pairs,
    regnet,
    shuffle_net,
    speech,
    squared_error,
    text,
    timm_row,
    two_sentences,
    waves,
)

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
    "sample_size": 16, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
}  # fmt: skip
VAE: dict[str, Any] = {
    "block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2, "norm_num_groups": 4,
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
    hf("mpt", "MptForCausalLM", "MptConfig", d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=64,
       vocab_size=VOCABULARY, use_cache=False),
    hf("persimmon", "PersimmonForCausalLM", "PersimmonConfig", **DECODER),
    hf("xlnet", "XLNetLMHeadModel", "XLNetConfig", **TOKENS, d_model=32, n_layer=2, n_head=4, d_inner=48,
       use_mems_eval=False),
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
    hf("recurrent-gemma", "RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", **DECODER, lru_width=32,
       attention_window_size=16, conv1d_width=4, block_types=["recurrent", "attention"]),
    hf("nemotron-h", "NemotronHForCausalLM", "NemotronHConfig", **DECODER, head_dim=8,
       hybrid_override_pattern="ME*", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_group=1,
       moe_shared_expert_intermediate_size=24, mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=2,
       topk_group=1, chunk_size=8),
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
    Family("minilm", "transformers", partial(SentenceEncoder, ENCODER), two_sentences, contrastive),
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
    Family("shufflenet", "torchvision", shuffle_net, pairs, cross_entropy),
    Family("densenet", "torchvision", dense_net, pairs, cross_entropy),
    Family("googlenet", "torchvision", google_net, pairs, cross_entropy),
    Family("regnet", "torchvision", regnet, pairs, cross_entropy),
    # timm
    timm_row("timm vit", "vit_tiny_patch16_224", img_size=SIZE, patch_size=8, embed_dim=32, depth=2,
                num_heads=4),
    timm_row("timm swin", "swin_tiny_patch4_window7_224", img_size=SIZE, window_size=4, embed_dim=16,
                depths=(1, 1), num_heads=(2, 4)),
    timm_row("timm convnext", "test_convnext3"),
    timm_row("timm maxvit", "maxvit_rmlp_pico_rw_256", 64, img_size=64, embed_dim=(32, 32),
                depths=(1, 1), stem_width=16),
    Family("timm mixer", "timm", mixer, pairs, cross_entropy),
    timm_row("timm nfnet", "test_nfnet"),
    timm_row("timm mambaout", "test_mambaout"),
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
