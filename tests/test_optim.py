"""Promises of optim.py and schedules.py: the learning rate against torch's schedulers, and which weights are moved by what."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.optim import lr_scheduler

from config import NAMES, ModelConfig, TrainConfig
from conftest import MODEL
from model import GPT
from training.losses import LOSSES
from training.optim import OPTIMIZERS, Muon, average_of_weights, build_optimizers, orthogonalise
from training.schedules import SCHEDULES, build_schedule, growing_batch_size, growing_window, scheduled_learning_rate


def ours(num_steps, **options):
    config = TrainConfig(max_steps=num_steps, max_minutes=None, **options)
    schedule = build_schedule(config, MODEL)
    return [scheduled_learning_rate(step, num_steps, config, schedule) for step in range(num_steps)]


def theirs(num_steps, make_scheduler, lr_max):
    """The learning rates that a scheduler of torch gives to num_steps steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr_max)
    scheduler, rates = make_scheduler(optimizer), []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


class TestSchedule:
    def test_warm_up_is_linear_lr_a_step_ahead(self):
        """Our first step has a share of the warm-up already, and its last step has lr_max."""
        rates = ours(30, schedule="constant", warmup_steps=10, lr_init=1e-3, lr_max=1e-2)
        linear = theirs(31, lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=10), lr_max=1e-2)
        assert rates == pytest.approx(linear[1:])
        assert rates[9] == pytest.approx(1e-2)

    def test_cosine_is_cosine_annealing(self):
        rates = ours(60, schedule="cosine", warmup_steps=10, lr_max=1e-2, lr_min=1e-4)
        wanted = theirs(50, lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=50, eta_min=1e-4), lr_max=1e-2)
        assert rates[10:] == pytest.approx(wanted)

    @pytest.mark.parametrize("mult, num_restarts, first", [(1, 3, 20), (2, 2, 10), (3, 1, 15)])
    def test_restarts_are_cosine_annealing_warm_restarts(self, mult, num_restarts, first):
        num_steps = sum(first * mult**cycle for cycle in range(num_restarts + 1))
        rates = ours(
            num_steps, schedule="cosine", warmup_steps=0, lr_max=1e-2, lr_min=1e-4,
            num_restarts=num_restarts, restart_mult=float(mult),
        )  # fmt: skip
        wanted = theirs(
            num_steps, lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=first, T_mult=mult, eta_min=1e-4), lr_max=1e-2
        )
        assert rates == pytest.approx(wanted)
        assert sum(rate == pytest.approx(1e-2) for rate in rates) == num_restarts + 1

    def test_linear_is_linear_lr(self):
        rates = ours(50, schedule="linear", warmup_steps=0, lr_max=1e-2, lr_min=1e-3)
        wanted = theirs(50, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=50), lr_max=1e-2)
        assert rates == pytest.approx(wanted)

    def test_wsd_stays_and_decays_in_the_last_fifth(self):
        rates = ours(110, schedule="wsd", warmup_steps=10, lr_max=1e-2, lr_min=1e-3)
        assert rates[10:91] == pytest.approx([1e-2] * 81)
        assert rates[90:] == pytest.approx([1e-2 - 9e-3 * step / 20 for step in range(20)])

    @pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
    @pytest.mark.parametrize("num_restarts, restart_mult", [(0, 1.0), (2, 1.0), (3, 1.7)])
    def test_ends_restarts_and_the_flat_end(self, schedule, num_restarts, restart_mult):
        options = {"schedule": schedule, "num_restarts": num_restarts, "restart_mult": restart_mult}
        rates = ours(1000, warmup_steps=50, final_flat_steps=30, lr_max=1e-2, lr_min=1e-4, **options)
        assert rates[0] == pytest.approx(1e-2 / 50) and rates[49:51] == pytest.approx([1e-2, 1e-2])
        assert rates[-30:] == [1e-4] * 30
        assert all(1e-4 <= rate <= 1e-2 * (1 + 1e-12) for rate in rates[50:])
        jumps = [step for step in range(51, 970) if rates[step] > rates[step - 1]]
        assert len(jumps) == num_restarts
        for jump in jumps:
            assert rates[jump] == pytest.approx(1e-2, rel=0.03) and rates[jump - 1] == pytest.approx(1e-4, abs=5e-4)
        lengths = [end - begin for begin, end in zip([50, *jumps], [*jumps, 970], strict=True)]
        for before, after in itertools.pairwise(lengths):
            assert after / before == pytest.approx(restart_mult, rel=0.05)

    def test_minutes_that_hold_few_steps_still_end_with_the_decay(self):
        config = TrainConfig(warmup_steps=50, max_minutes=1.0)
        rates = [scheduled_learning_rate(step, 20, config, SCHEDULES["linear"]) for step in range(20)]
        assert max(rates) == config.lr_max == rates[9]
        assert rates[-1] == pytest.approx(config.lr_max / 10)

    def test_steps_that_are_not_known_yet(self):
        """By minutes alone nobody knows at the first step how many there will be."""
        config = TrainConfig(warmup_steps=0)
        assert scheduled_learning_rate(0, math.inf, config, SCHEDULES["linear"]) == config.lr_max


MODELS = {
    "tied": MODEL,
    "untied": replace(MODEL, tied_embeddings=False),
    "gpt2": replace(MODEL, positions="learned", norm="LayerNorm", norm_bias=True, linear_bias=True, gated=False),
    "qk_norm": replace(MODEL, qk_norm=True, num_layers=2),
    "no_affine": replace(MODEL, norm_affine=False),
}


def optimizers_of(model_config: ModelConfig, optimizer: str):
    model = GPT(model_config, vocab_size=50)
    names = {id(weight): name for name, weight in model.named_parameters()}
    config = TrainConfig(optimizer=optimizer, weight_decay=0.3, embedding_decay=0.2, betas=(0.8, 0.9), eps=1e-6)
    return model, names, build_optimizers(model, config)


@pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
@pytest.mark.parametrize("model_config", MODELS.values(), ids=MODELS)
class TestGroups:
    def test_every_weight_is_in_exactly_one_group(self, model_config, optimizer):
        _, names, optimizers = optimizers_of(model_config, optimizer)
        grouped = [id(weight) for one in optimizers for group in one.param_groups for weight in group["params"]]
        assert len(grouped) == len(set(grouped)) and set(grouped) == set(names)

    def test_decay_of_matrices_and_of_embeddings_and_none_of_norms_and_biases(self, model_config, optimizer):
        _, names, optimizers = optimizers_of(model_config, optimizer)
        for group in (group for one in optimizers for group in one.param_groups):
            for weight in group["params"]:
                name = names[id(weight)]
                free = weight.ndim == 1 or "norm" in name or name.endswith("bias")
                assert group["weight_decay"] == (0.0 if free else 0.2 if "embedding" in name else 0.3), name

    def test_muon_gets_exactly_the_hidden_matrices(self, model_config, optimizer):
        _, names, optimizers = optimizers_of(model_config, optimizer)
        assert [type(one).__name__ for one in optimizers] == (["Muon", "AdamW"] if optimizer == "Muon" else ["AdamW"])
        by_muon = {names[id(weight)] for group in optimizers[0].param_groups for weight in group["params"]}
        hidden = {name for name in names.values() if ".blocks." in name and name.endswith(".weight") and ".w_" in name}
        if optimizer == "Muon":
            assert by_muon == hidden
        for group in optimizers[-1].param_groups:
            assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-6)


class TestMuon:
    @pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 40), (2, 40, 8)])
    def test_updates_are_nearly_orthogonal_in_the_directions_of_the_gradient(self, shape):
        """Against U V^T of torch's singular value decomposition."""
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
        ours = orthogonalise(matrices)
        before, singular = torch.linalg.svdvals(matrices), torch.linalg.svdvals(ours)
        not_tiny = before > 0.05 * before.amax(dim=1, keepdim=True)
        assert not_tiny.float().mean() > 0.8 and singular[not_tiny].min() > 0.7 and singular.max() < 1.3
        cosine = (ours * (u @ vh)).sum(dim=(1, 2)) / ours.norm(dim=(1, 2)) / (u @ vh).norm(dim=(1, 2))
        assert cosine.min() > 0.99

    def test_steps_are_those_of_torch_up_to_its_bfloat16_and_fewer_digits(self):
        torch.manual_seed(0)
        weights = [torch.randn(24, 8), torch.randn(24, 8), torch.randn(8, 8)]
        gradients = [torch.randn_like(weight) for weight in weights]
        moved = []
        for make in (
            lambda ws: Muon(ws, lr=0.1, weight_decay=0.1),
            lambda ws: torch.optim.Muon(ws, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        ):
            trained = [torch.nn.Parameter(weight.clone()) for weight in weights]
            optimizer = make(trained)
            for _ in range(3):
                for weight, gradient in zip(trained, gradients, strict=True):
                    weight.grad = gradient.clone()
                optimizer.step()
            moved.append([weight.detach() - before for weight, before in zip(trained, weights, strict=True)])
        for ours, theirs in zip(*moved, strict=True):
            assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.96
            assert ours.norm() == pytest.approx(theirs.norm().item(), rel=0.2)


def test_the_average_of_weights_is_the_recurrence():
    model = torch.nn.Linear(3, 2)
    average = average_of_weights(model, decay=0.5)
    expected = None
    for step in range(6):
        with torch.no_grad():
            model.weight.normal_()
        average.update_parameters(model)
        keep = min(0.5, (1 + step) / (10 + step))
        expected = model.weight.clone() if expected is None else keep * expected + (1 - keep) * model.weight
    torch.testing.assert_close(average.module.weight, expected)
    for lr_fraction in (0.1, 0.0):  # at a low learning rate there is hardly any noise to average out
        average.lr_fraction = lr_fraction
        average.update_parameters(model.requires_grad_(False).apply(lambda layer: layer.weight.normal_()))
        torch.testing.assert_close(average.module.weight, model.weight)


def test_muon_takes_its_own_share_of_the_learning_rate():
    config = TrainConfig(optimizer="Muon", muon_lr_scale=0.4)
    muon, adamw = build_optimizers(GPT(MODEL, 50), config)
    assert [group["lr_scale"] for group in muon.param_groups] == [0.4]
    assert {group["lr_scale"] for group in adamw.param_groups} == {1.0}


class TestWarmUps:
    def test_the_batch_doubles_until_half_of_the_run(self):
        config = TrainConfig(batch_size=16, batch_size_start=4)
        sizes = [growing_batch_size(done / 100, config) for done in range(101)]
        assert [size for size, _ in itertools.groupby(sizes)] == [4, 8, 16]
        assert sizes[24] == 4 and sizes[25] == 8 and sizes[50] == 16
        assert growing_batch_size(0.0, TrainConfig(batch_size=16)) == 16

    def test_the_window_grows_until_half_of_the_run(self):
        config = TrainConfig(window_start=32)
        windows = [growing_window(done / 100, config, 256) for done in range(101)]
        assert windows[0] == 32 and windows[25] == 144 and windows[49] < 256 and set(windows[50:]) == {None}
        assert windows[:50] == sorted(windows[:50])
        assert growing_window(0.0, TrainConfig(), 256) is None


def test_the_command_line_knows_all_names_of_ours():
    """Without torch, which the modules with the dicts import."""
    assert NAMES == {"loss": tuple(LOSSES), "optimizer": tuple(OPTIMIZERS), "schedule": tuple(SCHEDULES)}
