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
from random import Random

import pytest
import torch
from errors import one_line_error

from config import TrainConfig
from conftest import MODEL
from conftest import change as change_run
from data.cache import default_cache_dir
from data.dataset import keys
from data.sources import open_source
from inference import load_model
from metrics.story_losses import data_of, read_losses, save_losses
from runs import digests
from runs.code import code_digests, digest
from runs.command_line import Arguments, command
from runs.execution import Stage
from runs.files import write_atomically
from runs.folder import Run, run_names
from tokenizer import load_tokenizer, train_tokenizer
from train import train
from training import autotune
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


    def test_files_of_ours_have_names_in_ascii(self):
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
        assert listed.stdout.isascii()  # empty outside of git


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


@pytest.fixture
def older_run(tiny_run):
    """A run of an older version, without digests: what is in a file is all that can be checked."""
    Run(tiny_run).path(digests.FILE).unlink()
    return tiny_run


class TestDigests:
    def test_a_flipped_bit_is_named(self, tiny_run):
        run, random = Run(tiny_run), Random(0)
        readers = {
            "model.pth": lambda: load_model(tiny_run), "checkpoint.pth": lambda: run.load("checkpoint.pth", set()),
            "tokenizer.json": lambda: load_model(tiny_run), "model_config.json": lambda: run.model_config,
            "train_config.json": lambda: run.train_config, "execution.json": lambda: run.stages, "log_data.csv": run.log,
        }  # fmt: skip
        for file, read in readers.items():
            whole = run.path(file).read_bytes()
            for _ in range(5):
                damaged, at = bytearray(whole), random.randrange(len(whole))
                damaged[at] ^= 1 << random.randrange(8)
                run.path(file).write_bytes(damaged)
                one_line_error(read, f"{file} of the run 'tiny' is damaged or was changed: restore it")
            run.path(file).write_bytes(whole)
            read()

    def test_what_is_saved_is_recorded_and_line_ends_do_not_matter(self, tiny_run):
        run = Run(tiny_run)
        run.save_text("samples.csv", "a\n1\n")
        for path in run.folder.iterdir():
            if path.name != digests.FILE:
                run.read(path.name)
                assert digests.recorded(run.folder, path.name), path.name
        for file in ("samples.csv", digests.FILE):
            run.path(file).write_bytes(run.path(file).read_bytes().replace(b"\n", b"\r\n"))
        assert run.read("samples.csv") == b"a\r\n1\r\n"

    def test_digests_of_code_do_not_depend_on_line_ends(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)
        for content in (b"A = 1\nB = 2\n", b"A = 1\r\nB = 2\r\n"):
            (tmp_path / "some_plugin.py").write_bytes(content)
            assert code_digests(("some_plugin",))["some_plugin"] == digest(b"A = 1\nB = 2\n")

    def test_a_kill_or_a_full_disk_between_a_file_and_its_digest(self, tiny_run):
        run = Run(tiny_run)
        digests.record(run.folder, "README.md", b"new")  # and then the process is killed
        run.save_text("README.md", "old")
        run.save_text("README.md", "new")
        assert run.read("README.md") == b"new"
        with open(run.path(digests.FILE), "ab") as output:
            output.write(b"\n0123456789abcd")  # and then the disk is full
        run.save_text("README.md", "newer")
        assert run.read("README.md") == b"newer"

    def test_who_changes_a_file_is_told_how(self, tiny_run):
        run = Run(tiny_run)
        run.path("README.md").write_text("mine") if (run.folder / "README.md").exists() else run.save_text("README.md", "mine")
        change_json(num_heads=1)(run.path("model_config.json"))
        one_line_error(lambda: run.model_config, "if you changed it, delete the lines on it in digests.txt")
        lines = [line for line in run.path(digests.FILE).read_text().splitlines() if not line.endswith("  model_config.json")]
        run.path(digests.FILE).write_text("\n".join(lines))
        assert run.model_config.num_heads == 1


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
    def test_model_pth(self, older_run, spoil, capsys):
        spoil(Run(older_run).folder / "model.pth")
        with pytest.raises((ValueError, FileNotFoundError), match=r"model\.pth") as error:
            load_model(older_run)
        assert one_line(error) and f"'{older_run}'" in str(error.value)
        assert "ran foreign code" not in capsys.readouterr().out

    @pytest.mark.parametrize("file, key, bad", [("model_config.json", "dim", "x"), ("train_config.json", "betas", 5)])
    def test_config_json(self, older_run, file, key, bad):
        path = Run(older_run).folder / file
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
                load_model(older_run)
            assert one_line(error) and f"'{older_run}'" in str(error.value)
        path.write_bytes(whole)
        load_model(older_run)

    def test_an_unknown_key_is_named(self, older_run):
        change_json(num_layer=3)(Run(older_run).folder / "model_config.json")
        with pytest.raises(ValueError, match=r"has no field 'num_layer'\. Did you mean 'num_layers'\?"):
            load_model(older_run)

    @pytest.mark.parametrize("content", [
        None, b"", b"\n", b"a,b\n1,2\n", b"step\n1\n", b"\xff\xfe\x00\x81", b'"step,to',
        b"step,tokens,seconds,train_loss,validation_loss\na,b,c,d,e\n",
    ])  # fmt: skip
    def test_log_data_csv(self, older_run, content):
        path = Run(older_run).folder / "log_data.csv"
        path.unlink() if content is None else path.write_bytes(content)
        for read in (Run(older_run).log, Run(older_run).log_rows):
            with pytest.raises((ValueError, FileNotFoundError), match=r"log_data\.csv") as error:
                read()
            assert one_line(error) and "'tiny'" in str(error.value)

    @pytest.mark.parametrize("content", [b"{", b"[{}]", b"\xff", b'[{"from_step": 0, "plan": {"dtype": 1}, "machine": {}}]'])
    def test_execution_json(self, older_run, content):
        (Run(older_run).folder / "execution.json").write_bytes(content)
        one_line_error(lambda: Run(older_run).stages, "execution.json of the run 'tiny' is damaged: restore it")

    def test_the_tokenizer_of_an_older_run_has_changed_or_is_missing(self, older_run, tmp_path, stories):
        run, path = Run(older_run), tmp_path / "mine.model"
        run.path("tokenizer.json").unlink()
        change_json(tokenizer=str(path))(run.path("train_config.json"))
        path.write_text(train_tokenizer([*stories, "zq " * 5000], 110, "mine").content, encoding="utf-8")
        one_line_error(lambda: load_model(older_run), "mine.model' has changed since the run 'tiny' was trained")
        path.unlink()
        one_line_error(lambda: load_model(older_run), "mine.model", error=FileNotFoundError)


class TestWhole:
    """A run folder holds what the run needs."""

    def test_a_run_has_its_own_copy_of_the_tokenizer(self, make_config, stories, tmp_path):
        path, config = tmp_path / "mine.model", make_config(tokenizer=str(tmp_path / "mine.model"), max_steps=4)
        path.write_text(train_tokenizer(stories, 110, "mine").content, encoding="utf-8")
        records = train(MODEL, config, "mine-seed0", group="mine")
        next(records)
        records.close()
        before = load_model("mine-seed0")[1].fingerprint
        path.write_text(train_tokenizer([*stories, "zq " * 5000], 110, "mine").content, encoding="utf-8")
        list(train(MODEL, config, "mine-seed0", resume=True))
        list(train(MODEL, config, "further", continue_from="mine-seed0"))
        list(train(MODEL, replace(config, seed=1), "mine-seed1", group="mine"))
        list(train(MODEL, config, "another"))
        path.unlink()
        tokenizers = {name: load_model(name)[1] for name in ("mine-seed0", "further", "mine-seed1", "another")}
        assert [tokenizer.fingerprint == before for tokenizer in tokenizers.values()] == [True, True, True, False]
        assert tokenizers["further"].name == str(path)

    def test_local_data_are_the_same_in_another_working_directory(self, make_config, corpus, tmp_path, monkeypatch):
        monkeypatch.chdir(Path(corpus).parent)
        config = make_config(data=Path(corpus).name, max_steps=2, checkpoint_every=1)
        records = train(MODEL, config, "mine")
        next(records)
        records.close()
        monkeypatch.chdir(tmp_path)
        list(train(MODEL, config, "mine", resume=True))
        save_losses("mine")
        assert Run("mine").train_config.data == "little.txt" and read_losses("mine")[1].data == "little.txt"

    def test_data_that_were_moved_are_found_by_basegpt_data(self, tiny_run, corpus, monkeypatch):
        change_run(tiny_run, "train_config.json", data="../gone/little.txt")
        words = f"seen from {Path.cwd()}", "set BASEGPT_DATA to the folder that holds 'little.txt'"
        one_line_error(lambda: save_losses(tiny_run), *words, error=FileNotFoundError)
        monkeypatch.setenv("BASEGPT_DATA", str(Path(corpus).parent))
        save_losses(tiny_run)
        assert read_losses(tiny_run)[1].data == "little.txt"


def deny(number):
    def denied(*_):
        raise OSError(number, os.strerror(number))

    return denied


class TestNoAccess:
    """A cache, a home or a run folder that cannot be written, or is not there."""

    def test_a_cache_that_cannot_be_written_is_read(self, make_config, monkeypatch, capsys):
        list(train(MODEL, make_config(max_steps=1, warmup_steps=0), "first"))
        monkeypatch.setattr("data.cache.write_atomically", deny(errno.EROFS))
        monkeypatch.setattr(autotune, "SHORT_RUN", 0)  # so that a measurement is to be kept
        monkeypatch.setattr(autotune, "measure", lambda model, config, device, best, sizes: {
            "eager": vars(best), "seconds_per_token": 1e-3, "notes": [], "peaks": {"float32": 1e9, "bfloat16": 0.0},
        })  # fmt: skip
        list(train(MODEL, make_config(max_steps=1, warmup_steps=0), "second"))
        line = next(line for line in capsys.readouterr().err.splitlines() if "measured again next time" in line)
        assert "plan-" in line and "(Read-only file system)" in line and "BASEGPT_CACHE" in line

    def test_a_cache_that_cannot_be_made_is_one_line(self, make_config, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setenv("BASEGPT_CACHE", str(tmp_path / "file" / "cache"))
        words = f"could not write into the cache {tmp_path / 'file' / 'cache'} (", "BASEGPT_CACHE"
        one_line_error(lambda: next(train(MODEL, make_config(), "mine")), *words, error=OSError)
        assert not Run("mine").folder.exists()

    def test_an_account_without_a_home_is_one_line(self, monkeypatch):
        for name in ("BASEGPT_CACHE", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
        one_line_error(default_cache_dir, "set the environment variable BASEGPT_CACHE", error=OSError)

    @pytest.mark.parametrize("number, cure", [
        (errno.ENOSPC, "make room on the disk of"), (errno.EDQUOT, "make room on the disk of"), (errno.EROFS, "BASEGPT_RUNS"),
        (errno.EACCES, "BASEGPT_RUNS"),
    ])  # fmt: skip
    def test_only_a_full_disk_needs_room(self, tiny_run, monkeypatch, number, cure):
        run = Run(tiny_run)
        monkeypatch.setattr("runs.folder.write_atomically", deny(number))
        words = f"could not write README.md of the run 'tiny' ({os.strerror(number)})", cure, str(run.folder), "--resume"
        one_line_error(lambda: run.save_text("README.md", ""), *words, error=OSError)

    def test_a_folder_of_runs_that_cannot_be_made(self, make_config, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setenv("BASEGPT_RUNS", str(tmp_path / "file" / "runs"))
        words = "could not make the folder of the run 'mine' (", str(tmp_path / "file" / "runs"), "BASEGPT_RUNS"
        one_line_error(lambda: Run("mine").create(MODEL, make_config()), *words, error=OSError)


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
    def test_two_writers_of_a_file_do_not_disturb_each_other(self, tmp_path, monkeypatch):
        path, move = tmp_path / "file", os.replace

        def move_after_another(source, target):
            monkeypatch.setattr(os, "replace", move)
            write_atomically(path, b"another")
            move(source, target)

        monkeypatch.setattr(os, "replace", move_after_another)
        write_atomically(path, b"one")
        assert path.read_bytes() == b"one" and [*tmp_path.glob("file*")] == [path]

    def test_a_full_disk_leaves_what_was_there(self):
        """The real thing: the system refuses to make a file longer than 20 kB."""
        Run("mine").folder.mkdir(parents=True)
        done = subprocess.run([sys.executable, "-c", FULL_DISK], cwd=ROOT, capture_output=True, text=True, check=True)
        first, second = done.stdout.splitlines()
        assert first.startswith("could not write checkpoint.pth of the run 'mine'") and "make room" in first
        assert second.startswith("could not write README.md of the run 'mine'")
        assert torch.equal(Run("mine").load("checkpoint.pth", {"numbers"})["numbers"], torch.arange(1000))
        assert Run("mine").path("README.md").read_text(encoding="utf-8") == "before"
        assert {path.name for path in Run("mine").folder.iterdir()} == {"checkpoint.pth", "README.md", digests.FILE}

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

    @pytest.mark.parametrize("writes", [0, 1, 2, 5, 11, 13])
    def test_a_disk_that_is_full_from_the_start_leaves_no_run(self, make_config, monkeypatch, writes):
        """Seven files are written before the first step, and the digest of each."""
        room = iter(range(writes))

        def full(file):
            if next(room, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space left on device\): make room on the disk"):
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
