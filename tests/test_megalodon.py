"""Promises of modules/megalodon.py: the equations of the paper, in chunks of tokens, and the two-hop residual."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from errors import one_line_error
from recurrences import check_long
from test_moving_average import average_as_written, norm_as_written

from config import TWO_HOP, ModelConfig
from model import GPT, Cache, Steps, rope_table
from modules.contract import check_block
from modules.megalodon import Megalodon
from modules.registry import build_block

D, H, K, V, N, CHUNK = 12, 2, 4, 14, 3, 7
CONFIG = ModelConfig(dim=D, num_layers=1, num_heads=H, num_kv_heads=H, head_dim=K, mlp_dim=24, max_seq_len=80)


def block(**options) -> Megalodon:
    """Every weight away from where it begins."""
    torch.manual_seed(0)
    made = Megalodon(D, H, K, **{"chunk": CHUNK, "value_dim": V, "state_dim": N, "groups": 3} | options)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(torch.randn_like(weight) * 0.4)
    return made.eval()


def angles(T: int, start: int = 0):
    return tuple(table[None, start : start + T] for table in rope_table(start + T, K, 10_000.0))


def as_written(made: Megalodon, x: torch.Tensor) -> torch.Tensor:
    """Section 3.3 of arXiv 2404.08801 head by head, with RoPE, in float64.  (B, T, D) → (B, T, D)"""
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
    turns = torch.complex(*(table[0].double() for table in angles(T)))
    for h in range(H):
        channels, values = slice(h * K, h * K + K), slice(h * V // H, (h + 1) * V // H)
        length_1 = z[..., channels] / z[..., channels].norm(dim=-1, keepdim=True)
        q = length_1 * w["q_gain"][channels] + w["q_bias"][channels]
        k = length_1 * w["k_gain"][channels] + w["k_bias"][channels]
        q, k = (torch.complex(p[..., : K // 2], p[..., K // 2 :]) * turns for p in (q, k))
        for t in range(T):
            chunk = slice(t // CHUNK * CHUNK, t + 1)
            scores = (q[:, t, None] * k[:, chunk].conj()).real.sum(dim=-1)
            mixed[:, t, values] = (scores.softmax(dim=-1)[..., None] * v[:, chunk, values]).sum(dim=1)
    return torch.cat([averaged, gate * mixed], dim=-1) @ w["w_out.weight"].T + w["w_out.bias"]


@pytest.mark.parametrize("attention", ["plain", "sdpa", "kernel"])
@pytest.mark.parametrize("value_dim", [V, H * K])
@pytest.mark.parametrize("T", [1, 3, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
@torch.no_grad()
def test_it_computes_what_the_paper_writes(attention, value_dim, T):
    """Our kernel mixes values that are as wide as the keys; all else it leaves to torch."""
    made, x = block(attention=attention, value_dim=value_dim), torch.randn(2, T, D)
    torch.testing.assert_close(made(x, rope=angles(T)).double(), as_written(made, x), atol=1e-4, rtol=1e-4)


def test_a_chunk_longer_than_the_sequence_is_attention_to_all():
    x = torch.randn(2, 20, D)
    torch.testing.assert_close(block(chunk=1000)(x), block(chunk=20)(x))
    assert not torch.allclose(block(chunk=19)(x), block(chunk=20)(x))


@torch.no_grad()
def test_it_goes_on_from_a_cache_that_never_holds_more_than_a_chunk():
    made, T = block(), 60
    x = torch.randn(2, T, D)
    expected = made(x, rope=angles(T))
    for pieces in ([1] * T, [CHUNK] * 8 + [4], [3, 30, 1, 1, 6, 19], [T]):
        cache, parts, start = {}, [], 0
        for piece in x.split(pieces, dim=1):
            parts.append(made(piece, rope=angles(piece.shape[1], start), cache=cache))
            start += piece.shape[1]
            kept = (start - 1) % CHUNK + 1
            assert cache["k"].shape == (2, H, kept, K) and cache["v"].shape[2] == kept
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ["plain", "sdpa"])
@torch.no_grad()
def test_chunks_are_counted_from_the_beginning_of_a_story(attention):
    made, x = block(attention=attention), torch.randn(1, 60, D)
    starts = [0, 1, 5, 26, 33, 60]
    first = torch.cat([torch.full((end - start,), start) for start, end in itertools.pairwise(starts)])[None].int()
    alone = torch.cat([made(x[:, start:end]) for start, end in itertools.pairwise(starts)], dim=1)
    torch.testing.assert_close(made(x, first=first), alone, atol=1e-4, rtol=1e-4)


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
def test_a_layer_with_two_hops_adds_both_times_what_it_was_given():
    torch.manual_seed(0)
    steps, x = Steps(TWO_HOP.replace("Norm->Attn", "Megalodon(chunk=7)"), CONFIG, 1).eval(), torch.randn(2, 20, D)
    _, megalodon, _, norm, mlp = steps.blocks
    torch.testing.assert_close(steps(x, shared={}), x + mlp(norm(x + megalodon(x))))
    assert not any("SkipIn" in name for name, _ in steps.named_parameters()) and len(list(steps.blocks[2].parameters())) == 0


@torch.no_grad()
def test_a_model_writes_from_the_cache_what_it_reads_at_once():
    torch.manual_seed(0)
    layer = TWO_HOP.replace("Norm->Attn", "Megalodon(chunk=6, state_dim=2)")
    config = ModelConfig(dim=16, num_layers=2, num_heads=1, num_kv_heads=1, head_dim=4, max_seq_len=48, layers=layer)
    model = GPT(config, 50).eval()
    tokens, cache = torch.randint(50, (2, 40)), Cache()
    expected, _ = model(tokens)
    pieces = [model(piece, cache=cache)[0] for piece in tokens.split([13, 1, 1, 25], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-4, rtol=1e-4)


def test_traced_for_the_compiler_it_gives_the_same_with_stories_and_without():
    torch.manual_seed(0)
    steps, x = Steps(TWO_HOP.replace("Norm->Attn", "Megalodon(chunk=7)"), CONFIG, 1), torch.randn(2, 20, D)
    first = torch.where(torch.arange(20) < 9, 0, 9).int().expand(2, 20)
    expected = [steps(x, first=begins, shared={}) for begins in (None, first)]
    steps.compile(backend="eager", dynamic=False)
    for begins, y in zip((None, first), expected, strict=True):
        torch.testing.assert_close(steps(x, first=begins, shared={}), y)
    torch._dynamo.reset()


def test_it_keeps_the_contract_with_values_as_narrow_as_keys_too():
    check_block("Megalodon", CONFIG, "Megalodon(value_dim=8, groups=2, chunk=5)")


def test_sizes_are_those_of_the_config_or_the_options():
    made = build_block("Megalodon", {"groups": 3}, CONFIG)
    assert made.w_v.weight.shape == (2 * D, D) and made.w_out.weight.shape == (D, 3 * D) and made.window == 64
    assert made.cema.alpha.shape == (D, 16)


def test_options_that_cannot_be():
    for options, words in (
        ({"chunk": 0}, ("chunk=0",)), ({"value_dim": 0}, ("value_dim=0",)), ({"value_dim": 7}, ("value_dim=7", "num_heads=2")),
        ({"state_dim": 0}, ("state_dim=0",)), ({"groups": 5}, ("groups=5", "dim=12")),
    ):  # fmt: skip
        one_line_error(lambda options=options: block(**options), *words)
    one_line_error(lambda: Steps("Megalodon(chunk=0)->+", CONFIG, 1), "»Megalodon(chunk=0)«", "chunk=0")


def test_a_state_of_another_batch_size():
    made, cache = block(), {}
    made(torch.randn(2, 3, D), cache=cache)
    one_line_error(lambda: made(torch.randn(3, 1, D), cache=cache), "state of 2", "x has 3")


def test_flops_count_the_pairs_of_tokens_in_a_chunk():
    made = block()
    matrices = D * (H * K + 2 * V) + (D + V) * D
    pairs = {1: 1, CHUNK: (CHUNK + 1) / 2, 2 * CHUNK + 1: (CHUNK * (CHUNK + 1) + 1) / (2 * CHUNK + 1)}
    for T, seen in pairs.items():
        expected = 2 * matrices + 2 * seen * (H * K + V) + made.cema.flops_per_token(T)
        assert made.flops_per_token(T) == pytest.approx(expected)
