"""The benchmark of what mixes tokens, at its tiniest: it finds every block that does, and its numbers mean what they say."""

import time

import pytest
import torch
from test_benchmarks import ROOT, rows

from config import ModelConfig


@pytest.fixture
def mixers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import mixers

    monkeypatch.setattr(mixers, "in_new_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(mixers, "SHAPE", ModelConfig(dim=16, num_layers=1, num_heads=2, num_kv_heads=2))
    return mixers


def test_a_table_of_every_length(mixers, capsys):
    words = ("Attn", "SinkAttn(window=8, keep=2)", "Norm->CrossAttn->+")
    arguments = mixers.Arguments(layers=words, lengths=(16, 32, 64), tokens=64, rounds=2, seconds=0.001)
    mixers.measure_all(arguments)
    table = rows(capsys.readouterr().out)
    assert [table[word][0] != "" for word in words] == [True] * 3 and len(table["Attn"]) == 3 + 3
    assert all(float(cell) for cell in table["Attn"][3:5])
    assert 0 < float(table["Attn"][5].split()[0]) < 20


def test_every_block_with_a_cache_is_measured(mixers):
    found = mixers.every_mixer(mixers.SHAPE)
    assert {"Attn", "ValueAttn", "LatentAttn", "CrossAttn", "StridedAttn", "ShortConv", "Attn(window=128)"} <= {*found}
    assert not {"MLP", "Norm", "RMSNorm"} & {*found} and len(set(found)) == len(found)
    for layer in found:
        assert mixers.training_step(layer, mixers.SHAPE, 16, 32)() > 0


def test_growth_is_the_power_of_the_length(mixers):
    lengths = (256, 512, 1024, 2048)
    assert mixers.growth(lengths, (1.0, 1.0, 1.0, 1.0)) == pytest.approx(1)
    assert mixers.growth(lengths, (9.0, 9.0, 2.0, 4.0)) == pytest.approx(2)
    assert mixers.growth(lengths[:2], (3.0, 3.0 * 2**0.5)) == pytest.approx(1.5)


def test_time_per_flop_is_that_of_attention_for_attention(mixers, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    ratios = mixers.compare("Attn(window=4)", mixers.SHAPE, 256, rounds=2, seconds=1)
    work = [mixers.flops(layer, mixers.SHAPE) for layer in ("Attn(window=4)", "Attn")]
    assert ratios == [pytest.approx(work[1] / work[0])] * 2 and work[0] < work[1]


def test_a_step_reaches_every_weight_and_the_losses_of_layers(mixers, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.autograd, "backward", lambda tensors, gradients: seen.append((tensors, gradients)))
    mixers.training_step("Attn", mixers.SHAPE, 16, 32)()
    ((y,), (d_y,)) = seen[0]
    assert y.shape == d_y.shape == (2, 16, 16) and y.requires_grad


def test_lengths_that_do_not_fit_are_told(mixers):
    with pytest.raises(ValueError, match="none of more than tokens=64"):
        mixers.main(mixers.Arguments(lengths=(32, 128), tokens=64))
