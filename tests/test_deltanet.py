"""Promises of modules/deltanet.py: both forms give the papers' equations."""

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

from modules.deltanet import DeltaNet, GatedDeltaNet

D, H, K, V, C = 24, 2, 8, 5, 16
LENGTHS = (1, 3, C - 1, C, C + 1, 3 * C + 5)
BLOCKS = (DeltaNet, GatedDeltaNet)


def block(kind: type[DeltaNet], **options) -> DeltaNet:
    """Two value heads for each key head, and noise on every weight."""
    torch.manual_seed(0)
    made = kind(D, H, K, **{"v_heads": 2 * H, "v_dim": V, "chunk": C} | options)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return made


def as_written(made: DeltaNet, x: torch.Tensor) -> torch.Tensor:
    """The papers' equations, token by token and head by head, in float64.  (B, T, D) -> (B, T, D)"""
    weights = {name: weight.detach().double() for name, weight in made.state_dict().items()}
    taps = weights["conv.weight"] + torch.eye(len(weights["conv.weight"]), 1, dtype=torch.float64)  # for the skip
    x = x.double()
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        projected = x[b] @ weights["w_qkv.weight"].T
        states = [torch.zeros(V, K, dtype=torch.float64) for _ in range(made.v_heads)]
        for t in range(x.shape[1]):
            mixed = sum(taps[back] * projected[t - back] for back in range(min(len(taps), t + 1)))
            q, k, v = (mixed * mixed.sigmoid()).split([H * K, H * K, made.v_heads * V])
            heads = []
            for h in range(made.v_heads):
                shared = h * H // made.v_heads
                q_t, k_t = (part[shared * K : shared * K + K] for part in (q, k))
                q_t, k_t = (part / (part.norm() ** 2 + 1e-6).sqrt() for part in (q_t, k_t))
                beta = (weights["w_beta.weight"][h] @ x[b, t]).sigmoid()
                alpha = 1.0
                if isinstance(made, GatedDeltaNet):
                    step = (1 + (weights["w_step.weight"][h] @ x[b, t] + weights["step_bias"][h]).exp()).log()
                    alpha = (-weights["log_rate"][h].exp() * step).exp()
                decay = torch.eye(K, dtype=torch.float64) - beta * torch.outer(k_t, k_t)
                states[h] = alpha * states[h] @ decay + beta * torch.outer(v[h * V : h * V + V], k_t)
                o = states[h] @ q_t / K**0.5
                normed = o / (o.square().mean() + made.norm.eps).sqrt() * weights["norm.weight"]
                if isinstance(made, GatedDeltaNet):
                    gate = weights["w_gate.weight"][h * V : h * V + V] @ x[b, t]
                    normed = normed * gate * gate.sigmoid()
                heads.append(normed)
            out[b, t] = weights["w_out.weight"] @ torch.cat(heads)
    return out


def inputs_of(made: DeltaNet):
    def inputs(x):
        return *made.project(x, None, None), made.w_beta(x).sigmoid().transpose(1, 2), made.log_decay(x)

    return inputs


@pytest.mark.parametrize("kind", BLOCKS)
@torch.no_grad()
def test_it_computes_what_the_papers_write(kind):
    made, x = block(kind), torch.randn(2, C + 9, D)
    torch.testing.assert_close(made(x).double(), as_written(made, x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("T", LENGTHS)
def test_in_parallel_equals_step_by_step_with_its_gradients(kind, T):
    made = block(kind)
    check_forms(made, torch.randn(2, T, D), inputs_of(made))


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_chunk_does_not_matter(kind):
    x = torch.randn(2, 50, D)
    expected = block(kind)(x)
    for chunk in (1, 5, 64, 300):
        torch.testing.assert_close(block(kind, chunk=chunk)(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", BLOCKS)
def test_it_continues_from_a_state_of_constant_size(kind):
    check_cached(block(kind), torch.randn(2, 70, D))
    check_cached(block(kind, conv_width=1), torch.randn(2, 70, D))


@pytest.mark.parametrize("kind", BLOCKS)
def test_stories_of_a_row_do_not_see_each_other(kind):
    check_stories(block(kind), torch.randn(2, 70, D))


@pytest.mark.parametrize("kind", BLOCKS)
def test_long_sequences_and_bfloat16_are_stable(kind):
    made = block(kind)
    check_long(made, torch.randn(1, 4096, D))
    check_stable_in_bfloat16(made, torch.randn(2, 300, D))


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_repeated_key_is_exact_too(kind):
    """All keys alike and every value replaced: the corrections within a chunk depend on each other as much as possible."""
    made = block(kind, chunk=64)
    inputs = list(inputs_of(made)(torch.randn(2, 130, D)))
    inputs[1], inputs[3] = inputs[1][:, :, :1].expand_as(inputs[1]), torch.ones_like(inputs[3])
    check_forms(made, torch.empty(0), lambda x: inputs)


def test_the_fastest_decay_is_finite_and_exact():
    made, x = block(GatedDeltaNet), torch.randn(2, 40, D)
    q, k, v, beta, _ = inputs_of(made)(x)
    log_decay = torch.full_like(beta, -1e4)
    check_forms(made, x, lambda x: (q, k, v, beta, log_decay))


def test_a_decay_of_one_gives_the_ungated_rule():
    gated, plain, x = block(GatedDeltaNet), block(DeltaNet), torch.randn(2, 40, D)
    q, k, v, beta, _ = inputs_of(gated)(x)
    state = torch.zeros(2, 2 * H, K, V)
    expected, _ = plain.in_parallel(q, k, v, beta, None, state, None)
    torch.testing.assert_close(gated.in_parallel(q, k, v, beta, torch.zeros_like(beta), state, None)[0], expected)


@pytest.mark.parametrize("kind", BLOCKS)
def test_flops_are_those_that_torch_counts(kind):
    made = block(kind)
    solution, convolution = made.v_heads * C * C, 2 * made.conv.weight.numel()
    check_flops(made, torch.randn(2, 4 * C, D), uncounted=solution + convolution)


def test_the_initial_decays_are_those_of_the_paper():
    torch.manual_seed(0)
    made = GatedDeltaNet(D, H, K, v_heads=100 * H)
    steps = torch.nn.functional.softplus(made.step_bias)
    assert 0.00099 < steps.min() < 0.002 < 0.05 < steps.max() < 0.1001
    assert 0.01 <= made.log_rate.exp().min() < 1 < 15 < made.log_rate.exp().max() <= 16
    assert made.v_dim == 2 * K and DeltaNet(D, H, K).v_dim == K


def test_bad_options_are_one_line():
    for kind in BLOCKS:
        one_line_error(lambda kind=kind: block(kind, chunk=0), "chunk=0", "at least 1")
        one_line_error(lambda kind=kind: block(kind, v_dim=0), "v_dim=0", "at least 1")
        one_line_error(lambda kind=kind: block(kind, v_heads=0), "v_heads=0", "at least 1")
        one_line_error(lambda kind=kind: block(kind, v_heads=3), "v_heads=3", "2 heads", "multiple")
        one_line_error(lambda kind=kind: block(kind, conv_width=0), "conv_width=0", "at least 1")
        check_wrong_cache(block(kind), D)
