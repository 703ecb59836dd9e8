"""Promises of modules/linear_attention.py: both forms give the papers' equations, for every decay."""

import pytest
import torch
from errors import one_line_error
from recurrences import (
    check_cached,
    check_flops,
    check_forms,
    check_long,
    check_stable_in_bfloat16,
    check_stories,
    check_wrong_cache,
)

from model import rope_table
from modules.linear_attention import LinearAttention

D, H, K, V, C = 24, 3, 8, 5, 16
LENGTHS = (1, 3, C - 1, C, C + 1, 3 * C + 5)
DECAYS = ("learned", "fixed", "none")


def block(decay: str, **options) -> LinearAttention:
    """Noise on every weight, and decays that differ from channel to channel."""
    torch.manual_seed(0)
    made = LinearAttention(D, H, K, **{"v_dim": V, "decay": decay, "chunk": C} | options)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
        if decay == "learned":
            made.w_decay_up.bias.copy_(torch.linspace(-40, 5, H * K))
    return made


def angles(T: int):
    return tuple(table[None] for table in rope_table(T, K, 10_000.0))


def as_written(made: LinearAttention, x: torch.Tensor, rope) -> torch.Tensor:
    """The papers' equations, token by token and head by head, in float64.  (B, T, D) -> (B, T, D)"""
    weights = {name: weight.detach().double() for name, weight in made.state_dict().items()}
    x = x.double()
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        states = [torch.zeros(K, V, dtype=torch.float64) for _ in range(H)]
        for t in range(x.shape[1]):
            heads = []
            for h in range(H):
                keys, values = slice(h * K, h * K + K), slice(h * V, h * V + V)
                q, k = weights["w_q.weight"][keys] @ x[b, t], weights["w_k.weight"][keys] @ x[b, t]
                v = weights["w_v.weight"][values] @ x[b, t]
                alpha = torch.ones(K, dtype=torch.float64)
                if made.decay == "fixed":
                    alpha *= 1 - 2.0 ** (-5 - h)
                    rotation = torch.complex(*(table[0, t].double() for table in rope))
                    q, k = (torch.view_as_real(torch.complex(p[: K // 2], p[K // 2 :]) * rotation).T.flatten() for p in (q, k))
                elif made.decay == "none":
                    q, k = (torch.where(p > 0, p + 1, p.exp()) for p in (q, k))
                else:
                    up, down = weights["w_decay_up.weight"][keys], weights["w_decay_down.weight"]
                    alpha = (up @ (down @ x[b, t]) + weights["w_decay_up.bias"][keys]).sigmoid() ** (1 / 16)
                states[h] = alpha[:, None] * states[h] + torch.outer(k, v)
                o = q / K**0.5 @ states[h]
                normed = o / (o.square().mean() + made.norm.eps).sqrt() * weights["norm.weight"]
                gate = weights["w_gate.weight"][values] @ x[b, t]
                heads.append(normed * gate * gate.sigmoid())
            out[b, t] = weights["w_out.weight"] @ torch.cat(heads)
    return out


@pytest.mark.parametrize("decay", DECAYS)
@torch.no_grad()
def test_it_computes_what_the_papers_write(decay):
    made, x = block(decay), torch.randn(2, C + 9, D)
    rope = angles(C + 9) if decay == "fixed" else None
    torch.testing.assert_close(made(x, rope=rope).double(), as_written(made, x, rope), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", LENGTHS)
def test_in_parallel_equals_step_by_step_with_its_gradients(decay, T):
    made, x = block(decay), torch.randn(2, T, D)
    check_forms(made, x, lambda x: (*made.project(x, angles(T)), made.log_decay(x)))


@pytest.mark.parametrize("decay", DECAYS)
def test_the_chunk_does_not_matter(decay):
    x = torch.randn(2, 50, D)
    expected = block(decay)(x)
    for chunk in (1, 5, 32):
        torch.testing.assert_close(block(decay, chunk=chunk)(x), expected, atol=1e-4, rtol=1e-4)
    if decay != "learned":
        torch.testing.assert_close(block(decay, chunk=300)(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("decay", DECAYS)
def test_it_continues_from_a_state_of_constant_size(decay):
    check_cached(block(decay), torch.randn(2, 70, D))


@pytest.mark.parametrize("decay", DECAYS)
def test_stories_of_a_row_do_not_see_each_other(decay):
    check_stories(block(decay), torch.randn(2, 70, D))


@pytest.mark.parametrize("decay", DECAYS)
def test_long_sequences_and_bfloat16_are_stable(decay):
    made = block(decay)
    check_long(made, torch.randn(1, 4096, D))
    check_stable_in_bfloat16(made, torch.randn(2, 300, D))


def test_the_fastest_decay_is_finite_and_exact():
    made, x = block("learned", chunk=32), torch.randn(2, 100, D)
    with torch.no_grad():
        made.w_decay_up.bias.fill_(-1e4)
    assert made.log_decay(x).max() == -5
    check_forms(made, x, lambda x: (*made.project(x, None), made.log_decay(x)))


def test_fixed_decays_are_those_of_retention():
    decays = block("fixed").log_decay(torch.zeros(1, 1, D)).exp().flatten()
    torch.testing.assert_close(decays, torch.tensor([31 / 32, 63 / 64, 127 / 128]))
    assert block("none").log_decay(torch.zeros(1, 1, D)).eq(0).all()


@pytest.mark.parametrize("decay", DECAYS)
def test_flops_are_those_that_torch_counts(decay):
    check_flops(block(decay), torch.randn(2, 4 * C, D))
    check_flops(block(decay), torch.randn(2, 3 * C + 5, D))


def test_bad_options_are_one_line():
    one_line_error(lambda: block("fixed", chunk=0), "chunk=0", "at least 1")
    one_line_error(lambda: block("learned", chunk=64), "chunk=64", "at most 32")
    one_line_error(lambda: block("fixed", v_dim=0), "v_dim=0", "at least 1")
    one_line_error(lambda: block("learned", decay_rank=0), "decay_rank=0", "at least 1")
    check_wrong_cache(block("learned"), D)
