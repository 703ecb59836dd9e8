"""Promises about optimizers, schedules and losses of a plugin, and about what weights and blocks ask of training."""

import copy
import itertools
import re
from dataclasses import replace
from pathlib import Path

import own_training
import pytest
import torch
from errors import one_line_error
from own_training import Hooked, inverse_sqrt
from test_train import assert_same, state, take, words_of

import fast
from config import TrainConfig
from conftest import MODEL
from inference import load_model
from metrics.cost import cost_of, cost_table, model_cost
from modules.registry import build_model, find_with_options
from runs.folder import Run
from train import train
from training.autotune import verified
from training.configure import configure_for_training
from training.optim import build_optimizers, parameter_groups, step_optimizers
from training.schedules import build_schedule, scheduled_learning_rate
from training.seeds import child_command
from training.trials import try_optimizers

OWN = replace(MODEL, plugins=("own_training",))
HOOKED = replace(OWN, layers="Norm->Attn->+->Norm->MLP->Hooked->+")
DOORS = {
    "optimizer": "Lion(betas=(0.95, 0.98))", "schedule": "inverse_sqrt(end=0.2)", "loss": "z_loss(weight=0.01)", "lr_max": 3e-3,
}  # fmt: skip


class TestARun:
    def test_it_trains_and_is_recorded(self, make_config, script):
        """From the terminal, with all three."""
        config = make_config(**DOORS)
        code, printed = script(*words_of(config, "mine", OWN))
        assert code == 0, printed
        run = Run("mine")
        assert (run.model_config, run.train_config) == (OWN, config)
        log = run.log()
        assert log["validation_loss"].iloc[-1] < log["validation_loss"].iloc[0]
        assert list(log)[-1] == "loss_z_loss" and (log["loss_z_loss"] > log["train_loss"]).all()
        readme = run.path("README.md").read_text(encoding="utf-8")
        assert f"- other losses in the last row of the log: z_loss {log['loss_z_loss'].iloc[-1]:.4g}" in readme
        assert 'loss "z_loss(weight=0.01)" --train.optimizer "Lion(betas=(0.95, 0.98))"' in readme
        model, tokenizer = load_model("mine")
        assert model.config == OWN
        rates = log["learning_rate"].tolist()
        assert rates[-1] == pytest.approx(3e-3 * inverse_sqrt(17 / 18, end=0.2))

    def test_it_resumes_bit_for_bit_with_hooks(self, make_config):
        config = make_config(**DOORS, ema_decay=0.9, micro_batch_size=2)
        take(7, train(HOOKED, config, "parts"))
        list(train(HOOKED, config, "parts", resume=True))
        records = list(train(HOOKED, config, "whole"))
        assert_same("parts", "whole")
        assert records[-1].losses.keys() == {"z_loss"}
        groups = state("whole")["optimizers"][0]["param_groups"]
        assert {group["betas"] for group in groups} == {(0.95, 0.98)}
        assert {(group["weight_decay"], group["lr_scale"]) for group in groups} == {(0.1, 1.0), (0.0, 1.0), (0.02, 0.5)}
        hooked = "layers.0.branches.0.blocks.4"
        weights = state("whole")["model"]
        assert weights[f"{hooked}.scale"].norm().item() == pytest.approx(1.0) and weights[f"{hooked}.scale"].std() > 1e-4
        assert weights[f"{hooked}.gradient_norm"] > 0

    def test_another_run_continues_with_them(self, tiny_run, make_config):
        """Plugins for training are no other architecture."""
        records = list(train(OWN, make_config(**DOORS, max_steps=4), "further", continue_from=tiny_run))
        assert records[-1].losses and Run("further").load("model.pth", {"continued_from"})["continued_from"] == tiny_run

    def test_seeds_get_them_in_their_commands(self, make_config):
        from runs.command_line import Arguments, parse

        arguments = Arguments(name="mine-seed1", model=OWN, train=make_config(**DOORS, seed=1), group="mine")
        parsed = parse(child_command(arguments)[2:])
        assert (parsed.model, parsed.train) == (OWN, arguments.train)

    def test_train_loss_is_the_cross_entropy_of_the_next_token(self, make_config):
        """A first step with another loss has the same train_loss as one with cross-entropy."""
        losses = {}
        for loss in ("cross_entropy", "cross_entropy(label_smoothing=0.2)", "z_loss(weight=1.0)"):
            (record,) = take(1, train(OWN, make_config(loss=loss, micro_batch_size=1), "one"))
            losses[loss] = record.train_loss, record.losses
            Run("one").folder.rename(Run(f"was_{len(losses)}").folder)
        (plain, none), (smooth, others), (penalised, penalty) = losses.values()
        assert none is None and smooth == pytest.approx(plain) and penalised == pytest.approx(plain)
        assert others["cross_entropy"] != pytest.approx(plain) and penalty["z_loss"] > plain + 10

    def test_what_is_minimised_is_the_loss_alone(self):
        """Its gradient is that of the formula, on the targets that count."""
        model = build_model(OWN, 50).train()
        configure_for_training(model, TrainConfig(loss="z_loss(weight=0.5)"))
        fast.use(model, kernels=False, loss_chunk=4)
        tokens = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))
        targets = tokens.masked_fill(tokens < 9, -100)
        _, loss = model(tokens, targets)
        (gradient,) = torch.autograd.grad(loss, model.embedding.weight)
        logits, _ = model.eval()(tokens)
        logits, kept = logits[targets != -100], targets[targets != -100]
        expected = torch.nn.functional.cross_entropy(logits, kept) + 0.5 * logits.logsumexp(dim=1).square().mean()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, model.embedding.weight)[0])

    def test_losses_of_blocks_have_columns(self, make_config):
        """Means over the steps of a row, which a resumed run goes on with."""
        model, config = replace(OWN, layers="Norm->Attn->+->LookAhead->Norm->MLP->+"), make_config(micro_batch_size=2)
        records = take(7, train(model, config, "parts")) + list(train(model, config, "parts", resume=True))
        list(train(model, config, "whole"))
        assert_same("parts", "whole")
        column = Run("parts").log()["loss_ahead"]
        assert len(column) == 2
        for mean, rows in zip(column, (records[:10], records[10:]), strict=True):
            assert mean == pytest.approx(sum(record.losses["ahead"] for record in rows) / 10)


class TestHooks:
    def test_hooks_come_before_and_after_the_step(self):
        events = []

        class Noisy(torch.nn.Linear):
            def before_step(self):
                events.append(("before", self.weight.grad is not None, self.weight.detach().clone()))

            def after_step(self):
                events.append(("after", self.weight.grad is not None, self.weight.detach().clone()))

        model = torch.nn.Sequential(Noisy(3, 3))
        optimizers = build_optimizers(model, TrainConfig(optimizer="Muon"))
        model(torch.ones(2, 3)).sum().backward()
        step_optimizers(model, optimizers)
        (before, had_gradient, old), (after, has_gradient, new) = events
        assert (before, after) == ("before", "after") and had_gradient and has_gradient
        assert not old.equal(new) and new.equal(model[0].weight) and model[0].weight.grad is None

    @pytest.mark.parametrize("change", ["copied", "compiled"])
    def test_they_are_those_of_the_model_that_is_trained(self, change):
        """Not those of the model that a copy was made of."""
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), Hooked(4))
        trained = copy.deepcopy(model) if change == "copied" else model
        if change == "compiled":
            trained.compile(backend="eager")
        untouched = copy.deepcopy(model.state_dict())
        optimizers = build_optimizers(trained, TrainConfig())
        trained(torch.ones(2, 4)).square().sum().backward()
        step_optimizers(trained, optimizers)
        assert trained[1].scale.norm().item() == pytest.approx(1.0) and trained[1].gradient_norm > 0
        if trained is not model:
            assert all(value.equal(untouched[name]) for name, value in model.state_dict().items())


class TestWeights:
    def group_of(self, weight, model, optimizer="Muon"):
        config = TrainConfig(optimizer=optimizer, weight_decay=0.3, embedding_decay=0.2, muon_lr_scale=0.5)
        hidden, others = parameter_groups(model, config, optimizer == "Muon")
        ((kind, group),) = [
            (kind, group) for kind, groups in (("hidden", hidden), ("other", others)) for group in groups
            if any(weight is each for each in group["params"])
        ]  # fmt: skip
        return kind, group["weight_decay"], group["lr_scale"]

    @pytest.mark.parametrize("marks, expected", [
        ({}, ("hidden", 0.3, 0.5)), ({"decay": False}, ("hidden", 0.0, 0.5)), ({"decay": True}, ("hidden", 0.3, 0.5)),
        ({"decay": 0.01}, ("hidden", 0.01, 0.5)), ({"lr_scale": 4}, ("hidden", 0.3, 2.0)),
        ({"by_muon": False}, ("other", 0.3, 1.0)), ({"by_muon": False, "lr_scale": 0.1, "decay": 0}, ("other", 0.0, 0.1)),
    ], ids=str)  # fmt: skip
    def test_a_matrix_says_how_it_is_trained(self, marks, expected):
        model = build_model(MODEL, 50)
        weight = model.layers[0].branches[0].blocks[3].w_in.weight
        vars(weight).update(marks)
        assert self.group_of(weight, model) == expected

    def test_vectors_and_embeddings_say_so_too(self):
        model = build_model(MODEL, 50)
        vector, table = model.norm.weight, model.embedding.weight
        assert self.group_of(vector, model) == ("other", 0.0, 1.0) and self.group_of(table, model) == ("other", 0.2, 1.0)
        vector.decay, table.decay, table.by_muon = True, 0.7, True
        assert self.group_of(vector, model) == ("other", 0.3, 1.0) and self.group_of(table, model) == ("hidden", 0.7, 0.5)

    def test_muon_leaves_heads_inside_of_blocks(self):
        model = build_model(replace(OWN, layers="Norm->MLP->LookAhead->+"), 50)
        assert self.group_of(model.layers[0].branches[0].blocks[2].head.weight, model) == ("other", 0.3, 1.0)

    @pytest.mark.parametrize("change", ["resume", "fast", "checkpointing"])
    def test_their_attributes_last(self, change):
        model = build_model(HOOKED, 50)
        if change == "resume":
            model.load_state_dict(copy.deepcopy(model.state_dict()))
        elif change == "fast":
            fast.use(model, kernels=False, loss_chunk=8)
        else:
            configure_for_training(model, TrainConfig(gradient_checkpointing=True))
        assert self.group_of(model.layers[0].branches[0].blocks[4].scale, model.double()) == ("other", 0.02, 0.5)

    @pytest.mark.parametrize("marks, words", [
        ({"decay": "no"}, ["decay='no' of the weight norm.weight", "False, True for the config's, or a number of at least 0"]),
        ({"decay": -0.1}, ["decay=-0.1"]), ({"decay": float("nan")}, ["decay=nan"]), ({"decay": [0.1]}, ["decay=[0.1]"]),
        ({"lr_scale": 0}, ["lr_scale=0", "give a positive number"]), ({"lr_scale": None}, ["lr_scale=None"]),
        ({"by_muon": 1}, ["by_muon=1", "give True or False"]),
        ({"by_muon": True}, ["by_muon=True of the weight norm.weight", "no matrix", "(16,)"]),
    ], ids=str)  # fmt: skip
    def test_an_impossible_value_is_one_line(self, marks, words):
        model = build_model(MODEL, 50)
        vars(model.norm.weight).update(marks)
        one_line_error(lambda: build_optimizers(model, TrainConfig()), *words)


class TestOptimizers:
    def test_options_win_over_the_config(self):
        model = build_model(OWN, 50)
        for optimizer, options in itertools.product(("Lion", "AdamW"), ("", "(betas=(0.5, 0.6))")):
            (built,) = build_optimizers(model, TrainConfig(optimizer=optimizer + options, betas=(0.8, 0.7)))
            assert {group["betas"] for group in built.param_groups} == {(0.5, 0.6) if options else (0.8, 0.7)}
        (built,) = build_optimizers(model, TrainConfig(optimizer="SGD(momentum=0.9, nesterov=True)", weight_decay=0.3))
        assert built.defaults["momentum"] == 0.9 and built.defaults["nesterov"]
        assert {group["weight_decay"] for group in built.param_groups} == {0.0, 0.3}

    @pytest.mark.parametrize("optimizer, momentum", [("Muon", 0.8), ("Muon(momentum=0.5)", 0.5), ("HiddenSign", 0.8)])
    def test_one_for_hidden_matrices_leaves_the_others_to_adamw(self, optimizer, momentum):
        hidden, adamw = build_optimizers(build_model(OWN, 50), TrainConfig(optimizer=optimizer, muon_momentum=0.8, eps=1e-5))
        assert type(adamw) is torch.optim.AdamW and adamw.defaults["eps"] == 1e-5
        assert momentum in (hidden.defaults.get("momentum"), hidden.defaults.get("betas", (None,))[0])
        assert all(weight.ndim == 2 for group in hidden.param_groups for weight in group["params"])

    @pytest.mark.parametrize("optimizer, words", [
        ("Lyon", ["no optimizer is called 'Lyon'. Did you mean 'Lion'? There are: AdamW, Muon, Lion"]),
        ("Lion(beta=(0.9, 0.9))", ["Lion has no option 'beta'. Did you mean 'betas'? There are: betas"]),
        ("Lion(betas=0.9)", ["Lion(betas=0.9): it must be tuple[float, float]"]),
        ("Lion(lr=0.1)", ["optimizer='Lion(lr=0.1)': parameter groups set lr: give --train.lr_max instead"]),
        ("SGD(weight_decay=0.1)", ["give --train.weight_decay instead"]),
        ("SGD(nesterov=True)", ["cannot be built", "ValueError: Nesterov momentum requires"]),
        ("LBFGS", ["optimizer='LBFGS': its step needs a closure", "take an optimizer whose step works without a closure"]),
        ("Asking", ["optimizer='Asking' fails in a step: TypeError: 'NoneType' object is not callable (own_training.py, line"]),
        ("Idle", ["optimizer='Idle': its steps change no weight: change weights in place, as by weight.sub_(update)"]),
        ("Unsaveable", ["optimizer='Unsaveable': its state cannot be loaded again: keep only tensors and numbers"]),
        ("Strict", ["optimizer='Strict' fails for a weight without a gradient, so skip it if", "(own_training.py, line"]),
        ("Rho", ["optimizer='Rho' needs 'rho', which is no field of the config: write Rho(rho=...)"]),
    ])  # fmt: skip
    def test_a_mistake_is_one_line(self, optimizer, words):
        model = build_model(OWN, 50)

        def prepare():
            build_optimizers(model, TrainConfig(optimizer=optimizer))
            try_optimizers(model, TrainConfig(optimizer=optimizer))

        one_line_error(prepare, *words)

    @pytest.mark.parametrize("field, name", [("optimizer", "Idle"), ("schedule", "broken"), ("loss", "vector")])
    def test_a_mistake_leaves_no_run(self, make_config, field, name):
        one_line_error(lambda: next(train(OWN, make_config(**{field: name}), "broken")), f"{field}={name!r}")
        assert not Run("broken").folder.exists()

    @pytest.mark.parametrize("optimizer, line", [
        ("Lion", ""), ("HiddenSign", ""), ("SGD(momentum=0.9)", ""),
        ("Forgetful", "'Forgetful' would not resume exactly: keep all that lasts from step to step in self.state[weight]"),
        ("Deaf", "'Deaf' changes weights at a learning rate of 0: without group[\"lr\"] the schedule has no effect"),
    ])  # fmt: skip
    def test_a_warning_for_what_would_train_all_the_same(self, optimizer, line, capsys):
        random_state, model = torch.get_rng_state(), build_model(OWN, 50)
        torch.set_rng_state(random_state)
        try_optimizers(model, TrainConfig(optimizer=optimizer))
        printed = capsys.readouterr().err
        assert line in printed and bool(printed) == bool(line) and torch.get_rng_state().equal(random_state)


class TestSchedules:
    def rates(self, schedule, model=OWN, **options):
        config = TrainConfig(schedule=schedule, max_steps=100, warmup_steps=0, lr_max=1.0, lr_min=0.2, **options)
        height = build_schedule(config, model)
        return [scheduled_learning_rate(step, 100, config, height) for step in range(100)]

    def test_one_of_a_plugin_goes_between_lr_max_and_lr_min(self):
        assert self.rates("inverse_sqrt(end=0.5)") == [pytest.approx(0.2 + 0.8 * inverse_sqrt(n / 100, 0.5)) for n in range(100)]
        twice = self.rates("inverse_sqrt", num_restarts=1)
        assert twice[:50] == pytest.approx(twice[50:]) and twice[0] == 1.0

    def test_options_of_ours(self):
        assert self.rates("wsd(decay=1.0)") == pytest.approx(self.rates("linear"))
        assert self.rates("wsd") == self.rates("wsd(decay=0.2)") != self.rates("wsd(decay=0.3)")

    @pytest.mark.parametrize("schedule, words", [
        ("inverse_sqr", ["no schedule is called 'inverse_sqr'. Did you mean 'inverse_sqrt'?"]),
        ("wsd(share=0.3)", ["wsd has no option 'share'", "There are: decay"]),
        ("linear(decay=0.3)", ["linear has no option 'decay'. There are: none"]),
        ("wsd(decay=0.0)", ["schedule='wsd(decay=0.0)' fails at 0 of the run", "decay=0.0: give a number above 0, up to 1"]),
        ("broken", ["schedule='broken' returns nan at 0.301 of the run", "from 0, which is lr_min, to 1, which is lr_max"]),
        ("high", ["schedule='high' returns 1.001 at 0.001 of the run"]), ("text", ["schedule='text' returns 'high'"]),
        ("without_done", ["schedule='without_done' fails at 0 of the run", "TypeError"]),
    ])  # fmt: skip
    def test_a_mistake_is_one_line(self, schedule, words):
        one_line_error(lambda: self.rates(schedule), *words)


class TestLosses:
    @pytest.mark.parametrize("loss, words", [
        ("zloss", ["no loss is called 'zloss'. Did you mean 'z_loss'? There are: cross_entropy, z_loss"]),
        ("z_loss(wait=0.1)", ["z_loss has no option 'wait'", "There are: weight"]),
        ("z_loss(weight='much')", ["z_loss(weight='much'): it must be float"]),
        ("vector", ["loss='vector' returns a tensor of shape (8,): return a tensor with one number, such as the mean"]),
        ("number", ["loss='number' returns", "return a tensor with one number"]),
        ("summed", ["loss='summed' is a sum, twice as large for twice the targets: return the mean"]),
        ("detached", ["loss='detached' has no gradient"]), ("infinite", ["loss='infinite' returns", "it must be finite"]),
        ("of_three", ["loss='of_three' fails: ", "missing 1 required positional argument: 'table'"]),
    ])  # fmt: skip
    def test_a_mistake_is_one_line(self, loss, words):
        model = build_model(OWN, 50)
        one_line_error(lambda: configure_for_training(model, TrainConfig(loss=loss)), *words)

    @pytest.mark.parametrize("name", ["Trigram", "OwnForward"])
    def test_a_model_with_its_own_loss_takes_no_other(self, make_config, name):
        model = replace(MODEL, plugins=("own_training", "own_models"), model=name)
        cure = f"loss='z_loss': the model {name!r} computes its loss itself: leave --train.loss out"
        one_line_error(lambda: next(train(model, make_config(loss="z_loss"), "broken")), cure)
        assert not Run("broken").folder.exists()

    def test_losses_without_that_of_the_next_token_are_one_line(self, make_config):
        unnamed = replace(OWN, model="Unnamed")
        one_line_error(lambda: next(train(unnamed, make_config(), "mine")), "the losses of the model 'Unnamed' lack 'next_token'")

    def test_a_loss_and_random_numbers_raise_no_alarm(self, capsys):
        """Autotuning compares a plan with the plain model."""
        from runs.execution import ExecutionPlan

        model = build_model(replace(OWN, layers="Norm->Attn->+->Noisy->MLP->+"), 50)
        config, plan = TrainConfig(loss="z_loss"), ExecutionPlan("float32", False, 2, 1, compile=False)
        configure_for_training(model, config)
        torch.manual_seed(1)
        assert verified(plan, model, config, torch.device("cpu")) == plan and capsys.readouterr().err == ""


@pytest.mark.parametrize("value, words", [
    ({"LOSSES": {"cubic": torch.nn.CrossEntropyLoss}}, ["LOSSES must name functions"]),
    ({"SCHEDULES": {"up": 1.0}}, ["SCHEDULES must name functions"]),
    ({"OPTIMIZERS": {"Adam": torch.nn.Linear}}, ["OPTIMIZERS must name classes of torch optimizers"]),
    ({"OPTIMIZERS": {"AdamW": torch.optim.SGD}}, ["calls an optimizer 'AdamW', but that name is taken: it is that of 'baseGPT'"]),
    ({"LOSSES": {"cross_entropy": abs}}, ["calls a loss 'cross_entropy', but that name is taken"]),
], ids=str)  # fmt: skip
def test_an_export_of_the_wrong_kind_is_one_line(value, words, monkeypatch):
    ((kind, exports),) = value.items()
    monkeypatch.setattr(own_training, kind, exports)
    one_line_error(lambda: find_with_options(kind, "mine", {"AdamW": None, "cross_entropy": None}, OWN, supplied=1), *words)


def test_the_example_of_contributing_trains(make_config, tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (tmp_path / "my_training.py").write_text(re.search(r"```python\n(# my_training\.py\n.*?)```", page, re.DOTALL)[1])
    monkeypatch.syspath_prepend(tmp_path)
    config = make_config(optimizer="Lion", schedule="inverse_sqrt", loss="z_loss", max_steps=3, eval_every=3)
    (*_, record) = train(replace(MODEL, plugins=("my_training",)), config, "lion")
    assert record.losses["z_loss"] > record.train_loss


class TestTrainingFlops:
    def test_heads_of_training_are_counted(self):
        plain = model_cost(build_model(replace(OWN, layers="Norm->Attn->+->Norm->MLP->+"), 50))
        ahead = model_cost(build_model(replace(OWN, layers="Norm->Attn->+->LookAhead->Norm->MLP->+"), 50))
        head = 2 * MODEL.dim * 50 * (MODEL.max_seq_len - 1) / MODEL.max_seq_len  # of all tokens but the last one
        assert ahead.flops == plain.flops and plain.training_flops == 3 * plain.flops
        assert ahead.training_flops == pytest.approx(3 * (plain.flops + head))

    def test_layers_that_are_dropped_are_not(self):
        head = 2 * MODEL.dim * 50
        for keep in (0.5, 1e-9):
            layers = f"StochasticDepth([Norm->Attn->+->Norm->MLP->+], keep={keep})"
            cost = model_cost(build_model(replace(MODEL, num_layers=4, layers=layers), 50), T=8)
            assert cost.training_flops == pytest.approx(3 * (head + keep * (cost.flops - head)), rel=0.1)

    def test_counting_changes_nothing(self):
        model = build_model(replace(HOOKED, dropout=0.1), 50).eval()
        before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        assert model_cost(model, T=8) == model_cost(model, T=8)
        assert torch.get_rng_state().equal(random_state) and not model.training and not model.losses
        assert all(value.equal(before[name]) for name, value in model.state_dict().items())

    def test_the_table_of_costs_and_the_log_have_them(self, make_config):
        model = replace(OWN, layers="Norm->MLP->LookAhead->+")
        list(train(model, make_config(max_steps=3), "ahead"))
        cost = cost_of("ahead")
        assert cost_table("ahead").loc[("FLOPs per token", "all, in training"), "ahead"] == cost.training_flops > 3 * cost.flops
        log = Run("ahead").log()
        assert log["flops"].tolist() == (log["tokens"] * cost.training_flops).tolist()
