"""Every attention block computes what its paper says: the formula in float64 head by head, or `transformers` and torch.

B batch, H query heads, G key/value heads, T time, K head dim.
"""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from errors import one_line_error
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fast
from config import ModelConfig
from fast import build as fast_build
from model import causal_mask, masked_attention, story_starts
from modules.attention import masked_attention_with_sinks
from modules.flops import attention_flops, mean_visible
from modules.registry import accepted_kwargs, build_branch, build_model
from modules.windows import attend_blocks, attend_spans, span_mask

CONFIG = ModelConfig(dim=24, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, max_seq_len=1200)
WRITTEN_OUT = replace(CONFIG, attention_soft_cap=1e4)  # so large that it changes nothing
STORY_START = story_starts(torch.tensor([[0] * 40 + [1] * 3 + [2] * 107, [0] * 150]))  # (2, 150)
SWAPS = {"plain": fast.undo, "PyTorch alone": partial(fast.use, kernels=False), "kernels": fast.use}
if fast_build.fingerprint() == "none":
    del SWAPS["kernels"]
each_swap = pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS)


def build(layer: str, config: ModelConfig = CONFIG, swap=fast.undo, seed: int = 0):
    """The block of a layer string, with noise on every weight."""
    torch.manual_seed(seed)
    (block,) = build_branch(layer, config, vocab_size=61).blocks
    with torch.no_grad():
        for weight in block.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    swap(block)
    return block.eval()


def some(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rotate(x, theta, share=1.0):
    """RoPE: channels k and k + K / 2 as a complex number, which is rotated.  (B, heads, T, K)"""
    K, T = x.shape[-1], x.shape[2]
    pairs = round(share * K / 2)
    angles = torch.zeros(T, K // 2, dtype=torch.float64)
    for k in range(pairs):
        angles[:, k] = torch.arange(T) * theta ** (-k / pairs)
    z = torch.complex(*x.double().chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], dim=-1)


def projections(block, x, theta=None, share=1.0):
    """q, k and v of the block's matrices, in float64, rotated by RoPE."""
    B, T, _ = x.shape
    q, k, v = (
        w(x).view(B, T, heads, block.head_dim).transpose(1, 2).double()
        for w, heads in ((block.w_q, block.num_heads), (block.w_k, block.num_kv_heads), (block.w_v, block.num_kv_heads))
    )
    return (rotate(q, theta, share), rotate(k, theta, share), v) if theta else (q, k, v)


def attend(q, k, v, visible, bias=lambda h, t, j: 0.0, sinks=None):
    """Attention in float64, head by head; visible(b, h, t, j) says which times t see which times j.  (B, H, T, K)"""
    B, H, T, K = q.shape
    t, j = torch.arange(T)[:, None], torch.arange(T)
    out = torch.zeros(B, H, T, K, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            g = h // (H // k.shape[1])
            scores = q[b, h] @ k[b, g].T / math.sqrt(K) + bias(h, t, j)
            weights = scores.masked_fill(~visible(b, h, t, j), -math.inf).exp()
            normaliser = weights.sum(dim=1, keepdim=True) + (0.0 if sinks is None else sinks[h].double().exp())
            out[b, h] = weights / normaliser @ v[b, g]
    return out


def project_out(block, y):
    B, H, T, K = y.shape
    return block.w_out(y.transpose(1, 2).reshape(B, T, H * K).float())


def causal(b, h, t, j):
    return j <= t


# Which time t sees which time j in its story, with a growing window of so many tokens beside the block's own.


def everything(b, h, t, j, window):
    return t - j < window


def near(b, h, t, j, window):
    return t - j < min(6, window)


def near_or_kept(b, h, t, j, window):
    return near(b, h, t, j, window) | (j < STORY_START[b][t] + 3)


def strided(b, h, t, j, window):
    return near(b, h, t, j, window) if h < 2 else ((t - j) % 5 == 0) & (t - j < min(20, window))


def strided_to_the_first(b, h, t, j, window):
    return t - j < min(7, window) if h < 2 else ((t - j) % 7 == 0) & (t - j < window)


def in_blocks(b, h, t, j, window):
    return torch.isin((t - j) // 6, torch.tensor([0, 2, 9])) & (t - j < window)


def alibi(h, t, j):
    return (j - t) * 2.0 ** (-2 * (h + 1))


PATTERNS = {
    "Attn": everything,
    "Attn(window=6)": near,
    "RopeAttn(window=6)": near,
    "SinkAttn": everything,
    "SinkAttn(window=6)": near,
    "SinkAttn(window=6, keep=3)": near_or_kept,
    "SinkAttn(window=6, keep=3, learned=False)": near_or_kept,
    "AlibiAttn": everything,
    "AlibiAttn(window=6)": near,
    "StridedAttn(stride=5, count=4, window=6)": strided,
    "StridedAttn(stride=7, count=None)": strided_to_the_first,
    "StridedAttn(stride=7, count=None, num_kv_heads=1)": strided_to_the_first,
    "BlockAttn(block=6, back=(9, 2))": in_blocks,
}
OTHERS = ("GatedAttn(window=6)", "DiffAttn(window=6)", "LatentAttn(window=6)", "LatentAttn", "GatedAttn(gate='head')")


@pytest.mark.parametrize("window", [None, 4, 13])
@pytest.mark.parametrize("layer", PATTERNS)
@torch.no_grad()
def test_a_token_sees_the_pattern_in_the_narrower_window(layer, window):
    def visible(b, h, t, j):
        return (STORY_START[b][t] <= j) & (j <= t) & PATTERNS[layer](b, h, t, j, window or 150)

    block, x = build(layer), some(2, 150, 24)
    q, k, v = projections(block, x, theta=10_000.0 if hasattr(block, "rope_table") else None)
    bias = alibi if "Alibi" in layer else lambda h, t, j: 0.0
    expected = project_out(block, attend(q, k, v, visible, bias, getattr(block, "sinks", None)))
    for swap in SWAPS.values():
        swap(block)
        torch.testing.assert_close(block(x, story_start=STORY_START, window=window), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 4])
@torch.no_grad()
def test_full_attention_sees_its_whole_story_and_no_other(window):
    block, x = build("FullAttn"), some(2, 150, 24)

    def visible(b, h, t, j):
        return (STORY_START[b][t] == STORY_START[b][j]) & ((t - j).abs() < (window or 150))

    expected = project_out(block, attend(*projections(block, x), visible))
    torch.testing.assert_close(block(x, story_start=STORY_START, window=window), expected, atol=1e-5, rtol=1e-5)
    q, k, v = projections(block, x)
    alone = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(block(x), project_out(block, alone), atol=1e-5, rtol=1e-5)


WINDOWED = ("Attn", "RopeAttn", "GatedAttn", "DiffAttn", "LatentAttn", "SinkAttn", "AlibiAttn", "ValueAttn", "FullAttn")


@pytest.mark.parametrize("name", WINDOWED)
@torch.no_grad()
def test_a_growing_window_equals_the_option_window(name):
    def run(own, window):
        block, tokens = build(f"{name}(window={own})"), torch.arange(300).view(2, 150) % 61
        more = accepted_kwargs(block, tokens=tokens, shared={})
        return block(some(2, 150, 24), story_start=STORY_START, window=window, **more)

    for own, window, narrower in ((None, 7, 7), (7, 3, 3), (3, 7, 3)):
        torch.testing.assert_close(run(own, window), run(narrower, None))


@pytest.mark.parametrize("layer", [*PATTERNS, *OTHERS, "Attn(window=40)", "BlockAttn(block=20, back=(1, 3))", "Attn(window=1)"])
def test_every_swap_gives_the_same_output_and_gradients(layer):
    x, d_out = some(2, 150, 24), some(2, 150, 24, seed=2)
    for story_start in (None, STORY_START):
        for config in (CONFIG, WRITTEN_OUT):
            results = []
            for swap in SWAPS.values():
                block, leaf = build(layer, config, swap), x.clone().requires_grad_()
                y = block(leaf, story_start=story_start)
                results.append([y, *torch.autograd.grad(y, [leaf, *block.parameters()], d_out)])
            for result in results[1:]:
                torch.testing.assert_close(result, results[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("options", ["", ", learned=False", ", attention_soft_cap=1.0"])
def test_kept_tokens_of_long_sequences_equal_the_mask(options):
    """In stories of several lengths, and with windows that start in each of them."""
    T, window, keep = 420, 11, 3
    block, x = build(f"SinkAttn(window={window}, keep={keep}{options})"), some(2, T, 24).requires_grad_()
    times = torch.arange(T)
    for story_start in (None, torch.stack([times - times % 97, (times - 200).clamp(min=0)])):
        start = torch.zeros(2, T, 1) if story_start is None else story_start[..., None]
        is_near_or_kept = (times > times[:, None] - window) | (times < start + keep)
        mask = (is_near_or_kept & (times <= times[:, None]) & (times >= start))[:, None]  # (2, 1, T, T)
        q, k, v = block.project(x, block.next_rope(T, None))
        if block.sinks is None:
            expected = masked_attention(q, k, v, mask, block.soft_cap)
        else:
            expected = masked_attention_with_sinks(q, k, v, mask, block.sinks, block.soft_cap)
        y = block.attend(q, k, v, story_start, None, None)
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
        d_y = some(2, 4, T, 8)
        gradients = (torch.autograd.grad(out, [x, block.w_v.weight], d_y, retain_graph=True) for out in (y, expected))
        torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_options_of_the_base_attention_reach_its_variants():
    config = replace(CONFIG, attention_soft_cap=3.0, dropout=0.25, qk_norm=True, norm_eps=0.1)
    for layer in (*PATTERNS, "GatedAttn", "DiffAttn", "ValueAttn"):
        block = build(layer, config)
        assert (block.soft_cap, block.dropout, block.q_norm.eps) == (3.0, 0.25, 0.1)


def written_out(q, k, v, mask):
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    return (q @ k.mT).masked_fill(~mask, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize(
    "T, past, spans",
    [(150, 0, ((0, 5),)), (128, 0, ((0, 127),)), (97, 31, ((0, 39),)), (300, 0, ((0, 199),)), (66, 400, ((0, 70),)),
     (150, 0, ((0, 0), (33, 33), (70, 90))), (70, 0, ((0, 9), (400, 500)))],
)  # fmt: skip
def test_attention_in_blocks_equals_the_mask(T, past, spans):
    q, k, v, d_out = (some(2, heads, length, 8, seed=i).double() for i, (heads, length) in
                      enumerate(((4, T), (2, past + T), (2, past + T), (4, T))))  # fmt: skip
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for story_start in [None] if past else [None, (torch.arange(T) - torch.arange(T) % 23).expand(2, T)]:
        expected = written_out(q, k, v, span_mask(T, past + T, spans, story_start))
        gradients = torch.autograd.grad(expected, leaves, d_out)
        for attend_in_spans in (attend_blocks, attend_spans):
            y = attend_in_spans(written_out, q, k, v, spans, story_start)
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(torch.autograd.grad(y, leaves, d_out), gradients)


def cost(layer: str, T: int, config: ModelConfig) -> tuple[int, int]:
    """FLOPs forward and backward as torch counts them, and bytes saved for the backward pass."""
    block, saved = build(layer, config, swap=SWAPS["PyTorch alone"]), {}

    def save(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), saved_tensors_hooks(save, lambda x: x):
        y = block(some(1, T, 24))
        y.sum().backward()
    return counter.get_total_flops(), sum(saved.values())


LINEAR = (
    "Attn(window=40)", "RopeAttn(window=16)", "GatedAttn(window=16)", "DiffAttn(window=16)", "LatentAttn(window=16)",
    "AlibiAttn(window=16)", "SinkAttn(window=16)", "SinkAttn(window=16, keep=4)", "StridedAttn(stride=4, count=9)", "BlockAttn",
)  # fmt: skip


@pytest.mark.parametrize("config", [CONFIG, WRITTEN_OUT], ids=["fused", "written out"])
@pytest.mark.parametrize("layer", LINEAR)
def test_a_window_is_linear_in_time_and_memory(layer, config):
    (flops, memory), (more_flops, more_memory) = (cost(layer, T, config) for T in (600, 1200))
    assert more_flops < 2.1 * flops and more_memory < 2.1 * memory


def test_without_a_window_attention_is_quadratic():
    assert all(more > 3 * less for more, less in zip(cost("Attn", 1200, CONFIG), cost("Attn", 600, CONFIG), strict=True))


TIGHT = [layer for layer in PATTERNS if "Strided" not in layer]  # which compute nothing in vain for a single token


def flops_per_token(block, T: int) -> float:
    return block.flops_per_token(T) if hasattr(block, "flops_per_token") else attention_flops(block, T)


@pytest.mark.parametrize("layer", [*TIGHT, "FullAttn", "GatedAttn", "GatedAttn(gate='head')", "DiffAttn", "LatentAttn(v_dim=12)"])
def test_flops_of_a_single_token_are_those_torch_counts(layer):
    block = build(layer, WRITTEN_OUT)
    with FlopCounterMode(display=False) as counter:
        block(some(1, 1, 24))
    assert flops_per_token(block, 1) == counter.get_total_flops()


@pytest.mark.parametrize("layer", PATTERNS)
def test_flops_count_the_pairs_that_see_each_other(layer):
    block = build(layer)
    matrices = sum(weight.numel() for weight in block.parameters() if weight.dim() == 2)
    for T in (5, 67, 150):  # the second row is a single story
        times = torch.arange(T)
        t, j = times[:, None], times
        pairs = sum((PATTERNS[layer](1, h, t, j, 150) & (j <= t)).sum().item() for h in range(4))
        assert flops_per_token(block, T) == pytest.approx(2 * matrices + 4 * 8 * pairs / T)
    assert mean_visible(10, 3) == pytest.approx((1 + 2 + 8 * 3) / 10)
    assert build("FullAttn").visible_per_token(10) == 10
    assert build("FullAttn(window=3)").visible_per_token(10) == pytest.approx((3 + 4 + 6 * 5 + 4 + 3) / 10)


def test_the_flops_of_a_latent_follow_the_width_of_its_values():
    narrow, wide = (build(f"LatentAttn(v_dim={v_dim}, rope_dim=4)") for v_dim in (5, 12))
    matrices = 2 * 4 * 7 * (16 + 24)  # the rows of w_kv_up and the columns of w_out
    assert wide.flops_per_token(100) - narrow.flops_per_token(100) == pytest.approx(matrices + 2 * 4 * 7 * mean_visible(100))


@pytest.mark.parametrize("theta, share", [(100.0, 1.0), (10_000.0, 0.5), (50.0, 0.0)])
@torch.no_grad()
def test_an_own_rope_is_the_formula(theta, share):
    block, x = build(f"RopeAttn(rope_theta={theta}, rope_share={share})"), some(2, 150, 24)
    expected = project_out(block, attend(*projections(block, x, theta, share), causal))
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)
    without = build(f"RopeAttn(rope_theta={theta}, rope_share={share})", replace(CONFIG, positions="none"))
    expected = project_out(without, attend(*projections(without, x), causal))
    torch.testing.assert_close(without(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 4, 6, 8, 12, 20])
def test_slopes_of_alibi_are_those_of_bloom(num_heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)[:, 0, 1]
    block = build(f"AlibiAttn(num_heads={num_heads}, num_kv_heads=1)")
    torch.testing.assert_close(block.slopes, theirs)


def halves(weight, rotated, K):
    """Rows of heads whose first `rotated` channels have RoPE, reordered to ours: pairs half a head apart."""
    pairs, fixed_pairs = rotated // 2, (K - rotated) // 2
    first, second, fixed = range(pairs), range(pairs, rotated), range(rotated, K)
    order = torch.tensor([*first, *fixed[:fixed_pairs], *second, *fixed[fixed_pairs:]])
    return weight.unflatten(0, (-1, K))[:, order].flatten(0, 1)


def load(block, **weights):
    """Copy these weights into the block; the others keep their values."""
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
    """Cosines and sines as transformers takes them, each (1, T, width)."""
    frequencies = theta ** -(torch.arange(0, width, 2) / width)
    phases = torch.outer(torch.arange(T), frequencies).repeat(1, 2)[None]
    return phases.cos(), phases.sin()


def added_mask(T, window=None):
    """What transformers adds to the scores.  (1, 1, T, T)"""
    return torch.zeros(T, T).masked_fill(~causal_mask(T, T, window=window), -math.inf)[None, None]


def test_partial_rope_is_that_of_gpt_neox():
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
    expected, _ = theirs(x, added_mask(70), position_embeddings=angles(70, 2))
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


@each_swap
@pytest.mark.parametrize("config", [CONFIG, WRITTEN_OUT], ids=["fused", "written out"])
@pytest.mark.parametrize("window", [None, 9])
def test_learned_sinks_are_those_of_gpt_oss(window, config, swap):
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

    their_config = GptOssConfig(hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8, attention_bias=True)
    their_config._attn_implementation = "eager"
    theirs, x = random(GptOssAttention(their_config, 0)), some(2, 70, 24).requires_grad_()
    block = build(f"SinkAttn(window={window})", replace(config, linear_bias=True), swap)
    for ours, name in {"w_q": "q_proj", "w_k": "k_proj", "w_v": "v_proj", "w_out": "o_proj"}.items():
        load(block, **{f"{ours}.{kind}": weight for kind, weight in theirs.get_submodule(name).named_parameters()})
    load(block, sinks=theirs.sinks)
    cos_and_sin = tuple(table[..., :4] for table in angles(70, 8))
    expected, _ = theirs(x, cos_and_sin, added_mask(70, window))
    y, d_out = block(x), some(2, 70, 24, seed=5)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(y, [x, block.sinks, block.w_k.weight], d_out)
    their_gradients = torch.autograd.grad(expected, [x, theirs.sinks, theirs.k_proj.weight], d_out)
    torch.testing.assert_close(gradients, their_gradients, atol=1e-4, rtol=1e-4)


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
    for name, norm in (("q_norm", theirs.q_norm), ("k_norm", theirs.k_norm)):
        load(block, **{f"{name}.weight": halves(1 + norm.weight, 4, 8)})
    expected, _ = theirs(x, angles(70, 4), added_mask(70))
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


def test_a_gate_for_each_head_multiplies_its_output():
    block, x = build("GatedAttn(gate='head')"), some(2, 40, 24)
    y = attend(*projections(block, x, 10_000.0), causal)
    gates = torch.sigmoid(x @ block.w_gate.weight.T)  # (2, 40, 4)
    torch.testing.assert_close(block(x), project_out(block, y * gates.transpose(1, 2)[..., None]), atol=1e-5, rtol=1e-5)


@each_swap
def test_differences_are_those_of_diffllama(swap):
    from transformers import DiffLlamaConfig
    from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention

    config = DiffLlamaConfig(hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5)
    config._attn_implementation = "eager"
    theirs, x = random(DiffLlamaAttention(config, 2)), some(2, 70, 24)
    block = build(f"DiffAttn(lambda_init={0.8 - 0.6 * math.exp(-0.3 * 2)})", swap=swap)
    for ours, name in {"w_q": "q_proj", "w_k": "k_proj", "w_v": "v_proj", "w_out": "o_proj"}.items():
        load(block, **{f"{ours}.weight": theirs.get_submodule(name).weight})
    load(block, **{name: weight for name, weight in theirs.named_parameters() if name.startswith("lambda")})
    load(block, **{"norm.weight": torch.ones(16)})
    expected, _ = theirs(x, angles(70, 8), added_mask(70))
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


def interleaved(weight, heads, rope_dim):
    """Rows of heads whose last rope_dim channels are rotated as pairs of neighbours, reordered to ours."""
    rows = weight.unflatten(0, (heads, -1))
    fixed, pairs = rows[:, :-rope_dim], rows[:, -rope_dim:]
    return torch.cat([fixed, pairs[:, 0::2], pairs[:, 1::2]], dim=1).flatten(0, 1)


@pytest.mark.parametrize("q_rank", [None, 12])
@each_swap
def test_latents_are_those_of_deepseek(q_rank, swap):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    config = DeepseekV3Config(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=q_rank, kv_lora_rank=10, qk_nope_head_dim=8,
        qk_rope_head_dim=6, v_head_dim=5, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs, x = random(DeepseekV3Attention(config, 0)), some(2, 70, 24).requires_grad_()
    options = f"q_rank={q_rank}, kv_rank=10, rope_dim=6, v_dim=5"
    block = build(f"LatentAttn({options})", replace(CONFIG, norm_eps=1e-6), swap)
    if q_rank is None:
        load(block, **{"w_q.weight": interleaved(theirs.q_proj.weight, 4, 6)})
    else:
        load(block, **{"w_q_down.weight": theirs.q_a_proj.weight, "q_norm.weight": theirs.q_a_layernorm.weight})
        load(block, **{"w_q_up.weight": interleaved(theirs.q_b_proj.weight, 4, 6)})
    load(block, **{"w_kv_down.weight": interleaved(theirs.kv_a_proj_with_mqa.weight, 1, 6)})
    load(block, **{"kv_norm.weight": theirs.kv_a_layernorm.weight, "w_kv_up.weight": theirs.kv_b_proj.weight})
    load(block, **{"w_out.weight": theirs.o_proj.weight})
    assert sum(w.numel() for w in block.parameters()) == sum(w.numel() for w in theirs.parameters())
    expected, _ = theirs(x, angles(70, 6), added_mask(70))
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)
    gradients = (torch.autograd.grad(out, x, some(2, 70, 24, seed=5))[0] for out in (block(x), expected))
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", [CONFIG, WRITTEN_OUT], ids=["fused", "written out"])
def test_cross_attention_is_torchs_multi_head_attention(config):
    theirs = random(torch.nn.MultiheadAttention(24, 3, kdim=10, vdim=10, bias=False, batch_first=True))
    block = build("CrossAttn(memory_dim=10, num_heads=3, num_kv_heads=3)", config)
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
    assert not block(x).any(), "without a memory it adds nothing"
    one_line_error(lambda: block(x, memory=some(2, 13, 9)), "memory (2, 13, 9)", "(2, M, 24)")


def test_the_memory_is_that_of_the_models_call():
    torch.manual_seed(0)
    model = build_model(replace(CONFIG, layers="Norm->Attn->+->Norm->CrossAttn(memory_dim=3)->+->Norm->MLP->+"), 61).eval()
    tokens = torch.arange(8).view(2, 4)
    outputs = [model(tokens, memory=some(2, 3, 3, seed=seed))[0] for seed in (1, 2)]
    assert not torch.allclose(*outputs)


def test_caches_hold_no_more_than_the_next_token_sees():
    x = some(2, 100, 24)
    expected = {
        "Attn(window=6)": {"k": (2, 2, 5, 8), "v": (2, 2, 5, 8)},
        "SinkAttn(window=6, keep=3)": {"k": (2, 2, 8, 8), "v": (2, 2, 8, 8)},
        "StridedAttn(stride=5, count=4)": {"k": (2, 2, 15, 8), "v": (2, 2, 15, 8)},
        "StridedAttn(stride=5, count=None)": {"k": (2, 2, 100, 8), "v": (2, 2, 100, 8)},
        "BlockAttn(block=6, back=(2, 4))": {"k": (2, 2, 29, 8), "v": (2, 2, 29, 8)},
        "LatentAttn(kv_rank=10, rope_dim=6)": {"latent": (2, 100, 10), "rope_key": (2, 100, 6)},
        "LatentAttn(kv_rank=10, rope_dim=6, window=7)": {"latent": (2, 6, 10), "rope_key": (2, 6, 6)},
    }
    for layer, shapes in expected.items():
        for chunks in ([100], [1] * 100, [40, 3, 57]):
            block, cache = build(layer), {}
            for piece in x.split(chunks, dim=1):
                block(piece, cache=cache)
            cached = {name: tuple(value.shape) for name, value in cache.items() if isinstance(value, torch.Tensor)}
            assert cached == shapes, layer


def test_dropout_is_for_training_and_follows_the_seed():
    for layer in (*PATTERNS, *OTHERS):
        block, without, x = build(layer, replace(CONFIG, dropout=0.3)), build(layer), some(2, 150, 24)
        torch.testing.assert_close(block(x), without(x))
        outputs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outputs.append(block.train()(x))
        assert torch.equal(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2]), layer


@each_swap
@pytest.mark.parametrize("layer", ["Attn(window=6)", "SinkAttn(window=6)", "BlockAttn(block=6)", "LatentAttn(window=6)"])
def test_compile_needs_no_graph_break(layer, swap):
    block, x = build(layer, swap=swap), some(2, 70, 24)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    for window in (None, 4):
        given = {"story_start": STORY_START[:, :70], "window": window}
        torch.testing.assert_close(compiled(x, **given), block(x, **given))


@pytest.mark.parametrize(
    "layer, words",
    [
        ("Norm->RopeAttn(rope_share=1.5)->+", ["»RopeAttn(rope_share=1.5)«", "from 0 to 1"]),
        ("Norm->RopeAttn(rope_theta=-1.0)->+", ["rope_theta=-1.0", "positive"]),
        ("Norm->RopeAttn(rope_scaling={'type': 'ntk'})->+", ["'ntk'", "linear, llama3, yarn"]),
        ("Norm->RopeAttn(rope_scaling={'type': 'linear'})->+", ["a positive number as 'factor'"]),
        ("Norm->RopeAttn(rope_scaling={'type': 'linear', 'factor': 2, 'by': 3})->+", ["no option 'by'", "factor"]),
        ("Norm->LatentAttn(query_scale=0.0)->+", ["query_scale=0.0", "positive"]),
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
def test_bad_options_are_one_line(layer, words):
    one_line_error(lambda: build_model(replace(CONFIG, layers=layer), 61), *words)
