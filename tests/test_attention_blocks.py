"""Every attention of the menu is what its paper says: against its formula head by head, or against `transformers` and torch.

B batch, H query heads, G key/value heads, T time, K head dim.
"""

import math
from dataclasses import replace

import pytest
import torch
from errors import one_line_error
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from config import ModelConfig
from fast import ops as kernels
from model import GPT, Steps, first_of_story, visible
from modules.windows import attend_blocks, attend_spans, mean_seen

CONFIG = ModelConfig(dim=24, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, max_seq_len=1200)
BACKENDS = ("sdpa", "plain") if kernels.fingerprint() == "none" else ("sdpa", "plain", "kernel")
STORIES = first_of_story(torch.tensor([[0] * 40 + [1] * 3 + [2] * 107, [0] * 150])).int()  # (2, 150)


def build(layer: str, config: ModelConfig = CONFIG, seed: int = 0):
    """The block of a layer string, every weight away from where it begins."""
    torch.manual_seed(seed)
    (block,) = Steps(layer, config, num_residuals=1, vocab_size=61).blocks
    with torch.no_grad():
        for weight in block.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return block.eval()


def some(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def turned(x, theta, share=1.0):
    """(B, heads, T, K): channel k and k + K / 2 as a complex number, which is turned."""
    K, T = x.shape[-1], x.shape[2]
    pairs = round(share * K / 2)
    angles = torch.zeros(T, K // 2, dtype=torch.float64)
    for k in range(pairs):
        angles[:, k] = torch.arange(T) * theta ** (-k / pairs)
    z = torch.complex(*x.double().chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], dim=-1)


def projections(block, x, theta=None, share=1.0):
    """q, k and v as the block's matrices give them, in float64, turned as RoPE does."""
    B, T, _ = x.shape
    q, k, v = (
        w(x).view(B, T, heads, block.head_dim).transpose(1, 2).double()
        for w, heads in ((block.w_q, block.num_heads), (block.w_k, block.num_kv_heads), (block.w_v, block.num_kv_heads))
    )
    return (turned(q, theta, share), turned(k, theta, share), v) if theta else (q, k, v)


def attended(q, k, v, sees, bias=lambda h, t, j: 0.0, sinks=None):
    """Attention in float64, head by head; sees(b, h, t, j) says which times t see which times j.  (B, H, T, K)"""
    B, H, T, K = q.shape
    t, j = torch.arange(T)[:, None], torch.arange(T)
    out = torch.zeros(B, H, T, K, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            g = h // (H // k.shape[1])
            scores = q[b, h] @ k[b, g].T / math.sqrt(K) + bias(h, t, j)
            weights = scores.masked_fill(~sees(b, h, t, j), -math.inf).exp()
            all_weights = weights.sum(dim=1, keepdim=True) + (0.0 if sinks is None else sinks[h].double().exp())
            out[b, h] = weights / all_weights @ v[b, g]
    return out


def finished(block, mixed):
    B, H, T, K = mixed.shape
    return block.w_out(mixed.transpose(1, 2).reshape(B, T, H * K).float())


def causal(b, h, t, j):
    return (STORIES[b][t] <= j) & (j <= t)


def near(b, h, t, j):
    return causal(b, h, t, j) & (t - j < 6)


def near_or_kept(b, h, t, j):
    return causal(b, h, t, j) & ((t - j < 6) | (j < STORIES[b][t] + 3))


def strided(b, h, t, j):
    return causal(b, h, t, j) & (t - j < 6 if h < 2 else ((t - j) % 5 == 0) & (t - j < 20))


def strided_to_the_first(b, h, t, j):
    return causal(b, h, t, j) & (t - j < 7 if h < 2 else (t - j) % 7 == 0)


def in_blocks(b, h, t, j):
    return causal(b, h, t, j) & torch.isin((t - j) // 6, torch.tensor([0, 2, 9]))


def alibi(h, t, j):
    return (j - t) * 2.0 ** (-2 * (h + 1))


PATTERNS = {  # layer: which tokens see which
    "Attn": causal,
    "Attn(window=6)": near,
    "RopeAttn(window=6)": near,
    "SinkAttn": causal,
    "SinkAttn(window=6)": near,
    "SinkAttn(window=6, keep=3)": near_or_kept,
    "SinkAttn(window=6, keep=3, learned=False)": near_or_kept,
    "AlibiAttn": causal,
    "AlibiAttn(window=6)": near,
    "StridedAttn(stride=5, count=4, window=6)": strided,
    "StridedAttn(stride=7, count=None)": strided_to_the_first,
    "StridedAttn(stride=7, count=None, num_kv_heads=1)": strided_to_the_first,
    "BlockAttn(block=6, back=(9, 2))": in_blocks,
}
OTHERS = ("GatedAttn(window=6)", "DiffAttn(window=6)", "LatentAttn(window=6)", "LatentAttn", "GatedAttn(gate='head')")


@pytest.mark.parametrize("layer", PATTERNS)
def test_each_token_sees_what_the_pattern_says(layer):
    block, x = build(layer), some(2, 150, 24)
    has_rope = hasattr(block, "rope_table")
    q, k, v = projections(block, x, theta=10_000.0 if has_rope else None)
    bias = alibi if "Alibi" in layer else lambda h, t, j: 0.0
    expected = finished(block, attended(q, k, v, PATTERNS[layer], bias, getattr(block, "sinks", None)))
    torch.testing.assert_close(block(x, first=STORIES), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [*PATTERNS, *OTHERS, "Attn(window=40)", "BlockAttn(block=20, back=(1, 3))", "Attn(window=1)"])
def test_every_backend_gives_the_same_output_and_gradients(layer):
    x, d_out = some(2, 150, 24), some(2, 150, 24, seed=2)
    for first in (None, STORIES):
        results = []
        for backend in BACKENDS:
            block, leaf = build(layer, replace(CONFIG, attention=backend)), x.clone().requires_grad_()
            y = block(leaf, first=first)
            results.append([y, *torch.autograd.grad(y, [leaf, *block.parameters()], d_out)])
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("options", ["", ", learned=False", ", attention_soft_cap=1.0"])
def test_kept_tokens_of_long_sequences(options):
    """Against the mask, in stories of several lengths and in windows that begin in each of them."""
    T, window, keep = 420, 11, 3
    block, x = build(f"SinkAttn(window={window}, keep={keep}{options})"), some(2, T, 24).requires_grad_()
    times = torch.arange(T)
    stories = torch.stack([times - times % 97, (times - 200).clamp(min=0)])
    for first in (None, stories):
        begins = torch.zeros(2, T, dtype=torch.long) if first is None else first
        seen = (times <= times[:, None]) & (times >= begins[..., None])
        seen = seen & ((times > times[:, None] - window) | (times < begins[..., None] + keep))  # (2, T, T)
        q, k, v = block.project(x, block.next_rope(T, None))
        expected, got = block.attend(q, k, v, seen[:, None]), block.mix(q, k, v, first, None)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        gradients = (torch.autograd.grad(y, [x, block.w_v.weight], some(2, 4, T, 8), retain_graph=True) for y in (got, expected))
        torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_what_the_base_model_asks_for_reaches_its_variants():
    config = replace(CONFIG, attention="plain", attention_soft_cap=3.0, dropout=0.25, qk_norm=True, norm_eps=0.1)
    for layer in (*PATTERNS, "GatedAttn", "DiffAttn", "ValueAttn"):
        block = build(layer, config)
        assert (block.backend, block.soft_cap, block.dropout, block.q_norm.eps) == ("plain", 3.0, 0.25, 0.1)


def written_out(q, k, v, mask):
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    return (q @ k.mT).masked_fill(~mask, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize(
    "T, past, spans",
    [(150, 0, ((0, 5),)), (128, 0, ((0, 127),)), (97, 31, ((0, 39),)), (300, 0, ((0, 199),)), (66, 400, ((0, 70),)),
     (150, 0, ((0, 0), (33, 33), (70, 90))), (70, 0, ((0, 9), (400, 500)))],
)  # fmt: skip
def test_blocks_are_as_the_mask_that_hides_the_rest(T, past, spans):
    q, k, v, d_out = (some(2, heads, length, 8, seed=i).double() for i, (heads, length) in
                      enumerate(((4, T), (2, past + T), (2, past + T), (4, T))))  # fmt: skip
    leaves = [x.requires_grad_() for x in (q, k, v)]
    firsts = [None] if past else [None, (torch.arange(T) - torch.arange(T) % 23).expand(2, T)]
    for first in firsts:
        expected = written_out(q, k, v, visible(T, past + T, first, spans=spans))
        gradients = torch.autograd.grad(expected, leaves, d_out)
        for attend in (attend_blocks, attend_spans):
            got = attend(written_out, q, k, v, spans, first)
            torch.testing.assert_close(got, expected)
            torch.testing.assert_close(torch.autograd.grad(got, leaves, d_out), gradients)


def spent(layer: str, T: int, backend: str) -> tuple[int, int]:
    """FLOPs of forward and backward that torch counts, and bytes kept for the way back."""
    block, kept = build(layer, replace(CONFIG, attention=backend)), {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda x: x):
        y = block(some(1, T, 24))
        y.sum().backward()
    return counter.get_total_flops(), sum(kept.values())


LINEAR = (
    "Attn(window=40)", "RopeAttn(window=16)", "GatedAttn(window=16)", "DiffAttn(window=16)", "LatentAttn(window=16)",
    "AlibiAttn(window=16)", "SinkAttn(window=16)", "SinkAttn(window=16, keep=4)", "StridedAttn(stride=4, count=9)", "BlockAttn",
)  # fmt: skip


@pytest.mark.parametrize("layer", LINEAR)
def test_what_is_not_seen_costs_neither_time_nor_memory(layer):
    for backend in ("plain", "sdpa"):
        (flops, kept), (more_flops, more_kept) = (spent(layer, T, backend) for T in (600, 1200))
        assert more_flops < 2.1 * flops and more_kept < 2.1 * kept
    assert spent("Attn", 1200, "plain") > tuple(3 * cost for cost in spent("Attn", 600, "plain"))


TIGHT = [layer for layer in PATTERNS if "Strided" not in layer]  # whose heads compute nothing in vain for a single token


@pytest.mark.parametrize("layer", [*TIGHT, "GatedAttn", "GatedAttn(gate='head')", "DiffAttn", "LatentAttn(v_dim=12)"])
def test_flops_of_a_token_alone_are_those_that_torch_counts(layer):
    block = build(layer, replace(CONFIG, attention="plain"))
    with FlopCounterMode(display=False) as counter:
        block(some(1, 1, 24))
    assert block.flops_per_token(1) == counter.get_total_flops()


@pytest.mark.parametrize("layer", PATTERNS)
def test_flops_count_the_pairs_that_see_each_other(layer):
    block = build(layer)
    for T in (5, 67, 150):  # the second row of the stories is a single one
        times = torch.arange(T)
        pairs = sum(PATTERNS[layer](1, h, times[:, None], times).sum().item() for h in range(4))
        assert block.seen_per_token(T) == pytest.approx(pairs / T / 4)
        matrices = block.flops_per_token(T) - 4 * 4 * 8 * pairs / T / 4
        assert matrices == pytest.approx(2 * sum(w.numel() for w in block.parameters() if w.dim() == 2))
    assert mean_seen(10, 3) == pytest.approx((1 + 2 + 8 * 3) / 10)


def test_values_of_a_latent_cost_what_they_are_wide():
    narrow, wide = (build(f"LatentAttn(v_dim={v_dim}, rope_dim=4)") for v_dim in (5, 12))
    seen, matrices = mean_seen(100), 2 * 4 * 7 * (16 + 24)  # the rows of w_kv_up and the columns of w_out
    assert wide.flops_per_token(100) - narrow.flops_per_token(100) == pytest.approx(matrices + 2 * 4 * 7 * seen)


@pytest.mark.parametrize("theta, share", [(100.0, 1.0), (10_000.0, 0.5), (50.0, 0.0)])
def test_a_rope_of_its_own(theta, share):
    block, x = build(f"RopeAttn(rope_theta={theta}, rope_share={share})"), some(2, 150, 24)
    q, k, v = projections(block, x, theta, share)
    torch.testing.assert_close(block(x), finished(block, attended(q, k, v, lambda b, h, t, j: j <= t)), atol=1e-5, rtol=1e-5)
    without = build(f"RopeAttn(rope_theta={theta}, rope_share={share})", replace(CONFIG, positions="none"))
    still = attended(*projections(without, x), lambda b, h, t, j: j <= t)
    torch.testing.assert_close(without(x), finished(without, still), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 4, 6, 8, 12, 20])
def test_slopes_of_alibi_are_those_of_bloom(num_heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)[:, 0, 1]
    block = build(f"AlibiAttn(num_heads={num_heads}, num_kv_heads=1)")
    torch.testing.assert_close(block.slopes, theirs)


def halves(weight, turned, K):
    """Rows of heads whose first `turned` channels are turned, as theirs, in our order: pairs half a head apart."""
    pairs, still = turned // 2, (K - turned) // 2
    first, second, rest = range(pairs), range(pairs, turned), range(turned, K)
    order = torch.tensor([*first, *rest[:still], *second, *rest[still:]])
    return weight.unflatten(0, (-1, K))[:, order].flatten(0, 1)


def load(block, **weights):
    """Every weight that is not told keeps its value."""
    with torch.no_grad():
        for name, weight in weights.items():
            block.get_parameter(name).copy_(weight)


def random(module, seed: int = 3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(generator=generator).mul_(0.3)
    return module.eval()


def angles(T, width, theta=10_000.0):
    """Cosines and sines as transformers takes them.  (1, T, width)"""
    frequencies = theta ** -(torch.arange(0, width, 2) / width)
    phases = torch.outer(torch.arange(T), frequencies).repeat(1, 2)[None]
    return phases.cos(), phases.sin()


def hidden(T, window=None):
    """(1, 1, T, T): what theirs adds to the scores."""
    spans = None if window is None else ((0, window - 1),)
    return torch.zeros(T, T).masked_fill(~visible(T, T, spans=spans), -math.inf)[None, None]


def test_a_share_of_rope_is_that_of_gpt_neox():
    from transformers import GPTNeoXConfig
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention

    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25}
    config = GPTNeoXConfig(hidden_size=32, num_attention_heads=4, attention_bias=False, rope_parameters=rope)
    config._attn_implementation = "eager"
    theirs, x = random(GPTNeoXAttention(config, 0)), some(2, 70, 32)
    block = build("RopeAttn(rope_share=0.25)", replace(CONFIG, dim=32, num_kv_heads=4))
    q, k, v = theirs.query_key_value.weight.view(4, 3, 8, 32).transpose(0, 1).reshape(3, 32, 32)
    load(block, **{"w_q.weight": halves(q, 2, 8), "w_k.weight": halves(k, 2, 8), "w_v.weight": v})
    load(block, **{"w_out.weight": theirs.dense.weight})
    expected, _ = theirs(x, hidden(70), position_embeddings=angles(70, 2))
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 9])
def test_learned_sinks_are_those_of_gpt_oss(window, backend):
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

    config = GptOssConfig(hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8, attention_bias=True)
    config._attn_implementation = "eager"
    theirs, x = random(GptOssAttention(config, 0)), some(2, 70, 24).requires_grad_()
    block = build(f"SinkAttn(window={window})", replace(CONFIG, linear_bias=True, attention=backend))
    for ours, their in {"w_q": "q_proj", "w_k": "k_proj", "w_v": "v_proj", "w_out": "o_proj"}.items():
        load(block, **{f"{ours}.{name}": weight for name, weight in theirs.get_submodule(their).named_parameters()})
    load(block, sinks=theirs.sinks)
    cos_and_sin = tuple(table[..., :4] for table in angles(70, 8))
    expected, _ = theirs(x, cos_and_sin, hidden(70, window))
    got, d_out = block(x), some(2, 70, 24, seed=5)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(got, [x, block.sinks, block.w_k.weight], d_out)
    wanted = torch.autograd.grad(expected, [x, theirs.sinks, theirs.k_proj.weight], d_out)
    torch.testing.assert_close(gradients, wanted, atol=1e-4, rtol=1e-4)


def test_the_gate_is_that_of_qwen3_next():
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention

    config = Qwen3NextConfig(hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5)
    config._attn_implementation = "eager"
    theirs, x = random(Qwen3NextAttention(config, 0)), some(2, 70, 24)
    block = build("GatedAttn(qk_norm=True, rope_share=0.5)")
    q, gate = theirs.q_proj.weight.view(4, 2, 8, 24).transpose(0, 1).flatten(1, 2)
    load(block, **{"w_q.weight": halves(q, 4, 8), "w_gate.weight": gate, "w_k.weight": halves(theirs.k_proj.weight, 4, 8)})
    load(block, **{"w_v.weight": theirs.v_proj.weight, "w_out.weight": theirs.o_proj.weight})
    for ours, their in (("q_norm", theirs.q_norm), ("k_norm", theirs.k_norm)):
        load(block, **{f"{ours}.weight": halves(1 + their.weight, 4, 8)})
    expected, _ = theirs(x, angles(70, 4), hidden(70))
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


def test_a_gate_for_each_head():
    block, x = build("GatedAttn(gate='head')"), some(2, 40, 24)
    mixed = attended(*projections(block, x, 10_000.0), lambda b, h, t, j: j <= t)
    gates = torch.sigmoid(x @ block.w_gate.weight.T)  # (2, 40, 4)
    torch.testing.assert_close(block(x), finished(block, mixed * gates.transpose(1, 2)[..., None]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_differences_are_those_of_diffllama(backend):
    from transformers import DiffLlamaConfig
    from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention

    config = DiffLlamaConfig(hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5)
    config._attn_implementation = "eager"
    theirs, x = random(DiffLlamaAttention(config, 2)), some(2, 70, 24)
    block = build(f"DiffAttn(lambda_init={0.8 - 0.6 * math.exp(-0.3 * 2)})", replace(CONFIG, attention=backend))
    for ours, their in {"w_q": "q_proj", "w_k": "k_proj", "w_v": "v_proj", "w_out": "o_proj"}.items():
        load(block, **{f"{ours}.weight": theirs.get_submodule(their).weight})
    load(block, **{name: weight for name, weight in theirs.named_parameters() if name.startswith("lambda")})
    load(block, **{"norm.weight": torch.ones(16)})
    expected, _ = theirs(x, angles(70, 8), hidden(70))
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


def interleaved(weight, heads, rope_dim):
    """Rows whose last rope_dim of each head are turned as pairs of neighbours, in our order."""
    rows = weight.unflatten(0, (heads, -1))
    still, pairs = rows[:, :-rope_dim], rows[:, -rope_dim:]
    return torch.cat([still, pairs[:, 0::2], pairs[:, 1::2]], dim=1).flatten(0, 1)


@pytest.mark.parametrize("q_rank", [None, 12])
@pytest.mark.parametrize("backend", BACKENDS)
def test_latents_are_those_of_deepseek(q_rank, backend):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    config = DeepseekV3Config(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=q_rank, kv_lora_rank=10, qk_nope_head_dim=8,
        qk_rope_head_dim=6, v_head_dim=5, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs, x = random(DeepseekV3Attention(config, 0)), some(2, 70, 24).requires_grad_()
    options = f"q_rank={q_rank}, kv_rank=10, rope_dim=6, v_dim=5"
    block = build(f"LatentAttn({options})", replace(CONFIG, norm_eps=1e-6, attention=backend))
    if q_rank is None:
        load(block, **{"w_q.weight": interleaved(theirs.q_proj.weight, 4, 6)})
    else:
        load(block, **{"w_q_down.weight": theirs.q_a_proj.weight, "q_norm.weight": theirs.q_a_layernorm.weight})
        load(block, **{"w_q_up.weight": interleaved(theirs.q_b_proj.weight, 4, 6)})
    load(block, **{"w_kv_down.weight": interleaved(theirs.kv_a_proj_with_mqa.weight, 1, 6)})
    load(block, **{"kv_norm.weight": theirs.kv_a_layernorm.weight, "w_kv_up.weight": theirs.kv_b_proj.weight})
    load(block, **{"w_out.weight": theirs.o_proj.weight})
    assert sum(w.numel() for w in block.parameters()) == sum(w.numel() for w in theirs.parameters())
    expected, _ = theirs(x, angles(70, 6), hidden(70))
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)
    gradients = (torch.autograd.grad(y, x, some(2, 70, 24, seed=5))[0] for y in (block(x), expected))
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_across_to_a_memory_is_torchs_multi_head_attention(backend):
    theirs = random(torch.nn.MultiheadAttention(24, 3, kdim=10, vdim=10, bias=False, batch_first=True))
    block = build("CrossAttn(memory_dim=10, num_heads=3, num_kv_heads=3)", replace(CONFIG, attention=backend))
    load(block, **{"w_q.weight": theirs.q_proj_weight, "w_k.weight": theirs.k_proj_weight, "w_v.weight": theirs.v_proj_weight})
    load(block, **{"w_out.weight": theirs.out_proj.weight})
    x, memory = some(2, 7, 24), some(2, 13, 10, seed=2)
    torch.testing.assert_close(block(x, memory=memory), theirs(x, memory, memory)[0], atol=1e-5, rtol=1e-5)


def test_a_memory_is_read_once():
    block, x, cache = build("CrossAttn"), some(2, 5, 24), {}
    calls = []
    block.w_k.register_forward_hook(lambda *_: calls.append(1))
    memory = some(2, 13, 24, seed=2)
    steps = [block(x[:, t : t + 1], memory=memory, cache=cache) for t in range(5)]
    assert len(calls) == 1
    torch.testing.assert_close(torch.cat(steps, dim=1), block(x, memory=memory))
    one_line_error(lambda: block(x), "CrossAttn", "memory=...")
    one_line_error(lambda: block(x, memory=some(2, 13, 9)), "memory (2, 13, 9)", "(2, M, 24)")


def test_memory_comes_from_the_call_of_the_model():
    torch.manual_seed(0)
    model = GPT(replace(CONFIG, layers="Norm->Attn->+->Norm->CrossAttn(memory_dim=3)->+->Norm->MLP->+"), 61).eval()
    tokens = torch.arange(8).view(2, 4)
    outputs = [model(tokens, memory=some(2, 3, 3, seed=seed))[0] for seed in (1, 2)]
    assert not torch.allclose(*outputs)


def test_caches_hold_no_more_than_the_next_token_sees():
    x = some(2, 100, 24)
    held = {
        "Attn(window=6)": {"k": (2, 2, 5, 8), "v": (2, 2, 5, 8)},
        "SinkAttn(window=6, keep=3)": {"k": (2, 2, 8, 8), "v": (2, 2, 8, 8)},
        "StridedAttn(stride=5, count=4)": {"k": (2, 2, 15, 8), "v": (2, 2, 15, 8)},
        "StridedAttn(stride=5, count=None)": {"k": (2, 2, 100, 8), "v": (2, 2, 100, 8)},
        "BlockAttn(block=6, back=(2, 4))": {"k": (2, 2, 29, 8), "v": (2, 2, 29, 8)},
        "LatentAttn(kv_rank=10, rope_dim=6)": {"latent": (2, 100, 10), "rope_key": (2, 100, 6)},
        "LatentAttn(kv_rank=10, rope_dim=6, window=7)": {"latent": (2, 6, 10), "rope_key": (2, 6, 6)},
    }
    for layer, shapes in held.items():
        for chunks in ([100], [1] * 100, [40, 3, 57]):
            block, cache = build(layer), {}
            for piece in x.split(chunks, dim=1):
                block(piece, cache=cache)
            kept = {name: tuple(value.shape) for name, value in cache.items() if isinstance(value, torch.Tensor)}
            assert kept == shapes, layer


def test_dropout_is_for_training_and_follows_the_seed():
    for layer in (*PATTERNS, *OTHERS):
        block, without, x = build(layer, replace(CONFIG, dropout=0.3)), build(layer), some(2, 150, 24)
        torch.testing.assert_close(block(x), without(x))
        drawn = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            drawn.append(block.train()(x))
        assert torch.equal(drawn[0], drawn[1]) and not torch.allclose(drawn[0], drawn[2]), layer


@pytest.mark.parametrize("layer", ["Attn(window=6)", "SinkAttn(window=6)", "BlockAttn(block=6)", "LatentAttn(window=6)"])
def test_compile_needs_no_break(layer):
    block, x = build(layer), some(2, 150, 24)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(block, backend="eager", fullgraph=True)(x, first=STORIES), block(x, first=STORIES))


@pytest.mark.parametrize(
    "layer, words",
    [
        ("Norm->RopeAttn(rope_share=1.5)->+", ["»RopeAttn(rope_share=1.5)«", "from 0 to 1"]),
        ("Norm->RopeAttn(rope_theta=-1.0)->+", ["rope_theta=-1.0", "positive"]),
        ("Norm->GatedAttn(gate='layer')->+", ["gate='layer'", "'channel', 'head'"]),
        ("Norm->SinkAttn(keep=4)->+", ["»SinkAttn(keep=4)«", "Give a window"]),
        ("Norm->SinkAttn(keep=-1, window=4)->+", ["keep=-1", "0 for none"]),
        ("Norm->SinkAttn(learned=False)->+", ["learned=False", "no sink"]),
        ("Norm->SinkAttn(learned=1)->+", ["learned=1", "must be bool"]),
        ("Norm->DiffAttn(num_kv_heads=1)->+", ["num_kv_heads=1", "even"]),
        ("Norm->DiffAttn(lambda_init=1.0)->+", ["lambda_init=1.0", "0.8"]),
        ("Norm->LatentAttn(kv_rank=0)->+", ["kv_rank=0", "at least 1"]),
        ("Norm->LatentAttn(rope_dim=3)->+", ["rope_dim=3", "even"]),
        ("Norm->LatentAttn(v_dim=13)->+", ["v_dim=13", "head_dim + rope_dim = 12"]),
        ("Norm->LatentAttn(num_kv_heads=2)->+", ["no option 'num_kv_heads'"]),
        ("Norm->StridedAttn(stride=0)->+", ["stride=0", "at least 1"]),
        ("Norm->StridedAttn(num_heads=3, num_kv_heads=3)->+", ["num_kv_heads=3", "even"]),
        ("Norm->BlockAttn(back=(0, 1))->+", ["back=(0, 1)", "at least 1"]),
        ("Norm->BlockAttn(back=3)->+", ["back=3", "tuple"]),
        ("Norm->BlockAttn(window=8)->+", ["window=8", "block and back"]),
        ("Norm->CrossAttn(memory_dim=0)->+", ["memory_dim=0", "width of the memory"]),
        ("Norm->AlibiAttn(window=0)->+", ["window=0", "at least 1"]),
    ],
)
def test_options_that_make_no_sense_are_told_in_a_line(layer, words):
    one_line_error(lambda: GPT(replace(CONFIG, layers=layer), 61), *words)
