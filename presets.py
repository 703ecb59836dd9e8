"""The named presets: an architecture, and how it is trained. What is not said is as in config.py. Nothing here needs torch.

A preset called after a published model is that model with smaller numbers: the same blocks in the same order, the same
constants where they do not depend on the size, and proportions of the model that its comment names, as far as whole
numbers allow. The context, the vocabulary and the training are ours.
"""

from typing import NamedTuple

from config import PRE_NORM, SANDWICH_NORM, ModelConfig, TrainConfig, did_you_mean


class Preset(NamedTuple):
    model: ModelConfig
    train: TrainConfig = TrainConfig()


VALUES = "Shortcut->|->Norm->ValueAttn(residual=False, embedding=True)->+->Norm->MLP->+"

PRESETS: dict[str, Preset] = {
    "0.5m_short_and_thick": Preset(ModelConfig(dim=128, num_layers=2, mlp_dim=528)),
    "0.5m_5foot11_and_skinnyfat": Preset(ModelConfig(dim=96, num_layers=4)),
    "0.5m_tall_and_skinny": Preset(ModelConfig(dim=64, num_layers=10, num_heads=2, num_kv_heads=1, mlp_dim=240)),
    "1m": Preset(ModelConfig(num_layers=5, mlp_dim=480)),
    "2m": Preset(ModelConfig(dim=192, num_layers=4, num_heads=6, mlp_dim=864)),
    "5m": Preset(ModelConfig(dim=256, num_layers=6, num_heads=8, mlp_dim=1152), TrainConfig(lr_max=2e-3)),
    # GPT-2 (Radford et al. 2019), all sizes: the MLP 4 times as wide as the stream. Fewer heads, of 32 channels instead of 64.
    "gpt2_like": Preset(
        ModelConfig(
            num_layers=4, num_kv_heads=4, positions="learned", norm="LayerNorm", norm_bias=True, linear_bias=True,
            activation="GELU", gated=False,
        )
    ),
    # Llama 3 8B (arXiv 2407.21783, table 3): the MLP 3.5 times as wide. 2 query heads share a key, there 4.
    "llama3_like": Preset(ModelConfig(num_layers=4, rope_theta=500_000.0, tied_embeddings=False, mlp_dim=672)),
    # Qwen3 0.6B (arXiv 2505.09388, table 1): heads together twice as wide as the stream, the MLP 3 times.
    "qwen3_like": Preset(
        ModelConfig(num_layers=4, head_dim=64, rope_theta=1_000_000.0, norm_eps=1e-6, mlp_dim=576, qk_norm=True)
    ),
    # Gemma 2B (arXiv 2403.08295, table 1): one key head for all queries, the MLP 8 times as wide. 4 heads instead of 8.
    "gemma1_like": Preset(
        ModelConfig(
            dim=96, num_layers=4, num_kv_heads=1, mlp_dim=1152, activation="GELU", embedding_scale="sqrt(dim)", norm_eps=1e-6,
        )
    ),
    # Gemma 2 27B (arXiv 2408.00118, table 1): heads together 8/9 as wide as the stream, the MLP 8 times; scores divided by
    # sqrt(dim / num_heads); every other layer sees half of the context.
    "gemma2_like": Preset(
        ModelConfig(
            dim=108, num_layers=4, head_dim=24, mlp_dim=1296, activation="GELU", embedding_scale="sqrt(dim)", norm_eps=1e-6,
            attention_soft_cap=50.0, logit_soft_cap=30.0, layers=(
                SANDWICH_NORM.replace("Attn", f"Attn(window=256, query_scale={27**-0.5})"),
                SANDWICH_NORM.replace("Attn", f"Attn(query_scale={27**-0.5})"),
            ),
        )
    ),
    # Gemma 3 4B (arXiv 2503.19786, section 2): heads together 4/5 as wide as the stream, the MLP 4 times; 5 layers see a
    # window, the sixth sees all and has long wavelengths. The window is an eighth of the context, there 1/128.
    "gemma3_like": Preset(
        ModelConfig(
            dim=120, num_layers=6, head_dim=24, mlp_dim=720, activation="GELU", embedding_scale="sqrt(dim)", norm_eps=1e-6,
            qk_norm=True, layers=(
                *[SANDWICH_NORM.replace("Attn", "Attn(window=64)")] * 5,
                SANDWICH_NORM.replace("Attn", "RopeAttn(rope_theta=1000000.0)"),
            ),
        )
    ),
    "grok_like": Preset(
        ModelConfig(
            num_layers=4, layers=SANDWICH_NORM, activation="GELU", attention_soft_cap=30.0, embedding_scale="sqrt(dim)",
        )
    ),
    "speedrun": Preset(
        ModelConfig(
            dim=160, num_layers=3, layers=(
                f"Bigram(size=1536)->Norm->ShortConv(width=2)->|->{VALUES}", f"Shortcut->|->{PRE_NORM}", VALUES,
            ),
            num_heads=2, num_kv_heads=1, head_dim=64, max_seq_len=256, activation="ReLU2", gated=False, qk_norm=True,
            zero_init=True, tied_embeddings=False, logit_soft_cap=15.0,
        ),
        TrainConfig(
            tokenizer="bpe_tokenizer_2048", batch_size=8, optimizer="Muon", lr_max=0.032, muon_lr_scale=0.5, warmup_steps=30,
            weight_averaging=0.98, max_minutes=10.0,
        ),
    ),
}  # fmt: skip


def preset(name: str) -> Preset:
    """The preset of that name. Raises ValueError with the nearest match for an unknown one."""
    if name not in PRESETS:
        raise ValueError(f"no preset is called {name!r}.{did_you_mean(name, PRESETS)} There are: {', '.join(PRESETS)}")
    return PRESETS[name]
