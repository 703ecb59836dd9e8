"""What every test stands on, those of experiments too: folders of its own, no network, no screen, one thread; a tiny corpus and a
tiny trained run; and a terminal."""

import itertools
import json
import os
import random
import runpy
import shutil
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from config import ModelConfig, TrainConfig

MODEL = ModelConfig(dim=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=16, max_seq_len=48)
REPOSITORY = Path(__file__).parent
SHAPES = ("5foot11_and_skinnyfat", "short_and_thick", "tall_and_skinny")
SHIPPED = (
    *(f"0.5m_{shape}-seed{seed}" for shape in SHAPES for seed in range(3)), "1m_storyworld", "2m_speedrun",
    "quick_storyworld_small", "quick_tinystories",
)  # fmt: skip


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Runs and the token cache of a test are its own."""
    monkeypatch.setenv("BASEGPT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("BASEGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(autouse=True)
def figures():
    """No test finds the figures of another."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(scope="session")
def shipped_folder(tmp_path_factory):
    """A folder of the runs that come with the repository, without those of whoever runs the tests."""
    folder = tmp_path_factory.mktemp("shipped")
    for name in SHIPPED:
        shutil.copytree(REPOSITORY / "trained_models" / name, folder / name)
    return folder


@pytest.fixture
def shipped(shipped_folder, monkeypatch):
    """The names of the shipped runs, and this test finds them and no others."""
    monkeypatch.setenv("BASEGPT_RUNS", str(shipped_folder))
    return SHIPPED


@pytest.fixture(scope="session")
def stories():
    """500 short stories, all different, some of them longer than the context of MODEL."""
    names, colours = ("Tom", "Lily", "Ben", "Mia", "Sue", "Max"), ("red", "blue", "big", "old")
    things = ("ball", "cat", "hat", "car")
    verbs, ends = ("found", "lost", "saw", "liked"), ("It was fun.", "He was sad.", "The end.")
    told = [
        f"{name} had a {colour} {thing}. One day {name} {verb} the {thing}. {end}" + " So it was." * (number % 7 == 0)
        for number, (name, colour, thing, verb, end) in enumerate(itertools.product(names, colours, things, verbs, ends))
    ]
    return random.Random(0).sample(told, 500)


@pytest.fixture(scope="session")
def corpus(stories, tmp_path_factory):
    """The path of a file with these stories; 200 of them are held out for validation."""
    path = tmp_path_factory.mktemp("corpus") / "little.txt"
    path.write_text("\n\n".join(stories), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def make_config(corpus):
    """A TrainConfig for a few quick steps on the corpus; keywords change it."""

    def make(**changes) -> TrainConfig:
        quick = {
            "data": corpus, "tokenizer": "bpe_tokenizer_128", "batch_size": 4, "max_steps": 20, "max_minutes": None,
            "eval_every": 10, "eval_stories": 200, "checkpoint_every": 8, "warmup_steps": 2, "lr_max": 1e-2,
        }  # fmt: skip
        return TrainConfig(**quick | changes)

    return make


@pytest.fixture
def train_in_parts():
    """Train one run as a whole, and one that is stopped after a step and resumed: all records of the first, the later ones of
    the second."""
    from train import train

    def run(model_config: ModelConfig, config: TrainConfig, stop_at: int, name: str = "parts") -> tuple[list, list]:
        whole = list(train(model_config, config, "whole"))
        for record in train(model_config, config, name):
            if record.step == stop_at:
                break
        return whole, list(train(model_config, config, name, resume=True))

    return run


@pytest.fixture(scope="session")
def trained_folder(make_config, tmp_path_factory):
    """A folder of runs that holds one, "tiny": MODEL after 20 steps."""
    from train import train

    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BASEGPT_RUNS", str(folder / "runs"))
        patch.setenv("BASEGPT_CACHE", str(folder / "cache"))
        for _ in train(MODEL, make_config(), "tiny"):
            pass
    return folder


@pytest.fixture
def tiny_run(trained_folder, folders):
    """The name of a trained run in this test's own folder, to read or to break."""
    shutil.copytree(trained_folder / "runs", folders / "runs", dirs_exist_ok=True)
    return "tiny"


@pytest.fixture
def make_run(tiny_run):
    """`shifted_run`, in this test's own folder."""
    from metrics.story_losses import save_losses

    save_losses(tiny_run)
    return shifted_run


def shifted_run(name, shift=0.0, seed=0, group=None, noise=0.01, **facts):
    """Make a run with losses by story of its own: those of the run "tiny", shifted by some bits per byte, and noise."""
    import numpy as np

    from metrics.story_losses import COLUMNS, read_losses
    from runs.folder import Run

    run = Run(name)
    shutil.copytree(Run("tiny").folder, run.folder)
    losses, _ = read_losses(name)
    random = np.random.default_rng(len(name) + 100 * seed)
    losses["nats"] += np.log(2) * losses["bytes"] * (shift + random.normal(0, noise, len(losses)))
    run.save_log(losses.to_dict("records"), COLUMNS, "story_losses.csv")
    change(name, "train_config.json", seed=seed)
    change(name, "story_losses.json", **facts)
    if group:
        run.save_text("group.json", json.dumps({"group": group}))
    run.path("digests.txt").unlink()  # so that a test may change its files
    return name


def change(name, file, **values):
    """Set some values in a JSON file of a run."""
    from runs.folder import Run

    run = Run(name)
    run.save_text(file, json.dumps(json.loads(run.path(file).read_text()) | values))


@pytest.fixture
def terminal(monkeypatch, capsys):
    """Run a file as from the terminal, without the seconds that a new Python takes: (exit code, output, errors)."""

    def run(file, *words):
        monkeypatch.setattr(sys, "argv", [file, *words])
        code = 0
        try:
            runpy.run_path(str(Path(__file__).with_name(file)), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        output, errors = capsys.readouterr()
        if isinstance(code, str):  # Python prints it, and exits with 1
            code, errors = 1, f"{errors}{code}\n"
        return code, output, errors

    return run


@pytest.fixture
def script(terminal):
    """Run train.py as from the terminal: (exit code, all that it printed)."""

    def run(*words):
        code, output, errors = terminal("train.py", *words)
        return code, output + errors

    return run
