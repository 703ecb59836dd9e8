"""Promises of modules/megalodon.py: the equations of the paper, in chunks of tokens, and the two-hop residual."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from errors import one_line_error
from recurrences import check_long
from test_moving_average import average_as_written, norm_as_written

import fast
from config import TWO_HOP, ModelConfig
from fast import build as fast_build
from model import Cache, rope_table
from modules.contract import check_block
from modules.megalodon import Megalodon
from modules.registry import build_block, build_branch, build_model

D, H, K, V, N, CHUNK = 12, 2, 4, 14, 3, 7
SWAPS = {"plain": fast.undo, "PyTorch alone": partial(fast.use, kernels=False), "kernels": fast.use}
if fast_build.fingerprint() == "none":
    del SWAPS["kernels"]
each_swap = pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS)
CONFIG = ModelConfig(dim=D, num_layers=1, num_heads=H, num_kv_heads=H, head_dim=K, mlp_dim=16, max_seq_len=80)


def block(**options) -> Megalodon:
    """Noise on every weight."""
    torch.manual_seed(0)
    made = Megalodon(D, H, K, **{"chunk": CHUNK, "value_dim": V, "state_dim": N, "groups": 3} | options)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(torch.randn_like(weight) * 0.4)
    return made.eval()


def angles(T: int, start: int = 0):
    return tuple(table[None, start : start + T] for table in rope_table(start + T, K, 10_000.0))


def as_written(made: Megalodon, x: torch.Tensor) -> torch.Tensor:
    """Section 3.3 of arXiv 2404.08801 head by head, with RoPE, in float64.  (B, T, D) -> (B, T, D)"""
    w = {name: weight.detach().double() for name, weight in made.state_dict().items()}
    B, T, _ = x.shape
    normed = norm_as_written(made.timestep_norm, x)
    moved = average_as_written(made.cema, normed)
    averaged = moved / (moved.square().mean(dim=-1, keepdim=True) + made.norm.eps).sqrt() * w["norm.weight"]
    z = averaged @ w["w_z.weight"].T + w["w_z.bias"]
    v = F.silu(normed @ w["w_v.weight"].T + w["w_v.bias"])
    gate = F.silu(averaged @ w["w_gate.weight"].T + w["w_gate.bias"])
    V = made.value_dim
    mixed = torch.zeros(B, T, V, dtype=torch.float64)
    rotation = torch.complex(*(table[0].double() for table in angles(T)))
    for h in range(H):
        channels, values = slice(h * K, h * K + K), slice(h * V // H, (h + 1) * V // H)
        direction = z[..., channels] / z[..., channels].norm(dim=-1, keepdim=True)
        q = direction * w["q_gain"][channels] + w["q_bias"][channels]
        k = direction * w["k_gain"][channels] + w["k_bias"][channels]
        q, k = (torch.complex(p[..., : K // 2], p[..., K // 2 :]) * rotation for p in (q, k))
        for t in range(T):
            chunk = slice(t // CHUNK * CHUNK, t + 1)
            scores = (q[:, t, None] * k[:, chunk].conj()).real.sum(dim=-1)
            mixed[:, t, values] = (scores.softmax(dim=-1)[..., None] * v[:, chunk, values]).sum(dim=1)
    return torch.cat([averaged, gate * mixed], dim=-1) @ w["w_out.weight"].T + w["w_out.bias"]


@each_swap
@pytest.mark.parametrize("value_dim", [V, H * K])
@pytest.mark.parametrize("T", [1, 3, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
@torch.no_grad()
def test_it_computes_what_the_paper_writes(swap, value_dim, T):
    """The kernel takes values that are as wide as the keys, and leaves others to PyTorch."""
    made, x = block(value_dim=value_dim), torch.randn(2, T, D)
    expected = as_written(made, x)
    swap(made)
    torch.testing.assert_close(made(x, rope=angles(T)).double(), expected, atol=1e-4, rtol=1e-4)


def test_a_chunk_longer_than_the_sequence_is_full_attention():
    x = torch.randn(2, 20, D)
    torch.testing.assert_close(block(chunk=1000)(x), block(chunk=20)(x))
    assert not torch.allclose(block(chunk=19)(x), block(chunk=20)(x))


@torch.no_grad()
def test_the_cache_never_holds_more_than_a_chunk():
    made, T = block(), 60
    x = torch.randn(2, T, D)
    expected = made(x, rope=angles(T))
    for lengths in ([1] * T, [CHUNK] * 8 + [4], [3, 30, 1, 1, 6, 19], [T]):
        cache, outputs, start = {}, [], 0
        for tokens in x.split(lengths, dim=1):
            outputs.append(made(tokens, rope=angles(tokens.shape[1], start), cache=cache))
            start += tokens.shape[1]
            num_cached = (start - 1) % CHUNK + 1
            assert cache["k"].shape == (2, H, num_cached, K) and cache["v"].shape[2] == num_cached
        torch.testing.assert_close(torch.cat(outputs, dim=1), expected, atol=1e-4, rtol=1e-4)


@each_swap
@torch.no_grad()
def test_chunks_are_counted_from_the_start_of_a_story(swap):
    made, x = block(), torch.randn(1, 60, D)
    starts = [0, 1, 5, 26, 33, 60]
    story_start = torch.cat([torch.full((end - start,), start) for start, end in itertools.pairwise(starts)])[None]
    alone = torch.cat([made(x[:, start:end]) for start, end in itertools.pairwise(starts)], dim=1)
    swap(made)
    torch.testing.assert_close(made(x, story_start=story_start), alone, atol=1e-4, rtol=1e-4)


@each_swap
@torch.no_grad()
def test_a_window_is_within_a_chunk(swap):
    """A value reaches the tokens of its window that are in its chunk."""
    made, T, window = block(value_dim=H * K), 30, 3
    swap(made)
    q, k, v = (torch.randn(1, H, T, K) for _ in range(3))
    y = made.attend_chunks(q, k, v, None, window)
    for t in range(T):
        changed = v.clone()
        changed[:, :, t] += 1
        reached = (made.attend_chunks(q, k, changed, None, window) - y).abs().amax(dim=(0, 1, 3)) > 1e-5
        end = min(t + window, (t // CHUNK + 1) * CHUNK, T)
        assert reached.nonzero().flatten().tolist() == list(range(t, end))


def test_long_sequences_and_bfloat16_are_stable():
    check_long(block(chunk=64), torch.randn(1, 4096, D))
    made, x = block(), torch.randn(2, 200, D)
    expected = made(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
    y.float().square().mean().backward()
    assert all(weight.grad.isfinite().all() for weight in made.parameters())
    assert (y - expected).square().mean() < 0.03**2 * expected.square().mean()


@torch.no_grad()
def test_two_hops_both_add_the_input_of_the_layer():
    torch.manual_seed(0)
    branch, x = build_branch(TWO_HOP.replace("Norm->Attn", "Megalodon(chunk=7)"), CONFIG, 50).eval(), torch.randn(2, 20, D)
    _, megalodon, skip_in, norm, mlp = branch.blocks
    torch.testing.assert_close(branch(x, shared={}), x + mlp(norm(x + megalodon(x))))
    assert not list(skip_in.parameters())


@torch.no_grad()
def test_a_model_decodes_from_the_cache_as_at_once():
    torch.manual_seed(0)
    layer = TWO_HOP.replace("Norm->Attn", "Megalodon(chunk=6, state_dim=2)")
    config = ModelConfig(dim=16, num_layers=2, num_heads=1, num_kv_heads=1, head_dim=4, max_seq_len=48, layers=layer)
    model = build_model(config, 50).eval()
    tokens, cache = torch.randint(50, (2, 40)), Cache()
    expected, _ = model(tokens)
    chunks = [model(chunk, cache=cache)[0] for chunk in tokens.split([13, 1, 1, 25], dim=1)]
    torch.testing.assert_close(torch.cat(chunks, dim=1), expected, atol=1e-4, rtol=1e-4)


def test_it_is_traced_with_and_without_stories():
    torch.manual_seed(0)
    branch, x = build_branch(TWO_HOP.replace("Norm->Attn", "Megalodon(chunk=7)"), CONFIG, 50), torch.randn(2, 20, D)
    stories = None, torch.where(torch.arange(20) < 9, 0, 9).expand(2, 20)
    expected = [branch(x, story_start=story_start, shared={}) for story_start in stories]
    branch.compile(backend="eager", dynamic=False)
    for story_start, y in zip(stories, expected, strict=True):
        torch.testing.assert_close(branch(x, story_start=story_start, shared={}), y)
    torch._dynamo.reset()


def test_the_contract_holds_with_values_as_narrow_as_keys():
    check_block("Megalodon", CONFIG, "Megalodon(value_dim=8, groups=2, chunk=5)", swaps=tuple(SWAPS.values()))


def test_sizes_are_those_of_the_config_or_the_options():
    made = build_block("Megalodon", {"groups": 3}, CONFIG, vocab_size=50)
    assert made.w_v.weight.shape == (2 * D, D) and made.w_out.weight.shape == (D, 3 * D) and made.chunk == 64
    assert made.cema.alpha.shape == (D, 16)


def test_bad_options_are_one_line():
    for options, words in (
        ({"chunk": 0}, ("chunk=0",)), ({"value_dim": 0}, ("value_dim=0",)), ({"value_dim": 7}, ("value_dim=7", "num_heads=2")),
        ({"state_dim": 0}, ("state_dim=0",)), ({"groups": 5}, ("groups=5", "dim=12")),
    ):  # fmt: skip
        one_line_error(lambda options=options: block(**options), *words)
    one_line_error(lambda: build_branch("Megalodon(chunk=0)->+", CONFIG, 50), "»Megalodon(chunk=0)«", "chunk=0")


def test_a_state_of_another_batch_size_is_an_error():
    made, cache = block(), {}
    made(torch.randn(2, 3, D), cache=cache)
    one_line_error(lambda: made(torch.randn(3, 1, D), cache=cache), "state of 2", "x has 3")


def test_flops_count_the_pairs_of_tokens_in_a_chunk():
    made = block()
    matrices = D * (H * K + 2 * V) + (D + V) * D
    pairs = {1: 1, CHUNK: (CHUNK + 1) / 2, 2 * CHUNK + 1: (CHUNK * (CHUNK + 1) + 1) / (2 * CHUNK + 1)}
    for T, visible in pairs.items():
        expected = 2 * matrices + 2 * visible * (H * K + V) + made.cema.flops_per_token(T)
        assert made.flops_per_token(T) == pytest.approx(expected)
