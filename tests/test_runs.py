"""Promises of runs.py: names that are safe everywhere, files that are whole or named, nothing lost to a kill or a full disk."""

import errno
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from errors import one_line_error

from config import TrainConfig
from conftest import MODEL
from data.dataset import keys
from data.sources import open_source
from inference import load_model
from metrics.story_losses import data_of, read_losses
from runs.command_line import Arguments, command
from runs.execution import Stage
from runs.folder import Run, run_names
from tokenizer import load_tokenizer, train_tokenizer
from train import train
from training.seeds import members

ROOT = Path(__file__).parent.parent


def one_line(error):
    return "\n" not in str(error.value)


class TestNames:
    @pytest.mark.parametrize("name", ["a", "my_run", "0.5m_tall_and_skinny_2026-01-02_03-04-05", "_x", "CONsole", "v1.2", "A-b"])
    def test_safe(self, name):
        assert Run(name).folder.name == name

    @pytest.mark.parametrize("name", [
        "", ".", "..", ".hidden", "a/b/c", "a//b", "a/", "a/.", "a\\b", "../x", "/tmp/x", "a b", "a:b", "a*b", "a?", 'a"',
        "a|b", "a<b", "a\nb", "a\n", "é", "ends.", "CON", "con", "nul.txt", "Aux", "com1", "LPT9.log", "-option", "a\0b",
    ])  # fmt: skip
    def test_not_safe(self, name):
        with pytest.raises(ValueError, match="cannot be a run's name: use letters, digits") as error:
            Run(name)
        assert one_line(error)

    def test_a_run_that_exists_is_never_overwritten(self, tiny_run):
        before = {path: path.read_bytes() for path in Run(tiny_run).folder.iterdir()}
        with pytest.raises(ValueError, match="a run called 'tiny' exists"):
            Run(tiny_run).create(MODEL, TrainConfig())
        assert {path: path.read_bytes() for path in Run(tiny_run).folder.iterdir()} == before

    def test_a_run_and_a_group_never_share_a_name(self, tiny_run):
        Run("mine-seed0").create(MODEL, TrainConfig(), group="mine")
        with pytest.raises(ValueError, match="a group of seeds is called 'mine'"):
            Run("mine").check_is_new()
        with pytest.raises(FileNotFoundError, match="'mine' is a group of seeds: name one of its runs, mine-seed0"):
            load_model("mine")
        with pytest.raises(ValueError, match="a single run is called 'tiny'"):
            members(Arguments(name=tiny_run, seeds=2))

    def test_unknown_runs_name_the_nearest(self, tiny_run):
        with pytest.raises(FileNotFoundError, match=r"no run is called 'tinyy'\. Did you mean 'tiny'\? There are: tiny") as error:
            load_model("tinyy")
        assert one_line(error)

    def test_run_names_are_those_with_a_model(self, tiny_run, make_config):
        Run("empty").create(MODEL, make_config())
        assert run_names() == ["tiny"]


class TestShippedRuns:
    def test_they_load(self, shipped):
        assert run_names() == sorted(shipped)
        for name in shipped:
            model, tokenizer = load_model(name)
            assert model.vocab_size == tokenizer.vocab_size

    def test_they_name_no_path_and_their_readme_says_their_score(self, shipped):
        for name in shipped:
            (losses, scored), config = read_losses(name), Run(name).train_config
            readme = Run(name).path("README.md").read_text(encoding="utf-8")
            assert config.data == scored.data in ("tinystories", "storyworld", "storyworld_small")
            assert f"- trained on {data_of(losses, scored)} with {config.tokenizer}: " in readme
            bits = losses["nats"].sum() / losses["bytes"].sum() / math.log(2)
            assert f"- {bits:.4f} bits per byte, " in readme and f"on all {len(losses):,} validation stories" in readme
            assert f"`{command(Run(name).model_config, config)}`" in readme

    def test_the_storyworld_of_today_is_the_one_it_learned_from(self, shipped, tmp_path):
        run, (_, scored) = Run("1m_storyworld"), read_losses("1m_storyworld")
        config, tokenizer = run.train_config, load_tokenizer(run.train_config.tokenizer)
        world = open_source(config.data)
        options = (run.model_config.max_seq_len, config.packing, config.max_stories, tmp_path)
        assert scored.data_fingerprint == keys(world, tokenizer, *options)[1] == run.load("model.pth", set())["data_fingerprint"]


class TestRoundTrip:
    def test_configs_come_back(self, make_config):
        tile = ("Norm->Attn->+", ["Norm->Attn->+", "Norm->MLP->+"])
        model = replace(MODEL, layers=tile, num_layers=4, embedding_scale="sqrt(dim)")
        config = make_config(betas=(0.5, 0.75), grad_clip=None)
        Run("mine").create(model, config)
        assert (Run("mine").model_config, Run("mine").train_config) == (model, config)

    def test_a_run_records_every_plan_and_machine(self, tiny_run):
        run = Run(tiny_run)
        (first,) = run.stages
        assert first.from_step == 0 and first.plan.dtype == "float32" and first.machine["torch"] == torch.__version__
        assert first.machine.keys() == {"device", "processor", "cores", "torch"} and ":" not in first.machine["processor"]
        run.add_stage(replace(first, from_step=8))
        assert run.stages == [first]
        second = Stage(8, replace(first.plan, threads=7), first.machine)
        for stage, stages in ((second, [first, second]), (second, [first, second]), (replace(first, from_step=8), [first])):
            run.add_stage(stage)  # killed before its next checkpoint, and resumed again
            assert run.stages == stages

    def test_a_loaded_model_is_ready_to_use(self, tiny_run):
        model, tokenizer = load_model(tiny_run)
        assert not model.training
        assert tokenizer.fingerprint == load_tokenizer("bpe_tokenizer_128").fingerprint
        saved = Run(tiny_run).load("model.pth", {"model"})["model"]
        assert all(torch.equal(weight, saved[name]) for name, weight in model.state_dict().items())

    def test_the_log_keeps_every_digit_and_every_gap(self):
        rows = [{"a": 1, "b": 0.1 + 0.2, "c": None}, {"a": 2, "b": 1e-300, "c": 5.5}]
        run = Run("mine")
        run.folder.mkdir(parents=True)
        run.save_log(rows, ["a", "b", "c"])
        assert run.path("log_data.csv").read_bytes() == b"a,b,c\n1,0.30000000000000004,\n2,1e-300,5.5\n"


class Foreign:
    """Something that an unsafe reader of pickles would run."""

    def __reduce__(self):
        return (print, ("ran foreign code",))


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def state_of_another_architecture(path):
    content = torch.load(path, weights_only=True)
    content["model"] = {name: weight[..., :3] for name, weight in content["model"].items()}
    torch.save(content, path)


def weights_that_are_none(path):
    torch.save(torch.load(path, weights_only=True) | {"model": 5}, path)


def change_json(**changes):
    def change(path):
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")

    return change


def without_key(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    del content[next(name for name in content if name != "version")]
    path.write_text(json.dumps(content), encoding="utf-8")


class TestDamage:
    @pytest.mark.parametrize("spoil", [
        lambda path: path.unlink(), lambda path: path.write_bytes(b""), lambda path: path.write_bytes(os.urandom(5000)),
        truncated, lambda path: path.write_bytes(pickle.dumps({"model": 1}, protocol=2)),
        lambda path: path.write_bytes(pickle.dumps(Foreign(), protocol=2)),
        lambda path: torch.save([1, 2], path), lambda path: torch.save({"weights": 2}, path),
        lambda path: torch.save(Foreign(), path), state_of_another_architecture, weights_that_are_none,
        lambda path: path.write_text("a,b\n1,2\n"),
    ], ids=[
        "missing", "empty", "random", "truncated", "pickle", "code in a pickle", "list", "foreign dict", "code", "other shapes",
        "no weights", "text",
    ])  # fmt: skip
    def test_model_pth(self, tiny_run, spoil, capsys):
        spoil(Run(tiny_run).folder / "model.pth")
        with pytest.raises((ValueError, FileNotFoundError), match=r"model\.pth") as error:
            load_model(tiny_run)
        assert one_line(error) and f"'{tiny_run}'" in str(error.value)
        assert "ran foreign code" not in capsys.readouterr().out

    @pytest.mark.parametrize("file, key, bad", [("model_config.json", "dim", "x"), ("train_config.json", "betas", 5)])
    def test_config_json(self, tiny_run, file, key, bad):
        path = Run(tiny_run).folder / file
        whole = path.read_bytes()
        spoilers = [
            lambda path: path.unlink(), lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"\xff\xfe\x00"),
            truncated, lambda path: path.write_text("[1]"), lambda path: path.write_text("null"), change_json(**{key: bad}),
            change_json(**{key: None}), change_json(unknown_key=1), without_key,
        ]  # fmt: skip
        for spoil in spoilers:
            path.write_bytes(whole)
            spoil(path)
            with pytest.raises((ValueError, FileNotFoundError), match=file) as error:
                load_model(tiny_run)
            assert one_line(error) and f"'{tiny_run}'" in str(error.value)
        path.write_bytes(whole)
        load_model(tiny_run)

    def test_an_unknown_key_is_named(self, tiny_run):
        change_json(num_layer=3)(Run(tiny_run).folder / "model_config.json")
        with pytest.raises(ValueError, match=r"has no field 'num_layer'\. Did you mean 'num_layers'\?"):
            load_model(tiny_run)

    @pytest.mark.parametrize("content", [
        None, b"", b"\n", b"a,b\n1,2\n", b"step\n1\n", b"\xff\xfe\x00\x81", b'"step,to',
        b"step,tokens,seconds,train_loss,validation_loss\na,b,c,d,e\n",
    ])  # fmt: skip
    def test_log_data_csv(self, tiny_run, content):
        path = Run(tiny_run).folder / "log_data.csv"
        path.unlink() if content is None else path.write_bytes(content)
        for read in (Run(tiny_run).log, Run(tiny_run).log_rows):
            with pytest.raises((ValueError, FileNotFoundError), match=r"log_data\.csv") as error:
                read()
            assert one_line(error) and "'tiny'" in str(error.value)

    @pytest.mark.parametrize("content", [b"{", b"[{}]", b"\xff", b'[{"from_step": 0, "plan": {"dtype": 1}, "machine": {}}]'])
    def test_execution_json(self, tiny_run, content):
        (Run(tiny_run).folder / "execution.json").write_bytes(content)
        one_line_error(lambda: Run(tiny_run).stages, "execution.json of the run 'tiny' is damaged: restore it")

    def test_the_tokenizer_is_missing_or_has_changed(self, make_config, stories, tmp_path):
        path = tmp_path / "mine.model"
        path.write_text(train_tokenizer(stories, 110, "mine").content, encoding="utf-8")
        list(train(MODEL, make_config(tokenizer=str(path), max_steps=2), "mine"))
        load_model("mine")
        path.write_text(train_tokenizer([*stories, "zq " * 5000], 110, "mine").content, encoding="utf-8")
        with pytest.raises(ValueError, match=r"mine\.model' has changed since the run 'mine' was trained") as error:
            load_model("mine")
        assert one_line(error)
        path.unlink()
        with pytest.raises(FileNotFoundError, match=r"mine\.model") as error:
            load_model("mine")
        assert one_line(error)


FULL_DISK = """
import resource, sys
import torch
from runs.folder import Run
run = Run("mine")
run.save("checkpoint.pth", {"numbers": torch.arange(1000)})
run.save_text("README.md", "before")
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
too_large = {"numbers": torch.arange(100_000)}
for save in (lambda: run.save("checkpoint.pth", too_large), lambda: run.save_text("README.md", "x" * 10**6)):
    try:
        save()
    except OSError as error:
        print(error)
"""

KEEPS_SAVING = """
import itertools, os, sys
import torch
from runs.folder import Run
run = Run("mine")
for line in sys.stdin:  # each asks for a process that saves until it is killed
    child = os.fork()
    if not child:
        for number in itertools.count():
            run.save("checkpoint.pth", {"numbers": torch.full((100_000,), number)})
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


class TestNothingIsLost:
    def test_a_full_disk_leaves_what_was_there(self):
        """The real thing: the system refuses to make a file longer than 20 kB."""
        Run("mine").folder.mkdir(parents=True)
        done = subprocess.run([sys.executable, "-c", FULL_DISK], cwd=ROOT, capture_output=True, text=True, check=True)
        first, second = done.stdout.splitlines()
        assert first.startswith("could not write checkpoint.pth of the run 'mine'") and "make room" in first
        assert second.startswith("could not write README.md of the run 'mine'")
        assert torch.equal(Run("mine").load("checkpoint.pth", {"numbers"})["numbers"], torch.arange(1000))
        assert Run("mine").path("README.md").read_text(encoding="utf-8") == "before"
        assert {path.name for path in Run("mine").folder.iterdir()} == {"checkpoint.pth", "README.md"}

    def test_training_onto_a_full_disk_keeps_the_last_checkpoint(self, make_config, monkeypatch):
        """From step 8 on there is no room any more, and step 10 has something to save."""

        def full(file):
            raise OSError(errno.ENOSPC, "No space left on device")

        wanted = r"could not write \S+ of the run 'mine' \(No space left"
        with monkeypatch.context() as patch, pytest.raises(OSError, match=wanted):
            for record in train(MODEL, make_config(), "mine"):
                if record.step == 8:
                    patch.setattr(os, "fsync", full)
        assert Run("mine").load("checkpoint.pth", {"step"})["step"] == 8
        resumed = list(train(MODEL, make_config(), "mine", resume=True))
        assert [record.step for record in resumed] == list(range(9, 21))

    @pytest.mark.parametrize("files", [0, 1, 2, 3])
    def test_a_disk_that_is_full_from_the_start_leaves_no_run(self, make_config, monkeypatch, files):
        """There is room for so many files: the two configs, and the first weights."""
        room = iter(range(files))

        def full(file):
            if next(room, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space left \S+ \S+: make room and start again"):
            patch.setattr(os, "fsync", full)
            next(train(MODEL, make_config(), "mine"))
        assert not Run("mine").folder.exists()
        assert next(train(MODEL, make_config(), "mine")).step == 1

    def test_a_kill_at_any_moment_leaves_a_whole_file(self):
        run = Run("mine")
        run.folder.mkdir(parents=True)
        path = run.folder / "checkpoint.pth"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen([sys.executable, "-c", KEEPS_SAVING], cwd=ROOT, **pipes) as parent:
            for delay in (0.0, 0.002, 0.003, 0.005, 0.007, 0.012):
                path.unlink(missing_ok=True)
                print(file=parent.stdin, flush=True)
                child = int(parent.stdout.readline())
                while not path.exists():
                    time.sleep(0.001)
                time.sleep(delay)
                os.kill(child, signal.SIGKILL)
                assert parent.stdout.readline() == "dead\n"
                numbers = run.load("checkpoint.pth", {"numbers"})["numbers"]
                assert len(numbers) == 100_000 and (numbers == numbers[0]).all()
