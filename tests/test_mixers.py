"""benchmarks/mixers.py at a tiny size: it measures every block that mixes tokens, and its numbers are right."""

import time

import pytest
import torch
from test_benchmarks import ROOT, rows

import fast
from config import ModelConfig


@pytest.fixture
def mixers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import mixers

    monkeypatch.setattr(mixers, "in_new_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(mixers, "SHAPE", ModelConfig(dim=16, num_layers=1, num_heads=2, num_kv_heads=2))
    return mixers


def test_the_table_has_every_layer_and_length(mixers):
    layers = ("Attn", "SinkAttn(window=8, keep=2)", "Norm->CrossAttn->+")
    arguments = mixers.Arguments(layers=layers, lengths=(16, 32, 64), tokens=64, rounds=2, seconds=0.001)
    from script import page

    table = rows(page(mixers.tables(mixers.measure_all(arguments))))
    assert all(table[layer][0] for layer in layers) and len(table["Attn"]) == 3 + 3
    assert all(float(cell) for cell in table["Attn"][3:5])
    assert 0 < float(table["Attn"][5].split()[0]) < 20


def test_every_block_with_a_cache_is_measured(mixers):
    layers = mixers.every_mixer(mixers.SHAPE)
    assert {"Attn", "ValueAttn", "LatentAttn", "CrossAttn", "StridedAttn", "ShortConv", "Attn(window=128)"} <= {*layers}
    assert not {"MLP", "Norm", "RMSNorm"} & {*layers} and len(set(layers)) == len(layers)
    for layer in layers:
        assert mixers.training_step(layer, mixers.SHAPE, 16, 32, with_kernels=False)() > 0


@pytest.mark.parametrize("with_kernels", [False, True])
def test_the_option_fast_uses_the_kernels(mixers, monkeypatch, with_kernels):
    uses = []
    monkeypatch.setattr(fast, "use", lambda branch, kernels: uses.append(kernels))
    arguments = mixers.Arguments(layers=("Attn",), lengths=(8, 16), tokens=16, rounds=1, seconds=0.001, fast=with_kernels)
    mixers.measure_all(arguments)
    assert set(uses) == {with_kernels}


def test_growth_is_the_power_of_the_length(mixers):
    lengths = (256, 512, 1024, 2048)
    assert mixers.growth(lengths, (1.0, 1.0, 1.0, 1.0)) == pytest.approx(1)
    assert mixers.growth(lengths, (9.0, 9.0, 2.0, 4.0)) == pytest.approx(2)
    assert mixers.growth(lengths[:2], (3.0, 3.0 * 2**0.5)) == pytest.approx(1.5)


def test_time_per_flop_is_that_of_attention_for_attention(mixers, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    ratios = mixers.compare("Attn(window=4)", mixers.SHAPE, 256, rounds=2, seconds=1, with_kernels=False)
    work = [mixers.flops(layer, mixers.SHAPE) for layer in ("Attn(window=4)", "Attn")]
    assert ratios == [pytest.approx(work[1] / work[0])] * 2 and work[0] < work[1]


def test_a_step_reaches_every_weight_and_the_losses_of_layers(mixers, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.autograd, "backward", lambda tensors, gradients: calls.append((tensors, gradients)))
    mixers.training_step("Attn", mixers.SHAPE, 16, 32, with_kernels=False)()
    ((y,), (d_y,)) = calls[0]
    assert y.shape == d_y.shape == (2, 16, 16) and y.requires_grad


def test_lengths_that_do_not_fit_are_an_error(mixers):
    with pytest.raises(ValueError, match="none of more than tokens=64"):
        mixers.main(mixers.Arguments(lengths=(32, 128), tokens=64))
