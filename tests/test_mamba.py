"""Promises of modules/mamba.py and modules/mamba2.py: every form says the same, as the papers' equations do, in little memory."""

import math

import pytest
import torch
import torch.nn.functional as F
from errors import one_line_error
from recurrences import check_cached, check_long, check_stable_in_bfloat16, check_stories, check_wrong_cache
from torch.utils.flop_counter import FlopCounterMode

from fast import ops as kernels
from modules import mamba
from modules.mamba import Mamba, SelectiveScan
from modules.mamba2 import Mamba2

D, C = 12, 16
LENGTHS = (1, 3, C - 1, C, C + 1, 3 * C + 5)
BLOCKS = {
    "Mamba": lambda **options: Mamba(D, **{"state_dim": 5, "chunk": C} | options),
    "Mamba2": lambda **options: Mamba2(D, **{"head_dim": 4, "state_dim": 5, "chunk": C} | options),
    "Mamba2 in groups": lambda **options: Mamba2(D, **{"head_dim": 4, "state_dim": 5, "chunk": C, "groups": 3} | options),
}
CHECKS = ("test_schema", "test_faketensor")
needs_compiler = pytest.mark.skipif(kernels.fingerprint() == "none", reason="there is no C++ compiler")


def build(name: str, **options):
    """With weights away from where they begin."""
    torch.manual_seed(0)
    block = BLOCKS[name](**options)
    with torch.no_grad():
        for weight in block.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return block


def conv_as_written(block, u: torch.Tensor) -> torch.Tensor:
    """SiLU of a causal convolution of its own for each channel, a token's own weight being 1 more.  (T, W) → (T, W)"""
    weight, out = block.conv.weight.detach().double(), torch.zeros_like(u)
    for t in range(len(u)):
        out[t] = u[t] + block.conv.bias.detach()
        for back in range(min(len(weight), t + 1)):
            out[t] += weight[back] * u[t - back]
    return out * out.sigmoid()


def mamba_as_written(block, x: torch.Tensor) -> torch.Tensor:
    """Algorithm 2 and equation 2 of arXiv 2312.00752, number by number.  (T, D) → (T, D)"""
    w = {name: weight.detach().double() for name, weight in block.state_dict().items()}
    N, R = block.state_dim, block.step_rank
    u, gate = conv_as_written(block, x @ w["w_in.weight"].T), x @ w["w_gate.weight"].T
    A = -w["log_rates"].exp().view(-1, N)
    state, out = torch.zeros_like(A), []
    for t in range(len(x)):
        selected = w["w_select.weight"] @ u[t]
        write, read = selected[R : R + N], selected[R + N :]
        step = (1 + (w["w_step.weight"] @ selected[:R] + w["w_step.bias"]).exp()).log()
        y = torch.zeros_like(u[t])
        for i in range(len(A)):
            for n in range(N):
                state[i, n] = math.exp(step[i] * A[i, n]) * state[i, n] + step[i] * write[n] * u[t, i]
                y[i] += read[n] * state[i, n]
        y = (y + w["skip"] * u[t]) * gate[t] * gate[t].sigmoid()
        out.append(w["w_out.weight"] @ y)
    return torch.stack(out)


def mamba2_as_written(block, x: torch.Tensor) -> torch.Tensor:
    """Equation 1 of arXiv 2405.21060 with a number A for each head, and the block of section 7.1.  (T, D) → (T, D)"""
    w = {name: weight.detach().double() for name, weight in block.state_dict().items()}
    N, G, K = block.state_dim, block.groups, block.head_dim
    H = len(w["skip"])
    u, gate = conv_as_written(block, x @ w["w_in.weight"].T), x @ w["w_gate.weight"].T
    values, write, read = u.split([H * K, G * N, G * N], dim=1)
    states, out = torch.zeros(H, K, N, dtype=torch.float64), []
    for t in range(len(x)):
        y = torch.zeros(H, K, dtype=torch.float64)
        for h in range(H):
            group = slice(h // (H // G) * N, h // (H // G) * N + N)
            step = math.log1p(math.exp(w["w_step.weight"][h] @ x[t] + w["w_step.bias"][h]))
            value = values[t, h * K : h * K + K]
            states[h] = math.exp(-step * w["log_rates"][h].exp()) * states[h] + step * torch.outer(value, write[t, group])
            y[h] = states[h] @ read[t, group] + w["skip"][h] * value
        y = (y.flatten() * gate[t] * gate[t].sigmoid()).view(G, -1)
        y = (y / (y.square().mean(dim=1, keepdim=True) + block.eps).sqrt()).flatten() * w["norm_weight"]
        out.append(w["w_out.weight"] @ y)
    return torch.stack(out)


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_it_computes_what_the_paper_writes(name):
    block, x = build(name), torch.randn(2, C + 9, D)
    as_written = mamba_as_written if name == "Mamba" else mamba2_as_written
    expected = torch.stack([as_written(block, row) for row in x.double()])
    torch.testing.assert_close(block(x).double(), expected, atol=1e-4, rtol=1e-4)


def answers_and_gradients(form, inputs, *weights):
    """All results of a form; the gradients of inputs and weights, in directions that are always the same."""
    inputs = [value.detach().clone().requires_grad_() for value in inputs]
    results = form(*inputs)
    inputs += weights
    generator = torch.Generator().manual_seed(1)
    total = sum((result * torch.randn(result.shape, generator=generator)).sum() for result in results)
    gradients = torch.autograd.grad(total, inputs, allow_unused=True)
    return results, [torch.zeros_like(value) if grad is None else grad for grad, value in zip(gradients, inputs, strict=True)]


def assert_same(found, expected):
    """Answers to 1e-4, gradients to 1e-3 of the largest."""
    for tolerance, ours, theirs in zip((1e-4, 1e-3), found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=tolerance * other.abs().max().item() + 1e-7, rtol=0)


def selective_inputs(T: int, W: int = 70, N: int = 5, B: int = 2):
    """u, step, rates, write and read, with decays from hardly any to nearly all."""
    torch.manual_seed(T)
    rates = -torch.logspace(-2, 2, W * N)[torch.randperm(W * N)].view(W, N)
    return torch.randn(B, T, W), F.softplus(torch.randn(B, T, W)), rates, torch.randn(B, T, N), torch.randn(B, T, N)


@pytest.mark.parametrize("T", LENGTHS)
def test_pieces_of_time_give_the_answers_and_gradients_of_the_recurrence(T):
    *inputs, state = *selective_inputs(T), torch.randn(2, 5, 70)

    def in_pieces(*given):
        return mamba.in_pieces(*given[:-1], None, given[-1], C)

    assert_same(answers_and_gradients(in_pieces, (*inputs, state)), answers_and_gradients(mamba.step_by_step, (*inputs, state)))


def some_stories(B: int, T: int) -> torch.Tensor:
    begins = torch.rand(B, T, generator=torch.Generator().manual_seed(2)) < 0.1
    return torch.where(begins, torch.arange(T), 0).cummax(dim=1).values.int()


@needs_compiler
@pytest.mark.parametrize("T", LENGTHS)
def test_the_kernel_gives_the_answers_and_gradients_of_the_formulas(T):
    for W, N in ((70, 5), (32, 16), (1, 1)):
        inputs = selective_inputs(T, W, N)
        kernel = answers_and_gradients(lambda *given: [SelectiveScan.apply(*given, None)], inputs)
        assert_same(kernel, answers_and_gradients(lambda *given: mamba.step_by_step(*given)[:1], inputs))
        first = some_stories(2, T)
        kernel = answers_and_gradients(lambda *given, first=first: [SelectiveScan.apply(*given, first)], inputs)
        begins = mamba.story_begins(first)
        formulas = answers_and_gradients(lambda *given, new=begins: mamba.in_pieces(*given, new, None, C)[:1], inputs)
        assert_same(kernel, formulas)


@needs_compiler
def test_threads_give_the_same_bits():
    inputs, first, results, before = selective_inputs(50), some_stories(2, 50), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(answers_and_gradients(lambda *given: [SelectiveScan.apply(*given, first)], inputs))
    finally:
        torch.set_num_threads(before)
    for (answer,), gradients in results[1:]:
        assert answer.equal(results[0][0][0])
        assert all(one.equal(other) for one, other in zip(gradients, results[0][1], strict=True))


@needs_compiler
def test_the_kernel_is_taken_in_float32_and_under_autocast(monkeypatch):
    """There the scan stays in float32 anyway."""
    taken, apply = [], SelectiveScan.apply
    monkeypatch.setattr(SelectiveScan, "apply", lambda *given: taken.append(given[0].dtype) or apply(*given))
    block, x = build("Mamba"), torch.randn(1, 9, D)
    expected = block(x)
    block.backend = "kernel"
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        block(x)
    assert taken == [torch.float32] * 2
    check_stories(block, torch.randn(2, 90, D))
    check_cached(block, torch.randn(2, 90, D))


@needs_compiler
def test_operators_keep_their_promises():
    """That nothing is changed in place, and that shapes and strides are foretold."""
    inputs = selective_inputs(20)
    for first in (None, some_stories(2, 20)):
        y, states = torch.ops.basegpt.selective_scan(*inputs, first)
        torch.library.opcheck(torch.ops.basegpt.selective_scan.default, (*inputs, first), test_utils=CHECKS)
        torch.library.opcheck(
            torch.ops.basegpt.selective_scan_backward.default, (*inputs, first, states, torch.randn_like(y)), test_utils=CHECKS
        )


def test_operators_of_pieces_keep_theirs():
    inputs, state = selective_inputs(20, B=mamba.ROWS + 1), torch.randn(mamba.ROWS + 1, 5, 70)
    for begins in (None, mamba.story_begins(some_stories(mamba.ROWS + 1, 20))):
        y, last, kept = torch.ops.basegpt.scan_in_pieces(*inputs, begins, state, C)
        given = *inputs, begins, kept, torch.randn_like(y), torch.randn_like(last), C
        torch.library.opcheck(torch.ops.basegpt.scan_in_pieces.default, (*inputs, begins, state, C), test_utils=CHECKS)
        torch.library.opcheck(torch.ops.basegpt.scan_in_pieces_backward.default, given, test_utils=CHECKS)


def test_rows_that_do_not_fit_into_a_piece_are_as_alone():
    inputs, count = selective_inputs(C + 3, B=mamba.ROWS + 1), mamba.ROWS + 1
    begins = mamba.story_begins(some_stories(count, C + 3))
    u, step, rates, write, read = inputs
    expected = [mamba.in_pieces(*(x[row : row + 1] for x in (u, step)), rates, *(x[row : row + 1] for x in (write, read)),
                                begins[row : row + 1], None, C) for row in range(count)]  # fmt: skip
    for ours, alone in zip(mamba.in_pieces(*inputs, begins, None, C), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.cat(alone))


@pytest.mark.parametrize("name, backend", [("Mamba", "plain"), ("Mamba", "kernel"), ("Mamba2", "plain")])
def test_compiled_without_a_graph_break(name, backend):
    block, x = build(name), torch.randn(2, 40, D)
    if backend == "kernel" and kernels.fingerprint() == "none":
        pytest.skip("there is no C++ compiler")
    block.backend = backend
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for first in (None, some_stories(2, 40)):
        found = [answers_and_gradients(lambda x, run=run, first=first: [run(x, first=first)], [x]) for run in (compiled, block)]
        assert_same(*found)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("T", LENGTHS)
def test_duality_gives_the_answers_and_gradients_of_the_recurrence(T, groups):
    """With decays from hardly any to nearly all."""
    block = build("Mamba2", groups=groups)
    B, H, K, N = 2, 6, 4, 5
    torch.manual_seed(T)
    step = F.softplus(2 * torch.randn(B, H, T))
    log_decay = -torch.logspace(-3, 2, H)[:, None] * step
    inputs = torch.randn(B, H, T, K), step, log_decay, torch.randn(B, groups, T, N), torch.randn(B, groups, T, N)
    inputs = *inputs, torch.randn(B, H, K, N)
    parallel = answers_and_gradients(lambda *given: block.in_parallel(*given, None), inputs, block.skip)
    assert_same(parallel, answers_and_gradients(block.step_by_step, inputs, block.skip))


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_the_chunk_does_not_matter(name):
    x = torch.randn(2, 53, D)
    expected = build(name)(x)
    for chunk in (1, 7, 53, 54, 1000):
        torch.testing.assert_close(build(name, chunk=chunk)(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", BLOCKS)
def test_from_the_cache_it_is_as_at_once(name):
    check_cached(build(name), torch.randn(2, 90, D))


@pytest.mark.parametrize("name", BLOCKS)
def test_stories_of_a_row_do_not_see_each_other(name):
    check_stories(build(name), torch.randn(2, 90, D))


@pytest.mark.parametrize("name", BLOCKS)
def test_4096_tokens_are_finite(name):
    check_long(build(name, chunk=64), torch.randn(1, 4096, D))


@pytest.mark.parametrize("name", BLOCKS)
def test_bfloat16_is_near_float32(name):
    check_stable_in_bfloat16(build(name), torch.randn(2, 300, D))


def test_the_states_of_all_tokens_are_never_kept_for_the_way_back():
    """A tensor with all of them has T x width x state_dim numbers."""
    block, x, T = build("Mamba", chunk=8), torch.randn(1, 64, D), 64
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: sizes.append(saved.numel()) or saved, lambda saved: saved):
        block(x).sum()
    assert 0 < sum(sizes) and max(sizes) < T * 2 * D * block.state_dim / 2


def test_a_new_model_remembers_over_short_and_long_times():
    """Step sizes from 0.001 to 0.1, and rates of 1 to N (arXiv 2312.00752, section 3.6) or from 1 to 16 for a head."""
    torch.manual_seed(0)
    for block in (Mamba(64), Mamba2(128, head_dim=2)):
        steps = F.softplus(block.w_step.bias)
        assert 0.001 <= steps.min() < 0.002 and 0.07 < steps.max() <= 0.1
        assert 0.005 < steps.log().mean().exp() < 0.02
    torch.testing.assert_close(Mamba(64).log_rates.exp().view(128, 16), torch.arange(1.0, 17).expand(128, 16))
    rates = Mamba2(128, head_dim=2).log_rates.exp()
    assert 1 <= rates.min() < 2 and 15 < rates.max() <= 16
    for block in (Mamba(64), Mamba2(64, head_dim=8)):
        own = block.conv.weight[0] + 1  # a token's own weight is drawn as those of the tokens before it
        assert own.abs().max() <= 0.5 and block.conv.weight[1:].abs().max() <= 0.5 and own.std() > 0.2


@torch.no_grad()
def test_flops_are_those_of_the_products():
    block, x = build("Mamba2"), torch.randn(1, 3 * C, D)
    with FlopCounterMode(display=False) as counter:
        block(x)
    by_convolution = 2 * block.conv.weight.numel() * 3 * C
    assert block.flops_per_token(3 * C) * 3 * C == counter.get_total_flops() + by_convolution
    assert block.flops_per_token(3 * C) == block.flops_per_token(300 * C)
    twice = build("Mamba", state_dim=10)
    for T in (1, 1000):
        more = (twice.flops_per_token(T) - build("Mamba").flops_per_token(T)) / (2 * D)
        assert more == 5 * (6 + 2 * 2)  # in each channel: the scan, and the matrices that say what to write and to read


@pytest.mark.parametrize("name", ["Mamba", "Mamba2"])
def test_what_cannot_be_is_told(name):
    for option in ("state_dim", "expand", "conv_width", "chunk"):
        one_line_error(lambda option=option: BLOCKS[name](**{option: 0}), f"{option}=0", "at least 1")
    check_wrong_cache(build(name), D)


def test_heads_and_groups_that_do_not_divide_are_told():
    one_line_error(lambda: Mamba(D, step_rank=0), "step_rank=0", "at least 1")
    one_line_error(lambda: Mamba2(D, head_dim=5), "head_dim=5", "expand * dim = 24")
    one_line_error(lambda: Mamba2(D, head_dim=4, groups=4), "groups=4", "= 6")
