"""Files that an older version wrote, in the state of old_runs/: they mean in today's fields what they meant then."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from errors import one_line_error

from config import PRE_NORM, VERSION, ModelConfig, TrainConfig, from_json, to_json
from conftest import MODEL
from metrics.story_losses import read_losses
from modules.registry import build_model
from runs.execution import ExecutionPlan
from runs.folder import Run
from train import train
from training.checkpoint import saved_plan

OLD_RUNS = Path(__file__).with_name("old_runs")
VALUES = "Shortcut->|->Norm->ValueAttn(residual=False, embedding=True)->+->Norm->MLP->+"
MODELS = {  # the architecture of each run, and how many weights its model.pth holds
    "0.5m_short_and_thick-seed0": (ModelConfig(dim=128, num_layers=2, mlp_dim=352), 1027, 500_736),
    "1m_storyworld": (ModelConfig(num_layers=5, mlp_dim=320), 1027, 993_024),
    "2m_speedrun": (
        ModelConfig(
            dim=160, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=64, max_seq_len=256, activation="ReLU2", gated=False,
            qk_norm=True, zero_init=True, tied_embeddings=False,
            layers=(f"Bigram(size=1536)->Norm->ShortConv(width=2)->|->{VALUES}", f"Shortcut->|->{PRE_NORM}", VALUES),
        ), 2051, 1_965_318,
    ),
}  # fmt: skip
TRAININGS = {
    "0.5m_short_and_thick-seed0": TrainConfig(data="tinystories", max_minutes=6.0, threads=1),
    "1m_storyworld": TrainConfig(data="storyworld", max_minutes=18.0, eval_every=500, grade_stories=64, threads=1),
    "2m_speedrun": TrainConfig(
        data="tinystories", tokenizer="bpe_tokenizer_2048", batch_size=32, batch_size_start=8, max_minutes=10.0,
        optimizer="Muon", muon_lr_scale=0.5, betas=(0.4, 0.99), weight_decay=0.5, embedding_decay=0.5, ema_decay=0.98,
        lr_max=0.009, warmup_steps=30,
    ),
}  # fmt: skip


def old_file(name, config_class):
    file = {ModelConfig: "model_config.json", TrainConfig: "train_config.json"}[config_class]
    return (OLD_RUNS / name / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", MODELS)
class TestOldRuns:
    def test_the_architecture_is_the_same(self, name):
        config, vocab_size, num_parameters = MODELS[name]
        assert from_json(ModelConfig, old_file(name, ModelConfig)) == config
        assert sum(weight.numel() for weight in build_model(config, vocab_size).parameters()) == num_parameters

    def test_the_training_is_the_same(self, name):
        assert from_json(TrainConfig, old_file(name, TrainConfig)) == TRAININGS[name]

    @pytest.mark.parametrize("config_class", [ModelConfig, TrainConfig])
    def test_written_again_it_is_a_file_of_today(self, name, config_class):
        config = from_json(config_class, old_file(name, config_class))
        text = to_json(config)
        assert json.loads(text)["version"] == VERSION
        assert from_json(config_class, text) == config and to_json(from_json(config_class, text)) == text


def old_model(**values):
    """A model_config.json of version 1: the speedrun's, with other values."""
    return json.dumps(json.loads(old_file("2m_speedrun", ModelConfig)) | values)


def old_width(mlp_dim, gated):
    """How wide version 1 made an MLP."""
    return max(8, round(mlp_dim * 2 / 3 / 8) * 8) if gated else mlp_dim


SOME_LAYERS = [
    ("MLP->+", "MLP->+"),
    ("Norm->MLP(mlp_dim=96)->+", "Norm->MLP(mlp_dim=64)->+"),
    ("Norm->MLP(gated=False)->+", "Norm->MLP(gated=False, mlp_dim=480)->+"),
    ("Norm->MLP(gated=False, mlp_dim=96)->+", "Norm->MLP(gated=False, mlp_dim=96)->+"),
    ("MLP(gated=True)->+", "MLP(gated=True)->+"),
    ("Norm->MLP(mlp_dim=None)->+", "Norm->MLP(mlp_dim=None)->+"),
    ("Norm->Attn(window=64)->+->Norm->MoE(mlp_dim=72, num_experts=4)->+",
     "Norm->Attn(window=64)->+->Norm->MoE(mlp_dim=48, num_experts=4)->+"),
    (["MLP(mlp_dim=96)->+", "MLP->+"], ["MLP(mlp_dim=64)->+", "MLP->+"]),
    ({"tile": ["MLP(mlp_dim=96)->+", ["MLP->+", "MLP(mlp_dim=24)->+"]]},
     ("MLP(mlp_dim=64)->+", ["MLP->+", "MLP(mlp_dim=16)->+"])),
]  # fmt: skip


class TestWidths:
    """mlp_dim was the width of an ungated MLP with as many parameters; it is the width."""

    @pytest.mark.parametrize("old, new", SOME_LAYERS, ids=str)
    def test_layers_of_a_gated_config(self, old, new):
        config = from_json(ModelConfig, old_model(layers=old, num_layers=2, gated=True, mlp_dim=480))
        assert (config.layers, config.mlp_dim) == (new, 320)

    @pytest.mark.parametrize("old, new", [
        ("MLP(mlp_dim=96)->+", "MLP(mlp_dim=96)->+"), ("MLP(gated=True)->+", "MLP(gated=True, mlp_dim=320)->+"),
        ("MLP(mlp_dim=96, gated=True)->+", "MLP(mlp_dim=64, gated=True)->+"),
    ])  # fmt: skip
    def test_layers_of_an_ungated_config(self, old, new):
        config = from_json(ModelConfig, old_model(layers=old, gated=False, mlp_dim=480))
        assert (config.layers, config.mlp_dim) == (new, 480)

    @pytest.mark.parametrize("gated", [True, False])
    @pytest.mark.parametrize("mlp_dim", [None, 4, 24, 100, 516])
    def test_every_mlp_is_as_wide_as_it_was(self, gated, mlp_dim):
        steps = {"MLP": {}, "MLP(gated=True)": {"gated": True}, "MLP(gated=False)": {"gated": False},
                 "MLP(mlp_dim=36)": {"mlp_dim": 36}, "MoE(num_experts=2, mlp_dim=60)": {"mlp_dim": 60},
                 "MoE(num_experts=2, gated=False)": {"gated": False}}  # fmt: skip
        text = old_model(dim=24, layers="->".join(steps), num_layers=1, gated=gated, mlp_dim=mlp_dim)
        blocks = build_model(from_json(ModelConfig, text), 50).layers[0].branches[0].blocks
        for block, options in zip(blocks, steps.values(), strict=True):
            asked = {"gated": gated, "mlp_dim": mlp_dim or 4 * 24} | options
            width = getattr(block, "experts", block).w_out.weight.shape[-1]
            assert width == old_width(asked["mlp_dim"], asked["gated"]), options


class TestVersions:
    @pytest.mark.parametrize("config_class", [ModelConfig, TrainConfig])
    @pytest.mark.parametrize("version", [VERSION + 1, "next", None, 1.5])
    def test_a_newer_file_is_refused_in_one_line(self, config_class, version):
        text = json.dumps(json.loads(to_json(config_class())) | {"version": version})
        one_line_error(lambda: from_json(config_class, text), f"version={version!r}", "newer baseGPT", f"up to version {VERSION}")

    def test_the_attention_of_a_machine_is_no_part_of_a_model(self):
        for attention in ("auto", "kernel", "sdpa", "plain"):
            assert from_json(ModelConfig, old_model(attention=attention)) == MODELS["2m_speedrun"][0]
        text = json.dumps(json.loads(to_json(ModelConfig())) | {"attention": "sdpa"})
        one_line_error(lambda: from_json(ModelConfig, text), "no field 'attention'")

    def test_a_field_that_is_missing_is_named_as_ever(self):
        values = json.loads(old_file("2m_speedrun", TrainConfig))
        del values["weight_averaging"]
        one_line_error(lambda: from_json(TrainConfig, json.dumps(values)), "'ema_decay'", "missing", '"ema_decay": null,')

    def test_a_file_without_a_newer_field_means_its_default(self):
        values = json.loads(to_json(TrainConfig()))
        del values["loss"]
        assert from_json(TrainConfig, json.dumps(values)) == TrainConfig()

    def test_every_field_of_today_is_read_from_an_old_file(self):
        for config_class in (ModelConfig, TrainConfig):
            old = json.loads(old_file("2m_speedrun", config_class)).keys()
            today = {field.name for field in fields(config_class)}
            assert old - today <= {"attention", "weight_averaging"} and today - old <= {"ema_decay", "fast", "loss"}


OLD_CHOICES = {"dtype": "bfloat16", "micro_batch_size": 2, "threads": 1, "compile": True}


@pytest.mark.parametrize("attention, fast", [("kernel", True), ("sdpa", False), ("plain", False)])
def test_the_choices_of_an_old_checkpoint_are_a_plan(attention, fast):
    saved = {"choices": OLD_CHOICES | {"attention": attention}}
    plan = ExecutionPlan("bfloat16", fast, 2, 1, compile=True)
    assert saved_plan(saved) == saved_plan({"plan": asdict(plan)}) == plan
    assert saved["choices"]["attention"] == attention, "it is left as it is"


def test_a_run_of_an_older_version_is_resumed(make_config):
    """The files of a stopped run as version 1 wrote them."""
    config = make_config(ema_decay=0.9, batch_size_start=1)
    for name in ("old", "whole"):
        training = train(MODEL, config, name)
        for _ in range(9 if name == "old" else 20):
            next(training)
        training.close()
    run = Run("old")
    as_then = {"model_config.json": {"mlp_dim": 24, "attention": "auto"}, "train_config.json": {"weight_averaging": 0.9}}
    for file, changes in as_then.items():
        values = json.loads(run.path(file).read_text(encoding="utf-8")) | changes
        run.save_text(file, json.dumps({name: values[name] for name in values if name not in ("version", "ema_decay", "fast")}))
    saved = run.load("checkpoint.pth", {"seconds", "overhead_seconds"})
    plan = asdict(run.stages[-1].plan)
    run.path("execution.json").unlink()
    saved["choices"] = plan | {"attention": "kernel" if plan.pop("fast") else "sdpa"}
    saved["seconds"] += saved.pop("overhead_seconds")
    for record in saved["unlogged"]:
        del record["overhead_seconds"]
    run.save_log(run.log().drop(columns="overhead_seconds").to_dict("records"), list(run.log())[:-1])
    run.save("checkpoint.pth", saved)
    assert (run.model_config, run.train_config) == (MODEL, config)

    assert [record.step for record in train(MODEL, config, "old", resume=True)] == list(range(10, 21))
    assert run.seconds_include_overhead() and [stage.from_step for stage in run.stages] == [9]
    for column in ("train_loss", "validation_loss", "gradient_norm"):
        assert run.log()[column].equals(Run("whole").log()[column])
    weights, wanted = (Run(name).load("model.pth", {"model"})["model"] for name in ("old", "whole"))
    assert all(torch.equal(weight, wanted[name]) for name, weight in weights.items())


def test_shipped_runs_are_files_of_today(shipped):
    """And what was scored is still of their weights."""
    for run in map(Run, shipped):
        for file, config in {"model_config.json": run.model_config, "train_config.json": run.train_config}.items():
            assert run.path(file).read_text(encoding="utf-8") == to_json(config)
        read_losses(run.name)
