"""Promises of modules/griffin.py: the equations of the paper. test_originals.py compares it with RecurrentGemma."""

import math

import pytest
import torch
from errors import one_line_error
from recurrences import check_cached, check_long, check_stable_in_bfloat16, check_stories, check_wrong_cache
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from config import ModelConfig
from model import Cache
from modules import griffin
from modules.griffin import RGLRU
from modules.registry import build_block, build_branch, build_model
from modules.scan import recurrence

D, W, H, WIDTH = 12, 20, 4, 3
LENGTHS = (1, 2, 3, 15, 16, 17, 53, 300)


def block(**options) -> RGLRU:
    """Noise on every weight."""
    torch.manual_seed(0)
    made = RGLRU(D, H, **{"width": W, "conv_width": WIDTH, "linear_bias": True} | options)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return made


def as_written(made: RGLRU, x: torch.Tensor) -> torch.Tensor:
    """Section 2.3 and equations 1 to 4 of arXiv 2402.19427, channel by channel, in float64.  (B, T, D) -> (B, T, D)"""
    w = {name: weight.detach().double() for name, weight in made.state_dict().items()}
    x, out = x.double(), []
    B, T, _ = x.shape
    for b in range(B):
        branch = [w["w_in.weight"] @ x[b, t] + w["w_in.bias"] for t in range(T)]
        state = torch.zeros(W, dtype=torch.float64)
        for t in range(T):
            inner = branch[t] + w["conv.bias"]
            for distance in range(min(t + 1, WIDTH)):
                inner = inner + w["conv.weight"][distance] * branch[t - distance]
            r, i = torch.zeros(W, dtype=torch.float64), torch.zeros(W, dtype=torch.float64)
            for head in range(H):
                channels = slice(head * W // H, (head + 1) * W // H)
                r[channels] = inner[channels] @ w["w_remember"][head] + w["remember_bias"][channels]
                i[channels] = inner[channels] @ w["w_admit"][head] + w["admit_bias"][channels]
            a = w["forgetting"].sigmoid() ** (8 * r.sigmoid())
            root = (1 - a**2).sqrt() if t else 1.0  # as in RecurrentGemma, the first token is not scaled
            state = a * state + root * i.sigmoid() * inner
            gate = nn.functional.gelu(w["w_gate.weight"] @ x[b, t] + w["w_gate.bias"], approximate="tanh")
            out.append(w["w_out.weight"] @ (gate * state) + w["w_out.bias"])
    return torch.stack(out).view(B, T, D)


@torch.no_grad()
def test_it_computes_what_the_paper_writes():
    made, x = block(), torch.randn(2, 40, D)
    torch.testing.assert_close(made(x).double(), as_written(made, x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("T", LENGTHS)
def test_the_scan_equals_step_by_step_with_its_gradients(T, monkeypatch):
    made, x = block(), torch.randn(2, T, D, requires_grad=True)
    direction, results = torch.randn(2, T, D), []
    for form in (griffin.scan, recurrence):
        monkeypatch.setattr(griffin, "scan", form)
        y = made(x)
        results.append((y, torch.autograd.grad(y, [x, *made.parameters()], direction)))
    (y, gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3 * theirs.abs().max().item() + 1e-6, rtol=0)


def test_it_continues_from_a_state_of_constant_size():
    check_cached(block(), torch.randn(2, 70, D))


def test_stories_of_a_row_do_not_see_each_other():
    check_stories(block(), torch.randn(2, 70, D))


def test_long_sequences_and_bfloat16_are_stable():
    check_long(block(), torch.randn(1, 4096, D))
    check_stable_in_bfloat16(block(), torch.randn(2, 300, D))


def test_closed_gates_keep_the_state_and_finite_gradients():
    made, x = block(), torch.randn(1, 50, D)
    with torch.no_grad():
        made.remember_bias.fill_(-1e4)  # a is 1: nothing is forgotten, and nothing is added after the first token
    states = []
    made.w_out.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    gate = nn.functional.gelu(made.w_gate(x), approximate="tanh")
    made(x).sum().backward()
    state = states[0] / gate
    torch.testing.assert_close(state, state[:, :1].expand_as(state), atol=0.05, rtol=0.01)
    assert all(weight.grad.isfinite().all() for weight in made.parameters())


def test_the_initial_decays_are_those_of_the_paper():
    torch.manual_seed(0)
    decays = RGLRU(512, 4).forgetting.sigmoid() ** 8
    assert decays.min() > 0.9 and decays.max() < 0.999
    assert decays.mean().item() == pytest.approx(0.9495, abs=0.005)


def test_sizes_are_those_of_the_config_or_the_options():
    config = ModelConfig(dim=24, num_heads=4)
    made = build_block("RGLRU", {}, config, vocab_size=50)
    assert made.w_out.weight.shape == (24, 24) and made.w_remember.shape == (4, 6, 6)
    made = build_block("RGLRU", {"width": 30, "blocks": 5}, config, vocab_size=50)
    assert made.w_out.weight.shape == (24, 30) and made.w_admit.shape == (5, 6, 6)


def test_bad_options_are_one_line():
    for options, word in (
        ({"width": 0}, "width=0"), ({"blocks": 0}, "blocks=0"), ({"conv_width": 0}, "conv_width=0"), ({"blocks": 3}, "blocks=3"),
    ):  # fmt: skip
        one_line_error(lambda options=options: block(**options), word)
    layer = "Norm->RGLRU(width=10)->+"
    one_line_error(lambda: build_branch(layer, ModelConfig(), 50), "»RGLRU(width=10)«", "blocks=4", "width=10")


def test_a_state_of_another_batch_size_is_an_error():
    check_wrong_cache(block(), D)


def test_flops_include_the_products_that_torch_counts():
    made, T = block(), 64
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made(torch.randn(1, T, D))
    assert made.flops_per_token(T) == counter.get_total_flops() / T + 2 * WIDTH * W + 6 * W


@torch.no_grad()
def test_a_griffin_decodes_from_the_cache_as_at_once():
    torch.manual_seed(0)
    layers = ("Norm->RGLRU->+->Norm->MLP->+",) * 2 + ("Norm->Attn(window=6)->+->Norm->MLP->+",)
    model = build_model(ModelConfig(dim=16, num_layers=3, num_heads=2, num_kv_heads=1, max_seq_len=48, layers=layers), 50).eval()
    tokens, cache = torch.randint(50, (2, 40)), Cache()
    expected, _ = model(tokens)
    chunks = [model(chunk, cache=cache)[0] for chunk in tokens.split([13, 1, 1, 25], dim=1)]
    torch.testing.assert_close(torch.cat(chunks, dim=1), expected, atol=1e-4, rtol=1e-4)
    assert math.isclose(model.layers[0].branches[0].blocks[1].flops_per_token(8), 2 * (3 * 256 + 2 * 128) + 2 * 4 * 16 + 6 * 16)
