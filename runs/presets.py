"""Presets: named architectures, and how they are trained. Fields that are not set are as in config.py. No torch.

A preset named after a published model is a small version of it: the same blocks in the same order, the same constants unless
they depend on the size, and about the same proportions, from the source that its comment names. Context, vocabulary and training
are ours.
"""

from dataclasses import replace
from typing import NamedTuple

from config import PRE_NORM, SANDWICH_NORM, TWO_HOP, ModelConfig, TrainConfig, look_up
from runs.experiments import experiment_preset


class Preset(NamedTuple):
    model: ModelConfig
    train: TrainConfig = TrainConfig()


LATENT = "LatentAttn(q_rank=48, kv_rank=32, rope_dim=8, v_dim=16)"
DELTA = "GatedDeltaNet(num_heads=2, head_dim=32, v_heads=4, v_dim=32)"
VALUES = "Shortcut->|->Norm->ValueAttn(residual=False, embedding=True)->+->Norm->MLP->+"
SPEEDRUN = ModelConfig(
    dim=160, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=64, max_seq_len=256, activation="ReLU2", gated=False,
    qk_norm=True, zero_init=True, tied_embeddings=False,
    layers=(f"Bigram(size=1536)->Norm->ShortConv(width=2)->|->{VALUES}", f"Shortcut->|->{PRE_NORM}", VALUES),
)  # fmt: skip

PRESETS: dict[str, Preset] = {
    # The default of train.py: speedrun, made smaller for the few minutes of a first run on an old laptop.
    "quick": Preset(
        replace(SPEEDRUN, dim=112, max_seq_len=1024),
        TrainConfig(
            batch_size=2, eval_every=150, optimizer="Muon", lr_max=0.015, muon_lr_scale=0.5, betas=(0.4, 0.99), warmup_steps=30,
            ema_decay=0.98,
        ),
    ),
    "0.5m_short_and_thick": Preset(ModelConfig(dim=128, num_layers=2, mlp_dim=352)),
    "0.5m_5foot11_and_skinnyfat": Preset(ModelConfig(dim=96, num_layers=4)),
    "0.5m_tall_and_skinny": Preset(ModelConfig(dim=64, num_layers=10, num_heads=2, num_kv_heads=1, mlp_dim=160)),
    "1m": Preset(ModelConfig(num_layers=5, mlp_dim=320)),
    "2m": Preset(ModelConfig(dim=192, num_layers=4, num_heads=6, mlp_dim=576)),
    "5m": Preset(ModelConfig(dim=256, num_layers=6, num_heads=8, mlp_dim=768), TrainConfig(lr_max=2e-3)),
    # GPT-2 (Radford et al. 2019): the MLP is 4 times as wide as the stream. Heads have 32 channels instead of 64.
    "gpt2_like": Preset(
        ModelConfig(
            num_layers=4, num_kv_heads=4, positions="learned", norm="LayerNorm", norm_bias=True, linear_bias=True,
            activation="GELU", gated=False,
        )
    ),
    # Llama 3 8B (arXiv 2407.21783, table 3): the MLP is 3.5 times as wide as the stream. 2 query heads share a key instead of
    # 4.
    "llama3_like": Preset(ModelConfig(num_layers=4, rope_theta=500_000.0, tied_embeddings=False, mlp_dim=448)),
    # Qwen3 0.6B (arXiv 2505.09388, table 1): all heads together are twice as wide as the stream, the MLP 3 times.
    "qwen3_like": Preset(
        ModelConfig(num_layers=4, head_dim=64, rope_theta=1_000_000.0, norm_eps=1e-6, mlp_dim=384, qk_norm=True)
    ),
    # Gemma 2B (arXiv 2403.08295, table 1): multi-query attention; the MLP is 8 times as wide as the stream. 4 heads instead
    # of 8.
    "gemma1_like": Preset(
        ModelConfig(
            dim=96, num_layers=4, num_kv_heads=1, mlp_dim=768, activation="GELU", embedding_scale="sqrt(dim)", norm_eps=1e-6,
        )
    ),
    # Gemma 2 27B (arXiv 2408.00118, table 1): all heads together are 8/9 as wide as the stream, the MLP 8 times; scores are
    # divided by sqrt(dim / num_heads); every other layer has a window of half the context.
    "gemma2_like": Preset(
        ModelConfig(
            dim=108, num_layers=4, head_dim=24, mlp_dim=864, activation="GELU", embedding_scale="sqrt(dim)", norm_eps=1e-6,
            attention_soft_cap=50.0, logit_soft_cap=30.0, layers=(
                SANDWICH_NORM.replace("Attn", f"Attn(window=256, query_scale={27**-0.5})"),
                SANDWICH_NORM.replace("Attn", f"Attn(query_scale={27**-0.5})"),
            ),
        )
    ),
    # Gemma 3 4B (arXiv 2503.19786, section 2): all heads together are 4/5 as wide as the stream, the MLP 4 times; 5 layers
    # have a window, the sixth has none and longer wavelengths (8 times longer still in Gemma 3). The window is 1/8 of the
    # context instead of 1/128.
    "gemma3_like": Preset(
        ModelConfig(
            dim=120, num_layers=6, head_dim=24, mlp_dim=480, activation="GELU", embedding_scale="sqrt(dim)", norm_eps=1e-6,
            qk_norm=True, layers=(
                *[SANDWICH_NORM.replace("Attn", "Attn(window=64)")] * 5,
                SANDWICH_NORM.replace("Attn", "RopeAttn(rope_theta=1000000.0)"),
            ),
        )
    ),
    # Grok-1 (https://github.com/xai-org/grok-1, run.py): 6 query heads share a key; 2 of 8 experts, weighted by their scores
    # without renormalising; logits are divided by sqrt(3). An expert is as wide as the stream instead of 5 1/3 times.
    "grok_like": Preset(
        ModelConfig(
            dim=96, num_layers=4, num_heads=6, num_kv_heads=1, mlp_dim=96, activation="GELU", attention_soft_cap=30.0,
            embedding_scale="sqrt(dim)", logit_scale=0.5773502691896257,
            layers=SANDWICH_NORM.replace("MLP", "MoE(num_experts=8, top_k=2, renormalise=False)"),
        )
    ),
    # Mixtral 8x7B (arXiv 2401.04088, table 1): 4 query heads share a key; 2 of 8 experts. An expert is as wide as the stream
    # instead of 3.5 times.
    "mixtral_like": Preset(
        ModelConfig(
            dim=96, num_layers=4, num_kv_heads=1, rope_theta=1_000_000.0, tied_embeddings=False, mlp_dim=96,
            layers=PRE_NORM.replace("MLP", "MoE(num_experts=8, top_k=2)"),
        )
    ),
    # DeepSeek-V3 (arXiv 2412.19437, section 4.2): queries and keys have half as many channels with RoPE as without; the first
    # layer is dense (3 of 61 there), the others have a shared expert. 4 of 16 experts instead of 8 of 256, half as wide as
    # the stream instead of 2/7; latents 1/3 and 1/2 as wide as the stream instead of 1/14 and 3/14; no expert groups, no
    # multi-token prediction.
    "deepseek_like": Preset(
        ModelConfig(
            dim=96, num_layers=4, num_kv_heads=4, head_dim=16, norm_eps=1e-6, tied_embeddings=False, mlp_dim=256, layers=(
                f"Norm->{LATENT}->+->Norm->MLP->+",
                *[
                    f"Norm->{LATENT}->+->Norm->MoE(mlp_dim=48, num_experts=16, top_k=4, shared_experts=1, scores='sigmoid', "
                    "renormalise=True, routed_scale=2.5, balance_loss=0.0001, bias_rate=0.001)->+"
                ] * 3,
            ),
        )
    ),
    # Snowflake Arctic (https://huggingface.co/Snowflake/snowflake-arctic-base, config.json): 7 query heads share a key; the
    # MLP is as wide as the stream; 2 experts run parallel to attention and MLP. 16 experts instead of 128, 3/7 as wide as the
    # stream instead of 2/3.
    "arctic_like": Preset(
        ModelConfig(
            dim=112, num_layers=3, num_heads=7, num_kv_heads=1, mlp_dim=112, tied_embeddings=False,
            layers=[PRE_NORM, "Norm->MoE(mlp_dim=48, num_experts=16, top_k=2)->+"],
        )
    ),
    # Mamba 130M (arXiv 2312.00752, section 3.4, and https://huggingface.co/state-spaces/mamba-130m-hf, config.json): a layer
    # is a norm and a Mamba block, whose proportions and constants are the same at every size. 7 layers instead of 24.
    "mamba_like": Preset(
        ModelConfig(num_layers=7, num_heads=1, num_kv_heads=1, positions="none", layers="Norm->Mamba->+")
    ),
    # Mamba-2 130M (arXiv 2405.21060, section 7, and https://huggingface.co/state-spaces/mamba2-130m, config.json): heads of
    # 64 channels share B and C. The state dimension is 32, a fifth of the stream's width, instead of 128, a sixth. 5 layers
    # instead of 24.
    "mamba2_like": Preset(
        ModelConfig(
            dim=160, num_layers=5, num_heads=1, num_kv_heads=1, head_dim=64, positions="none", layers="Norm->Mamba2->+",
        )
    ),
    # Mamba-2-Hybrid 8B (arXiv 2406.07887): as many MLPs as mixers, and no position encoding. One of 4 mixers is attention
    # instead of one of 7.
    "mamba2_hybrid_like": Preset(
        ModelConfig(
            num_layers=4, positions="none", mlp_dim=320, layers=(
                *[PRE_NORM.replace("Attn", "Mamba2(head_dim=64)")] * 2, PRE_NORM,
                PRE_NORM.replace("Attn", "Mamba2(head_dim=64)"),
            ),
        )
    ),
    # Griffin as in RecurrentGemma 2B (arXiv 2404.07839, table 1, and its config.json): two recurrent layers, then one of
    # multi-query attention with a window of 1/4 of the context and RoPE on half of the channels; the MLP is 3 times as wide
    # as the stream. 4 heads instead of 10, 6 layers instead of 26. The embedding scale is sqrt(dim) in bfloat16, as theirs.
    "griffin_like": Preset(
        ModelConfig(
            dim=112, num_layers=6, num_kv_heads=1, norm_eps=1e-6, linear_bias=True, mlp_dim=336, activation="GELU",
            embedding_scale=10.5625, logit_soft_cap=30.0, layers=(
                *[PRE_NORM.replace("Attn", "RGLRU")] * 2,
                PRE_NORM.replace("Attn", "RopeAttn(window=128, rope_share=0.5, linear_bias=False, out_bias=True)"),
            ),
        )
    ),
    # Megalodon 7B (arXiv 2404.08801, section 4.1, and https://github.com/XuezheMax/megalodon, mega.py): heads are 1/4 as wide
    # as the stream, values and the SwiGLU twice; a state of 16 complex numbers per channel; chunks of 1/8 of the context. One
    # head instead of 4, groups of 32 channels instead of 64. The norm before the output head is a LayerNorm instead of a
    # timestep norm.
    "megalodon_like": Preset(
        ModelConfig(
            num_layers=3, num_heads=1, num_kv_heads=1, head_dim=32, mlp_dim=256, norm="LayerNorm", norm_bias=True,
            tied_embeddings=False, layers=TWO_HOP.replace("Norm->Attn", "Megalodon(chunk=64)"),
        )
    ),
    # Gated DeltaNet (arXiv 2412.06464, section 3.4, and its code): the keys of all heads together are 3/4 as wide as the
    # stream, the values 3/2.
    "gated_deltanet_like": Preset(
        ModelConfig(
            num_layers=4, num_heads=3, num_kv_heads=3, head_dim=32, positions="none", mlp_dim=296,
            layers=PRE_NORM.replace("Attn", "GatedDeltaNet"),
        )
    ),
    # Qwen3.5 (the default sizes of Qwen3_5TextConfig in transformers): three layers of Gated DeltaNet, with keys half as wide
    # as the stream and values as wide, then one of gated attention with 4 query heads per key and RoPE on 1/4 of the
    # channels; the MLP is 3 times as wide as the stream. Here the embeddings are tied.
    "qwen3.5_like": Preset(
        ModelConfig(
            num_layers=4, num_kv_heads=1, rope_theta=10_000_000.0, norm_eps=1e-6, qk_norm=True, mlp_dim=384, layers=(
                *[PRE_NORM.replace("Attn", DELTA)] * 3,
                PRE_NORM.replace("Attn", "GatedAttn(rope_share=0.25)"),
            ),
        )
    ),
    "speedrun": Preset(
        SPEEDRUN,
        TrainConfig(
            tokenizer="bpe_tokenizer_2048", batch_size=32, batch_size_start=8, optimizer="Muon", lr_max=0.009, muon_lr_scale=0.5,
            betas=(0.4, 0.99), weight_decay=0.5, embedding_decay=0.5, warmup_steps=30, ema_decay=0.98,
            max_minutes=10.0,
        ),
    ),
}  # fmt: skip


def preset(name: str) -> Preset:
    """The preset of that name, or EXPERIMENT/PRESET. Raises ValueError with the nearest match for an unknown name.

    >>> model_config, train_config = preset("1m")
    >>> model_config.num_layers
    5
    """
    return experiment_preset(name) if "/" in name else look_up("preset", name, PRESETS)
