"""Promises of probe.py: it measures, keeps what it learned, falls back in words, and never changes what is trained."""

import copy
import json
import os
import time
from dataclasses import replace

import pytest
import torch
import torch._inductor.config
from errors import one_line_error

from config import TrainConfig
from conftest import MODEL
from data.cache import default_cache_dir
from fast import ops as kernels
from fast.loss import chunked_cross_entropy
from metrics.scores import MAX_LOGITS
from model import GPT, Attention, visible
from training import autotune as probe

CPU = torch.device("cpu")
LONG = TrainConfig(max_minutes=60.0, threads=1, compile=False, batch_size=4)
FOUND = {
    "eager": {"dtype": "float32", "attention": "sdpa", "micro_batch_size": 4, "threads": 1, "compile": False},
    "seconds_per_token": 1e-4, "notes": [], "timed": [], "peaks": {"float32": 1e11, "bfloat16": 5e10},
}  # fmt: skip
COMPILED = {"choices": FOUND["eager"] | {"compile": True}, "gain": 2.0, "wrong": "", "compile_seconds": 30.0}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(MODEL, 50)


@pytest.fixture
def measured(monkeypatch):
    """Measurements that are read from a table instead of the clock."""
    monkeypatch.setattr(probe, "MEASURE_SECONDS", 0.01)
    monkeypatch.setattr(probe, "SHORT_RUN", 0)
    monkeypatch.setattr(probe, "MICRO_BATCH_TOKENS", range(1, 1000))


def test_what_was_measured_is_kept_and_said_in_one_line(model, measured, capsys, monkeypatch):
    first = probe.choose(model, LONG, CPU)
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "this machine: float" in said[0] and "tokens/s" in said[0]
    monkeypatch.setattr(probe, "measure", lambda *_: pytest.fail("measured again"))
    assert probe.choose(model, LONG, CPU) == first
    with pytest.raises(pytest.fail.Exception):  # another shape is another question
        probe.choose(GPT(replace(MODEL, dim=32), 50), LONG, CPU)


def test_the_fastest_is_taken_of_what_is_not_prescribed(model, measured, monkeypatch):
    def seconds(model, config, choices, device):
        slow = (choices.attention != "kernel") + (choices.dtype != "bfloat16") + (choices.micro_batch_size != 2)
        return 1e-4 * (1 + slow)

    monkeypatch.setattr(probe, "seconds_per_token", seconds)
    monkeypatch.setattr(probe, "matmul_peaks", lambda _: {"float32": 1e11, "bfloat16": 4e11})
    chosen = probe.choose(model, LONG, CPU)
    assert (chosen.attention, chosen.dtype, chosen.micro_batch_size, chosen.compile) == ("kernel", "bfloat16", 2, False)
    prescribed = replace(LONG, dtype="float32", micro_batch_size=4)
    chosen = probe.choose(GPT(replace(MODEL, attention="plain"), 50), prescribed, CPU)
    assert (chosen.attention, chosen.dtype, chosen.micro_batch_size) == ("plain", "float32", 4)


def test_the_probe_leaves_no_trace(model, measured):
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    probe.choose(model, LONG, CPU)
    assert torch.equal(torch.get_rng_state(), random) and torch.get_num_threads() == threads
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


def test_compile_that_takes_longer_than_the_run_is_told(model, capsys, monkeypatch):
    monkeypatch.setattr(probe, "difference", lambda *_: "")
    short = replace(LONG, max_minutes=0.1, compile=True)
    assert probe.choose(model, short, CPU).compile  # as it was asked for
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "longer than this run, about 6 s" in said[0]
    assert not probe.choose(model, replace(short, compile="auto"), CPU).compile
    assert capsys.readouterr().err == ""


def test_a_run_that_is_soon_over_is_not_measured(model, monkeypatch):
    monkeypatch.setattr(probe, "measure", lambda *_: pytest.fail("measured"))
    assert probe.choose(model, replace(LONG, max_steps=60, max_minutes=None), CPU).attention == "sdpa"


@pytest.mark.parametrize("minutes, compiles", [(0.6, False), (10.0, True)])
def test_compile_is_taken_where_the_run_is_long_enough(model, minutes, compiles, capsys):
    config = replace(LONG, compile="auto", max_minutes=minutes)
    assert probe.decide(FOUND | {"compiled": COMPILED}, model, config).compile == compiles
    assert ("does not pay" in capsys.readouterr().err) != compiles


def test_compile_is_tried_where_there_is_time_and_something_to_gain(model):
    config = replace(LONG, compile="auto")
    slow, fast = FOUND, FOUND | {"seconds_per_token": 1e-9}
    assert probe.compile_is_worth_trying(slow, model, config, CPU)
    assert not probe.compile_is_worth_trying(fast, model, config, CPU)
    assert not probe.compile_is_worth_trying(slow, model, replace(config, max_minutes=1.0), CPU)
    assert not probe.compile_is_worth_trying(slow, model, replace(config, compile=False), CPU)
    assert not probe.compile_is_worth_trying(slow | {"compiled": COMPILED}, model, config, CPU)  # it is known already


def test_compile_that_was_given_up_is_tried_again_where_there_is_more_time(model):
    given_up, config = FOUND | {"compiled": {"failed": "given up", "limit": 100.0}}, replace(LONG, compile="auto")
    assert not probe.compile_is_worth_trying(given_up, model, config, CPU)
    assert probe.compile_is_worth_trying(given_up, model, replace(config, max_minutes=120.0), CPU)
    failed = FOUND | {"compiled": {"failed": "the disk was full"}}
    assert probe.compile_is_worth_trying(failed, model, config, CPU)


@pytest.mark.parametrize("compiled", [COMPILED, {"failed": "no"}, COMPILED | {"wrong": "logits are off by 3%"}])
def test_without_compile_nothing_is_compiled_whatever_was_found_before(model, compiled, capsys):
    assert not probe.decide(FOUND | {"compiled": compiled}, model, LONG).compile
    assert "compile" not in capsys.readouterr().err.replace("not compiled", "")


def test_what_compile_gains_is_a_ratio_as_the_machine_may_be_busy(model, capsys):
    config = replace(LONG, compile="auto")
    assert probe.decide(FOUND | {"compiled": COMPILED, "seconds_per_token": 1e-5}, model, config).compile
    assert "200,000 tokens/s" in capsys.readouterr().err


def test_compile_that_computes_something_else_is_told_and_not_taken(model, capsys):
    config = replace(LONG, compile="auto", max_minutes=60.0)
    assert not probe.decide(FOUND | {"compiled": COMPILED | {"wrong": "logits are off by 3%"}}, model, config).compile
    assert "other numbers, logits are off by 3%" in capsys.readouterr().err


def test_compile_that_takes_too_long_or_fails_is_given_up(model, monkeypatch):
    config = replace(LONG, compile="auto", micro_batch_size=1)
    began = time.perf_counter()
    given_up = probe.measure_compiled(model, config, FOUND, 1.0, CPU)
    assert given_up == {"failed": "compile was given up after 1 s", "limit": 1.0}
    assert time.perf_counter() - began < 10
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    failed = probe.measure_compiled(model, config, FOUND, 120.0, CPU)["failed"]
    assert failed.startswith("compile failed: ") and "\n" not in failed
    broken = torch._inductor.config.patch({"cpp.cxx": ("false",), "force_disable_caches": True})
    with broken, pytest.raises(ValueError, match=r"torch\.compile fails here") as error:
        probe.choose(model, replace(config, compile=True, max_minutes=0.1), CPU)
    assert "\n" not in str(error.value)


def test_another_result_than_the_plain_way_is_found_and_not_taken(model, measured, monkeypatch, capsys):
    right = probe.Choices("float32", "sdpa", 4, 1, False)
    assert probe.difference(model, LONG, right, CPU) == ""
    assert probe.difference(model, LONG, replace(right, dtype="bfloat16"), CPU) == ""

    def broken(self, q, k, v, first, cache):
        return self.attend(q, k, v, visible(q.shape[2], k.shape[2], first)) * (1.0 if self.backend == "plain" else 1.01)

    monkeypatch.setattr(Attention, "mix", broken)
    assert "off by" in probe.difference(model, LONG, right, CPU)
    assert probe.choose(model, LONG, CPU).attention == "plain"
    assert "other numbers than the plain way" in capsys.readouterr().err


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_of_training_is_compared_too(tied, monkeypatch):
    torch.manual_seed(0)
    model, right = GPT(replace(MODEL, tied_embeddings=tied, dropout=0.2), 50), probe.Choices("float32", "sdpa", 4, 1, False)
    assert probe.difference(model, LONG, right, CPU) == ""
    monkeypatch.setattr("model.chunked_cross_entropy", lambda *given: 1.01 * chunked_cross_entropy(*given))
    assert "the loss is off by 1.0%" in probe.difference(model, LONG, right, CPU)
    assert probe.difference(model, replace(LONG, loss_chunk=None), right, CPU) == ""


@pytest.mark.parametrize("minutes", [0.1, 60.0])
def test_what_is_compiled_on_demand_is_compared_too(model, measured, monkeypatch, capsys, minutes):
    if minutes < 1:
        monkeypatch.setattr(probe, "SHORT_RUN", 20)
    monkeypatch.setattr(probe, "difference", lambda model, config, choices, device: "logits are off by 3%" * choices.compile)
    assert not probe.choose(model, replace(LONG, compile=True, max_minutes=minutes), CPU).compile
    assert "compiled: gives other numbers than the plain way (logits are off by 3%)" in capsys.readouterr().err


def test_rows_at_a_time_are_what_fits_into_memory(model, monkeypatch):
    weights, row = probe.memory_needed(model, LONG, CPU)
    kept = 4 * 4 * model.num_parameters() + 4 * MAX_LOGITS
    assert weights == kept and row > 4 * 48 * 16 * 4
    monkeypatch.setattr(probe, "available_memory", lambda _: weights + 2.5 * row)
    assert probe.micro_batch_sizes(model, LONG, CPU) == [2, 1]
    monkeypatch.setattr(probe, "available_memory", lambda _: weights)
    one_line_error(
        lambda: probe.choose(model, LONG, CPU), "MB", "smaller model", "--train.gradient_checkpointing", error=MemoryError
    )


def test_rows_that_no_longer_fit_are_fewer(model, measured, monkeypatch, capsys):
    prescribed = replace(LONG, micro_batch_size="auto")
    monkeypatch.setattr(probe, "seconds_per_token", lambda model, config, choices, device: 1e-4 / choices.micro_batch_size)
    before = probe.choose(model, prescribed, CPU)
    assert before.micro_batch_size == 4
    weights, row = probe.memory_needed(copy.deepcopy(model), LONG, CPU)
    monkeypatch.setattr(probe, "available_memory", lambda _: weights + 2.5 * row)
    assert probe.choose(model, prescribed, CPU).micro_batch_size == 2
    assert probe.as_before(before, model, prescribed, CPU) == replace(before, micro_batch_size=2)
    assert capsys.readouterr().err.count("2 rows at a time instead of 4") == 2
    assert all(weight.grad is None for weight in model.parameters())
    monkeypatch.setattr(probe, "available_memory", lambda _: weights)
    for again in (lambda: probe.choose(model, prescribed, CPU), lambda: probe.as_before(before, model, prescribed, CPU)):
        one_line_error(again, "smaller model", error=MemoryError)


def test_a_run_goes_on_without_the_compiler_that_it_began_with(model, monkeypatch, capsys):
    def missing():
        raise kernels.BuildError("g++ is gone")

    began_with = probe.Choices("float32", "kernel", 4, 1, False)
    monkeypatch.setattr(kernels, "build", missing)
    assert probe.as_before(began_with, model, LONG, CPU).attention == "sdpa"
    assert "not to the last bit as without a break: g++ is gone" in capsys.readouterr().err


def test_a_compiler_that_failed_is_tried_again(model, measured, monkeypatch):
    def full():
        raise kernels.BuildError("the disk is full")

    monkeypatch.setattr(kernels, "fingerprint", lambda: "of a compiler that is here")
    with monkeypatch.context() as today:
        today.setattr(kernels, "build", full)
        assert probe.choose(model, LONG, CPU).attention == "sdpa"
    assert not list(default_cache_dir().glob("probe-*"))


def test_a_damaged_memory_is_measured_anew(model, measured):
    chosen = probe.choose(model, LONG, CPU)
    (path,) = default_cache_dir().glob("probe-*.json")
    path.write_text("{", encoding="utf-8")
    assert probe.choose(model, LONG, CPU).threads == chosen.threads
    assert "eager" in json.loads(path.read_text(encoding="utf-8"))
    assert not [name for name in os.listdir(path.parent) if name.endswith(str(os.getpid()))]
