"""Promises of modules/mamba.py and modules/mamba2.py: every form gives the papers' equations, in little memory."""

import math

import pytest
import torch
import torch.nn.functional as F
from errors import one_line_error
from recurrences import check_cached, check_long, check_stable_in_bfloat16, check_stories, check_wrong_cache
from torch.utils.flop_counter import FlopCounterMode

import fast
from fast import build as fast_build
from fast import selective_scan as fast_scan
from modules import mamba
from modules.mamba import Mamba
from modules.mamba2 import Mamba2

D, C = 12, 16
LENGTHS = (1, 3, C - 1, C, C + 1, 3 * C + 5)
BLOCKS = {
    "Mamba": lambda **options: Mamba(D, **{"state_dim": 5, "chunk": C} | options),
    "Mamba2": lambda **options: Mamba2(D, **{"head_dim": 4, "state_dim": 5, "chunk": C} | options),
    "Mamba2 in groups": lambda **options: Mamba2(D, **{"head_dim": 4, "state_dim": 5, "chunk": C, "groups": 3} | options),
}
CHECKS = ("test_schema", "test_faketensor")
needs_compiler = pytest.mark.skipif(fast_build.fingerprint() == "none", reason="there is no C++ compiler")


def build(name: str, **options):
    """Noise on every weight."""
    torch.manual_seed(0)
    block = BLOCKS[name](**options)
    with torch.no_grad():
        for weight in block.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return block


def conv_as_written(block, u: torch.Tensor) -> torch.Tensor:
    """SiLU of a causal depthwise convolution with a skip.  (T, W) -> (T, W)"""
    weight, out = block.conv.weight.detach().double(), torch.zeros_like(u)
    for t in range(len(u)):
        out[t] = u[t] + block.conv.bias.detach()
        for distance in range(min(len(weight), t + 1)):
            out[t] += weight[distance] * u[t - distance]
    return out * out.sigmoid()


def mamba_as_written(block, x: torch.Tensor) -> torch.Tensor:
    """Algorithm 2 and equation 2 of arXiv 2312.00752, number by number.  (T, D) -> (T, D)"""
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
    """Equation 1 of arXiv 2405.21060 with a number A for each head, and the block of section 7.1.  (T, D) -> (T, D)"""
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


def outputs_and_gradients(form, inputs, *weights):
    """All outputs of a form, and the gradients of inputs and weights in directions that are always the same."""
    inputs = [value.detach().clone().requires_grad_() for value in inputs]
    outputs = form(*inputs)
    generator = torch.Generator().manual_seed(1)
    total = sum((output * torch.randn(output.shape, generator=generator)).sum() for output in outputs)
    return outputs, torch.autograd.grad(total, [*inputs, *weights], materialize_grads=True)


def assert_same(results, expected):
    """Outputs to 1e-4, gradients to 1e-3 of the largest."""
    for tolerance, ours, theirs in zip((1e-4, 1e-3), results, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=tolerance * other.abs().max().item() + 1e-7, rtol=0)


def selective_inputs(T: int, W: int = 70, N: int = 5, B: int = 2):
    """u, step, rates, write and read, with decays from hardly any to nearly all."""
    torch.manual_seed(T)
    rates = -torch.logspace(-2, 2, W * N)[torch.randperm(W * N)].view(W, N)
    return torch.randn(B, T, W), F.softplus(torch.randn(B, T, W)), rates, torch.randn(B, T, N), torch.randn(B, T, N)


@pytest.mark.parametrize("T", LENGTHS)
def test_pieces_of_time_equal_the_recurrence_with_its_gradients(T):
    *inputs, state = *selective_inputs(T), torch.randn(2, 5, 70)

    def in_pieces(*given):
        return mamba.in_pieces(*given[:-1], None, given[-1], C)

    assert_same(outputs_and_gradients(in_pieces, (*inputs, state)), outputs_and_gradients(mamba.step_by_step, (*inputs, state)))


def some_stories(B: int, T: int) -> torch.Tensor:
    """story_start (B, T)"""
    is_start = torch.rand(B, T, generator=torch.Generator().manual_seed(2)) < 0.1
    return torch.where(is_start, torch.arange(T), 0).cummax(dim=1).values


def starts(story_start: torch.Tensor) -> torch.Tensor:
    return story_start == torch.arange(story_start.shape[1])


def scan_with(scan, story_start):
    return lambda *inputs: [scan(*inputs, story_start, C)]


@needs_compiler
@pytest.mark.parametrize("T", LENGTHS)
def test_the_kernel_equals_the_formulas_with_their_gradients(T):
    for W, N in ((70, 5), (32, 16), (1, 1)):
        inputs = selective_inputs(T, W, N)
        by_steps = outputs_and_gradients(lambda *given: mamba.step_by_step(*given)[:1], inputs)
        assert_same(outputs_and_gradients(scan_with(fast_scan.selective_scan, None), inputs), by_steps)
        kernel, formula = (scan_with(module.selective_scan, some_stories(2, T)) for module in (fast_scan, mamba))
        assert_same(outputs_and_gradients(kernel, inputs), outputs_and_gradients(formula, inputs))


@needs_compiler
def test_any_number_of_threads_gives_the_same_bits():
    inputs, kernel, results = selective_inputs(50), scan_with(fast_scan.selective_scan, some_stories(2, 50)), []
    num_threads = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(outputs_and_gradients(kernel, inputs))
    finally:
        torch.set_num_threads(num_threads)
    for (output,), gradients in results[1:]:
        assert output.equal(results[0][0][0])
        assert all(one.equal(other) for one, other in zip(gradients, results[0][1], strict=True))


@needs_compiler
def test_the_kernel_runs_in_float32_and_under_autocast(monkeypatch):
    """Under autocast the scan stays in float32, too."""
    dtypes, apply = [], fast_scan.SelectiveScan.apply
    monkeypatch.setattr(fast_scan.SelectiveScan, "apply", lambda *given: dtypes.append(given[0].dtype) or apply(*given))
    block, x = build("Mamba"), torch.randn(1, 9, D)
    expected = block(x)
    fast.use(block)
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        block(x)
    assert dtypes == [torch.float32] * 2
    check_stories(block, torch.randn(2, 90, D))
    check_cached(block, torch.randn(2, 90, D))


@needs_compiler
def test_the_operators_of_the_kernel_pass_opcheck():
    """Nothing is changed in place; the fake kernels have the right shapes and strides."""
    inputs, ops = selective_inputs(20), torch.ops.basegpt
    for story_start in (None, some_stories(2, 20).int()):
        y, states = ops.selective_scan(*inputs, story_start)
        for_backward = *inputs, story_start, states, torch.randn_like(y)
        torch.library.opcheck(ops.selective_scan.default, (*inputs, story_start), test_utils=CHECKS)
        torch.library.opcheck(ops.selective_scan_backward.default, for_backward, test_utils=CHECKS)


def test_the_operators_of_pieces_pass_opcheck():
    inputs, state, ops = selective_inputs(20, B=mamba.ROWS + 1), torch.randn(mamba.ROWS + 1, 5, 70), torch.ops.basegpt
    for is_start in (None, starts(some_stories(mamba.ROWS + 1, 20))):
        y, last, saved = ops.scan_in_pieces(*inputs, is_start, state, C)
        for_backward = *inputs, is_start, saved, torch.randn_like(y), torch.randn_like(last), C
        torch.library.opcheck(ops.scan_in_pieces.default, (*inputs, is_start, state, C), test_utils=CHECKS)
        torch.library.opcheck(ops.scan_in_pieces_backward.default, for_backward, test_utils=CHECKS)


def test_more_rows_than_a_piece_holds_are_as_alone():
    count = mamba.ROWS + 1
    u, step, rates, write, read = selective_inputs(C + 3, B=count)
    is_start = starts(some_stories(count, C + 3))
    rows = [slice(row, row + 1) for row in range(count)]
    alone = [mamba.in_pieces(u[r], step[r], rates, write[r], read[r], is_start[r], None, C) for r in rows]
    together = mamba.in_pieces(u, step, rates, write, read, is_start, None, C)
    for ours, expected in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.cat(expected))


@pytest.mark.parametrize(
    "name, use", [("Mamba", fast.undo), pytest.param("Mamba", fast.use, marks=needs_compiler), ("Mamba2", fast.undo)]
)
def test_it_is_compiled_without_a_graph_break(name, use):
    block, x = build(name), torch.randn(2, 40, D)
    use(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for story_start in (None, some_stories(2, 40)):
        forms = (lambda x, form=form, story_start=story_start: [form(x, story_start=story_start)] for form in (compiled, block))
        assert_same(*(outputs_and_gradients(form, [x]) for form in forms))


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("T", LENGTHS)
def test_duality_equals_the_recurrence_with_its_gradients(T, groups):
    """For decays from hardly any to nearly all."""
    block = build("Mamba2", groups=groups)
    B, H, K, N = 2, 6, 4, 5
    torch.manual_seed(T)
    step = F.softplus(2 * torch.randn(B, H, T))
    log_decay = -torch.logspace(-3, 2, H)[:, None] * step
    inputs = torch.randn(B, H, T, K), step, log_decay, torch.randn(B, groups, T, N), torch.randn(B, groups, T, N)
    inputs = *inputs, torch.randn(B, H, K, N)
    parallel = outputs_and_gradients(lambda *given: block.in_parallel(*given, None), inputs, block.skip)
    assert_same(parallel, outputs_and_gradients(block.step_by_step, inputs, block.skip))


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_the_chunk_does_not_matter(name):
    x = torch.randn(2, 53, D)
    expected = build(name)(x)
    for chunk in (1, 7, 53, 54, 1000):
        torch.testing.assert_close(build(name, chunk=chunk)(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", BLOCKS)
def test_it_continues_from_a_state_of_constant_size(name):
    check_cached(build(name), torch.randn(2, 90, D))


@pytest.mark.parametrize("name", BLOCKS)
def test_stories_of_a_row_do_not_see_each_other(name):
    check_stories(build(name), torch.randn(2, 90, D))


@pytest.mark.parametrize("name", BLOCKS)
def test_4096_tokens_are_stable(name):
    check_long(build(name, chunk=64), torch.randn(1, 4096, D))


@pytest.mark.parametrize("name", BLOCKS)
def test_bfloat16_is_near_float32(name):
    check_stable_in_bfloat16(build(name), torch.randn(2, 300, D))


def test_the_states_of_all_tokens_are_not_saved_for_backward():
    """A tensor with all of them has T x width x state_dim numbers."""
    block, x, T = build("Mamba", chunk=8), torch.randn(1, 64, D), 64
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: sizes.append(saved.numel()) or saved, lambda saved: saved):
        block(x).sum()
    assert 0 < sum(sizes) and max(sizes) < T * 2 * D * block.state_dim / 2


def test_initial_decays_are_those_of_the_papers():
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
        own = block.conv.weight[0] + 1  # with the skip, the weight of a token itself is drawn like the others
        assert own.abs().max() <= 0.5 and block.conv.weight[1:].abs().max() <= 0.5 and own.std() > 0.2


@torch.no_grad()
def test_flops_are_those_of_the_products_and_the_scan():
    block, x = build("Mamba2"), torch.randn(1, 3 * C, D)
    with FlopCounterMode(display=False) as counter:
        block(x)
    convolution = 2 * block.conv.weight.numel() * 3 * C
    assert block.flops_per_token(3 * C) * 3 * C == counter.get_total_flops() + convolution
    assert block.flops_per_token(3 * C) == block.flops_per_token(300 * C)
    twice = build("Mamba", state_dim=10)
    for T in (1, 1000):
        more = (twice.flops_per_token(T) - build("Mamba").flops_per_token(T)) / (2 * D)
        assert more == 5 * (6 + 2 * 2)  # for each channel: the scan, and the matrices of write and read


@pytest.mark.parametrize("name", ["Mamba", "Mamba2"])
def test_bad_options_are_one_line(name):
    for option in ("state_dim", "expand", "conv_width", "chunk"):
        one_line_error(lambda option=option: BLOCKS[name](**{option: 0}), f"{option}=0", "at least 1")
    check_wrong_cache(build(name), D)


def test_heads_and_groups_that_do_not_divide_are_one_line():
    one_line_error(lambda: Mamba(D, step_rank=0), "step_rank=0", "at least 1")
    one_line_error(lambda: Mamba2(D, head_dim=5), "head_dim=5", "expand * dim = 24")
    one_line_error(lambda: Mamba2(D, head_dim=4, groups=4), "groups=4", "= 6")
