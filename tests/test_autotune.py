"""Promises of training/autotune.py: it measures, remembers, falls back in words, and never changes what is trained."""

import copy
import json
import time
from dataclasses import replace

import pytest
import torch
import torch._inductor.config
from errors import one_line_error

import fast
from config import TrainConfig
from conftest import MODEL
from data.cache import default_cache_dir
from fast import blocks, build
from fast.loss import chunked_cross_entropy
from metrics.scores import MAX_LOGITS
from model import GPT, Attention, causal_attention
from runs.execution import ExecutionPlan
from training import autotune, compile_trial, plan
from training.configure import configure_for_training

CPU = torch.device("cpu")
LONG = TrainConfig(max_minutes=60.0, threads=1, compile=False, batch_size=4)
FOUND = {
    "eager": {"dtype": "float32", "fast": False, "micro_batch_size": 4, "threads": 1, "compile": False},
    "seconds_per_token": 1e-4, "notes": [], "timed": [], "peaks": {"float32": 1e11, "bfloat16": 5e10},
}  # fmt: skip
COMPILED = {"plan": FOUND["eager"] | {"compile": True}, "gain": 2.0, "wrong": "", "compile_seconds": 30.0}


needs_compiler = pytest.mark.skipif(build.fingerprint() == "none", reason="there is no C++ compiler")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(MODEL, 50)


@pytest.fixture
def measured(monkeypatch):
    """Measurements that are read from a table instead of the clock."""
    monkeypatch.setattr(plan, "MEASURE_SECONDS", 0.01)
    monkeypatch.setattr(autotune, "SHORT_RUN", 0)
    monkeypatch.setattr(autotune, "MICRO_BATCH_TOKENS", range(1, 1000))


def test_what_was_measured_is_kept_and_said_in_one_line(model, measured, capsys, monkeypatch):
    first = autotune.choose_plan(model, LONG, CPU)
    before, said = capsys.readouterr().err.strip().splitlines()
    assert before.startswith("measuring") and "this machine: float" in said and "tokens/s" in said
    monkeypatch.setattr(autotune, "measure", lambda *_: pytest.fail("measured again"))
    assert autotune.choose_plan(model, LONG, CPU) == first
    with pytest.raises(pytest.fail.Exception):  # another shape is another question
        autotune.choose_plan(GPT(replace(MODEL, dim=32), 50), LONG, CPU)


@needs_compiler
def test_the_fastest_is_taken_of_what_is_not_prescribed(model, measured, monkeypatch):
    def seconds(model, config, plan, device):
        slow = (not plan.fast) + (plan.dtype != "bfloat16") + (plan.micro_batch_size != 2)
        return 1e-4 * (1 + slow)

    monkeypatch.setattr(autotune, "seconds_per_token", seconds)
    monkeypatch.setattr(autotune, "matmul_peaks", lambda _: {"float32": 1e11, "bfloat16": 4e11})
    chosen = autotune.choose_plan(model, LONG, CPU)
    assert (chosen.fast, chosen.dtype, chosen.micro_batch_size, chosen.compile) == (True, "bfloat16", 2, False)
    prescribed = replace(LONG, fast=False, dtype="float32", micro_batch_size=4)
    chosen = autotune.choose_plan(model, prescribed, CPU)
    assert (chosen.fast, chosen.dtype, chosen.micro_batch_size) == (False, "float32", 4)


def test_measuring_leaves_no_trace(model, measured):
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    autotune.choose_plan(model, LONG, CPU)
    assert torch.equal(torch.get_rng_state(), random) and torch.get_num_threads() == threads
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters()) and not fast.is_used(model)


def test_compile_that_takes_longer_than_the_run_is_told(model, capsys, monkeypatch):
    monkeypatch.setattr(autotune, "difference", lambda *_: "")
    short = replace(LONG, max_minutes=0.1, compile=True)
    assert autotune.choose_plan(model, short, CPU).compile  # as it was asked for
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "longer than this run, about 6 s" in said[0]
    assert not autotune.choose_plan(model, replace(short, compile="auto"), CPU).compile
    assert capsys.readouterr().err == ""


def test_a_run_that_is_soon_over_is_not_measured(model, monkeypatch):
    monkeypatch.setattr(autotune, "measure", lambda *_: pytest.fail("measured"))
    assert autotune.choose_plan(model, replace(LONG, max_steps=60, max_minutes=None), CPU).fast is False


@pytest.mark.parametrize("minutes, compiles", [(0.6, False), (10.0, True)])
def test_compile_is_taken_where_the_run_is_long_enough(model, minutes, compiles, capsys):
    config = replace(LONG, compile="auto", max_minutes=minutes)
    assert autotune.decide(FOUND | {"compiled": COMPILED}, model, config).compile == compiles
    assert ("does not pay" in capsys.readouterr().err) != compiles


def test_compile_is_tried_where_there_is_time_and_something_to_gain(model):
    config = replace(LONG, compile="auto")
    slow, fast = FOUND, FOUND | {"seconds_per_token": 1e-9}
    assert compile_trial.compile_is_worth_trying(slow, model, config, CPU)
    assert not compile_trial.compile_is_worth_trying(fast, model, config, CPU)
    assert not compile_trial.compile_is_worth_trying(slow, model, replace(config, max_minutes=1.0), CPU)
    assert not compile_trial.compile_is_worth_trying(slow, model, replace(config, compile=False), CPU)
    assert not compile_trial.compile_is_worth_trying(slow | {"compiled": COMPILED}, model, config, CPU)  # it is known already


def test_compile_that_was_given_up_is_tried_again_where_there_is_more_time(model):
    given_up, config = FOUND | {"compiled": {"failed": "given up", "limit": 100.0}}, replace(LONG, compile="auto")
    assert not compile_trial.compile_is_worth_trying(given_up, model, config, CPU)
    assert compile_trial.compile_is_worth_trying(given_up, model, replace(config, max_minutes=120.0), CPU)
    failed = FOUND | {"compiled": {"failed": "the disk was full"}}
    assert compile_trial.compile_is_worth_trying(failed, model, config, CPU)


@pytest.mark.parametrize("compiled", [COMPILED, {"failed": "no"}, COMPILED | {"wrong": "logits are off by 3%"}])
def test_without_compile_nothing_is_compiled_whatever_was_found_before(model, compiled, capsys):
    assert not autotune.decide(FOUND | {"compiled": compiled}, model, LONG).compile
    assert "compile" not in capsys.readouterr().err.replace("not compiled", "")


def test_what_compile_gains_is_a_ratio_as_the_machine_may_be_busy(model, capsys):
    config = replace(LONG, compile="auto")
    assert autotune.decide(FOUND | {"compiled": COMPILED, "seconds_per_token": 1e-5}, model, config).compile
    assert "200,000 tokens/s" in capsys.readouterr().err


def test_compile_that_computes_something_else_is_told_and_not_taken(model, capsys):
    config = replace(LONG, compile="auto", max_minutes=60.0)
    assert not autotune.decide(FOUND | {"compiled": COMPILED | {"wrong": "logits are off by 3%"}}, model, config).compile
    assert "other numbers, logits are off by 3%" in capsys.readouterr().err


def test_compile_that_takes_too_long_or_fails_is_given_up(model, monkeypatch):
    config = replace(LONG, compile="auto", micro_batch_size=1)
    began = time.perf_counter()
    given_up = compile_trial.measure_compiled(model, config, FOUND, 1.0, CPU)
    assert given_up == {"failed": "compile was given up after 1 s", "limit": 1.0}
    assert time.perf_counter() - began < 10
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    failed = compile_trial.measure_compiled(model, config, FOUND, 120.0, CPU)["failed"]
    assert failed.startswith("compile failed: ") and "\n" not in failed
    broken = torch._inductor.config.patch({"cpp.cxx": ("false",), "force_disable_caches": True})
    with broken, pytest.raises(ValueError, match=r"torch\.compile fails here") as error:
        autotune.choose_plan(model, replace(config, compile=True, max_minutes=0.1), CPU)
    assert "\n" not in str(error.value)


def wrong_attention(*inputs):
    return 1.01 * causal_attention(*inputs)


@needs_compiler
def test_kernels_that_compute_something_else_are_found_and_not_used(model, measured, monkeypatch, capsys):
    right = ExecutionPlan("float32", True, 4, 1, False)
    assert autotune.difference(model, LONG, right, CPU) == ""
    assert autotune.difference(model, LONG, replace(right, dtype="bfloat16"), CPU) == ""
    monkeypatch.setattr(blocks.SWAPS[True][Attention], "causal_attention", staticmethod(wrong_attention))
    assert "off by" in autotune.difference(model, LONG, right, CPU)
    monkeypatch.setattr(autotune, "seconds_per_token", lambda model, config, plan, device: 2e-4 - 1e-4 * plan.fast)
    assert autotune.choose_plan(model, LONG, CPU).fast is False
    said = capsys.readouterr().err
    assert "our C++ kernels" in said and "gives other numbers than the plain model" in said and "so it is not used" in said


def test_what_pytorch_alone_computes_is_compared_too(model, monkeypatch, capsys):
    plain = ExecutionPlan("float32", False, 4, 1, False)
    assert autotune.difference(model, LONG, plain, CPU) == ""
    assert autotune.difference(model, LONG, replace(plain, dtype="bfloat16"), CPU) == ""
    monkeypatch.setattr(blocks.SWAPS[False][Attention], "causal_attention", staticmethod(wrong_attention))
    assert "off by" in autotune.difference(model, LONG, plain, CPU)
    assert autotune.verified(plain, model, LONG, CPU) == plain
    assert "but there is no simpler plan" in capsys.readouterr().err


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_of_training_is_compared_too(tied, monkeypatch):
    torch.manual_seed(0)
    model, right = GPT(replace(MODEL, tied_embeddings=tied, dropout=0.2), 50), ExecutionPlan("float32", False, 4, 1, False)
    assert autotune.difference(model, LONG, right, CPU) == ""
    monkeypatch.setattr(blocks, "chunked_cross_entropy", lambda *given: 1.01 * chunked_cross_entropy(*given))
    assert "the loss is off by 1.0%" in autotune.difference(model, LONG, right, CPU)
    assert autotune.difference(model, replace(LONG, loss_chunk=None), right, CPU) == ""


@pytest.mark.parametrize("minutes", [0.1, 60.0])
def test_what_is_compiled_on_demand_is_compared_too(model, measured, monkeypatch, capsys, minutes):
    if minutes < 1:
        monkeypatch.setattr(autotune, "SHORT_RUN", 20)
    monkeypatch.setattr(autotune, "difference", lambda model, config, plan, device: "logits are off by 3%" * plan.compile)
    assert not autotune.choose_plan(model, replace(LONG, compile=True, max_minutes=minutes), CPU).compile
    assert "compiled: gives other numbers than the plain model (logits are off by 3%)" in capsys.readouterr().err


def test_rows_at_a_time_are_what_fits_into_memory(model, monkeypatch):
    weights, row = autotune.memory_needed(model, LONG, CPU)
    kept = 4 * 4 * sum(weight.numel() for weight in model.parameters()) + 4 * MAX_LOGITS
    assert weights == kept and row > 4 * 48 * 16 * 4
    monkeypatch.setattr(autotune, "available_memory", lambda _: weights + 2.5 * row)
    assert autotune.micro_batch_sizes(model, LONG, CPU) == [2, 1]
    monkeypatch.setattr(autotune, "available_memory", lambda _: weights)
    one_line_error(
        lambda: autotune.choose_plan(model, LONG, CPU), "MB", "smaller model", "--train.gradient_checkpointing", error=MemoryError
    )


def test_rows_that_no_longer_fit_are_fewer(model, measured, monkeypatch, capsys):
    prescribed = replace(LONG, micro_batch_size="auto")
    monkeypatch.setattr(autotune, "seconds_per_token", lambda model, config, plan, device: 1e-4 / plan.micro_batch_size)
    before = autotune.choose_plan(model, prescribed, CPU)
    assert before.micro_batch_size == 4
    weights, row = autotune.memory_needed(copy.deepcopy(model), LONG, CPU)
    monkeypatch.setattr(autotune, "available_memory", lambda _: weights + 2.5 * row)
    assert autotune.choose_plan(model, prescribed, CPU).micro_batch_size == 2
    assert autotune.resumed_plan(before, model, prescribed, CPU) == replace(before, micro_batch_size=2)
    assert capsys.readouterr().err.count("2 rows at a time instead of 4") == 2
    assert all(weight.grad is None for weight in model.parameters())
    monkeypatch.setattr(autotune, "available_memory", lambda _: weights)
    one_line_error(lambda: autotune.choose_plan(model, prescribed, CPU), "smaller model", error=MemoryError)
    one_line_error(lambda: autotune.resumed_plan(before, model, prescribed, CPU), "smaller model", error=MemoryError)


def test_chunks_of_the_loss_and_checkpointed_layers_need_less(model):
    plain = autotune.memory_needed(GPT(MODEL, 5000), replace(LONG, loss_chunk=None), CPU)[1]
    assert autotune.memory_needed(GPT(MODEL, 5000), replace(LONG, loss_chunk=16), CPU)[1] < 0.5 * plain
    deep, less = GPT(replace(MODEL, num_layers=8), 50), replace(LONG, gradient_checkpointing=True)
    whole = autotune.memory_needed(deep, LONG, CPU)[1]
    configure_for_training(deep, less)
    assert autotune.memory_needed(deep, less, CPU)[1] < 0.5 * whole


class TestCompiler:
    """A machine where it is missing, or was there before."""

    @pytest.fixture
    def missing(self, monkeypatch):
        monkeypatch.setenv("CXX", "nothing")
        monkeypatch.setattr(build, "build", build.build.__wrapped__)  # which does not remember an earlier test's

    def test_without_one_the_plan_is_pytorch_alone_and_says_why(self, model, measured, missing, capsys, monkeypatch):
        assert autotune.choose_plan(model, LONG, CPU).fast is False
        *_, said = capsys.readouterr().err.strip().splitlines()
        assert "PyTorch alone" in said and "$CXX='nothing' is not here: install g++" in said
        monkeypatch.setattr(autotune, "measure", lambda *_: pytest.fail("measured again"))
        assert autotune.choose_plan(model, LONG, CPU).fast is False
        assert "$CXX='nothing' is not here" in capsys.readouterr().err

    def test_kernels_that_are_asked_for_are_an_error_with_the_cure(self, model, missing):
        wanted = "fast=True", "$CXX='nothing' is not here", "install g++, or take --train.fast False"
        one_line_error(lambda: autotune.choose_plan(model, replace(LONG, fast=True), CPU), *wanted)

    def test_a_run_goes_on_without_the_one_that_it_began_with(self, model, missing, capsys):
        began_with = ExecutionPlan("float32", True, 4, 1, False)
        assert autotune.resumed_plan(began_with, model, LONG, CPU) == replace(began_with, fast=False)
        assert "not to the last bit as without a break: fast=True needs a C++ compiler" in capsys.readouterr().err

    def test_one_that_failed_is_tried_again(self, model, measured, monkeypatch):
        def full():
            raise build.BuildError("the disk is full")

        monkeypatch.setattr(build, "fingerprint", lambda: "of a compiler that is here")
        monkeypatch.setattr(build, "build", full)
        assert autotune.choose_plan(model, LONG, CPU).fast is False
        assert not list(default_cache_dir().glob("plan-*"))


def test_a_damaged_memory_is_measured_anew(model, measured):
    chosen = autotune.choose_plan(model, LONG, CPU)
    (path,) = default_cache_dir().glob("plan-*.json")
    path.write_text("{", encoding="utf-8")
    assert autotune.choose_plan(model, LONG, CPU).threads == chosen.threads
    assert "eager" in json.loads(path.read_text(encoding="utf-8"))
