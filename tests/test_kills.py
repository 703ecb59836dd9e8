"""One process trains a run; wherever it is killed, what it has trained goes on bit for bit, and its name can be used again."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from errors import one_line_error
from test_train import assert_same, state, take, words_of

from config import to_json
from conftest import MODEL
from runs.folder import LOCK, Run
from train import train
from training import autotune
from training.seeds import IS_CHILD

ROOT = Path(__file__).parents[1]

HOLDS_THE_LOCK = """
import sys
from runs.folder import Run
from runs.lock import locked
with locked(Run("mine")):
    print("locked", flush=True)
    sys.stdin.read()
"""

TRAINS = """
import json, os, sys
from config import ModelConfig, TrainConfig, from_json
from runs.command_line import Arguments
from runs.folder import Run
from train import train_one
model, config = from_json(ModelConfig, sys.argv[1]), from_json(TrainConfig, sys.argv[2])
for line in sys.stdin:  # each asks for a process that trains and reports until it is killed
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        train_one(Arguments(name="mine", resume=Run("mine").is_begun, model=model, train=config), "python")
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def process(code, *words, **options):
    return subprocess.Popen([sys.executable, "-c", code, *words], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, **options)  # fmt: skip


class TestOwner:
    def test_a_second_trainer_gets_one_line_until_the_first_is_dead(self, make_config):
        config = make_config(max_steps=4)
        take(1, train(MODEL, config, "mine"))
        with process(HOLDS_THE_LOCK) as first:
            first.stdout.readline()
            line = f"the run 'mine' is being trained by process {first.pid} on the host"
            one_line_error(lambda: next(train(MODEL, config, "mine", resume=True)), line)
            first.kill()
        assert Run("mine").path(LOCK).exists()
        assert len(list(train(MODEL, config, "mine", resume=True))) == 3
        assert not (Run("mine").folder / LOCK).exists()

    def test_the_lock_of_another_host_says_how_to_remove_it(self, make_config):
        take(1, train(MODEL, make_config(), "mine"))
        path = Run("mine").folder / LOCK
        path.write_text("123\nanother.host\n")
        words = "is being trained by process 123 on the host another.host", f"If it no longer runs, delete {path}"
        one_line_error(lambda: next(train(MODEL, make_config(), "mine", resume=True)), *words)

    def test_a_second_thread_is_refused(self, make_config):
        errors = []

        def second():
            try:
                next(train(MODEL, make_config(), "second"))
            except ValueError as error:
                errors.append(str(error))

        for _ in train(MODEL, make_config(max_steps=2), "first"):
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()
        assert errors == ["another thread of this process is training: wait until it ends, or train in another process"] * 2
        assert state("first")["step"] == 2 and not Run("second").folder.exists()
        thread = threading.Thread(target=lambda: list(train(MODEL, make_config(max_steps=2), "third")))
        thread.start()
        thread.join()
        assert state("third")["step"] == 2

    def test_a_process_whose_parent_is_gone_saves_and_ends(self, make_config, tmp_path):
        model = replace(MODEL, layers="Norm->Attn->+->Norm->MLP->+->Held->+", plugins=("held_blocks",))
        environment = {"HELD": str(tmp_path / "held"), "PYTHONPATH": str(Path(__file__).parent), IS_CHILD: "1"}
        (tmp_path / "held").mkdir()
        words = [sys.executable, "train.py", *words_of(make_config(), "orphan", model)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(words, cwd=ROOT, env=os.environ | environment, **pipes) as child:
            while child.poll() is None and not any((tmp_path / "held").iterdir()):  # step 4 waits for a signal
                time.sleep(0.02)
            printed, _ = child.communicate(timeout=60)  # closes its input, as the end of its parent does
        assert child.returncode == 0 and state("orphan")["step"] == 4, printed


class TestKills:
    def test_kills_at_random_instants_lose_nothing(self, make_config):
        """SIGKILL while it prepares, trains, saves, evaluates and reports, and then once to the end."""
        config = make_config(max_steps=40, eval_every=10, checkpoint_every=3, eval_stories=200)
        instants, statuses = random.Random(0), []
        with process(TRAINS, to_json(MODEL), to_json(config)) as trainer:
            while not Run("mine").is_reported:
                print(file=trainer.stdin, flush=True)
                child = int(trainer.stdout.readline())
                if len(statuses) < 8:
                    time.sleep(instants.uniform(0.02, 0.5))
                    os.kill(child, signal.SIGKILL)
                statuses.append(int(trainer.stdout.readline()))
                assert statuses[-1] in (0, -signal.SIGKILL)
        list(train(MODEL, config, "whole"))
        assert_same("mine", "whole")
        assert sum(status == -signal.SIGKILL for status in statuses) > 3
        assert not [path.name for path in Run("mine").folder.iterdir() if path.name.startswith((LOCK, "checkpoint.pth."))]

    @pytest.mark.parametrize("files", [0, 5, 8])
    def test_a_name_is_free_if_a_kill_came_before_the_first_checkpoint(self, make_config, files, script):
        config = make_config(max_steps=2)
        Run("mine").create(MODEL, config, group="old")
        for file in ("tokenizer.json", "data_path.txt", "execution.json", "log_data.csv"):
            Run("mine").save_text(file, "")
        for path in sorted(Run("mine").folder.iterdir())[files:]:
            path.unlink()
        assert "Traceback" not in (printed := script("--name", "mine", "--resume")[1])
        assert ("start it again, without --resume" in printed) or files < 8
        list(train(MODEL, config, "mine"))
        assert Run("mine").group is None and state("mine")["step"] == 2

    def test_a_run_that_was_killed_in_its_report_is_reported_by_resume(self, make_config, script):
        config = make_config(max_steps=4)
        code, printed = script(*words_of(config, "mine"))
        Run("mine").path("README.md").unlink()
        one_line_error(lambda: next(train(MODEL, config, "mine", resume=True)), "write_report('mine') writes its report")
        code, again = script("--name", "mine", "--resume")
        assert code == 0 and "writing its report" in again and "bits per byte after 4 steps" in again
        stories = printed[printed.index("Story 1") : printed.index("bits per byte after 4")]
        assert Run("mine").is_reported and stories in again
        assert "is finished after 4 steps. To train it further" in script("--name", "mine", "--resume")[1]

    def test_a_group_killed_before_the_first_save_of_its_second_seed_goes_on(self, make_config, script, monkeypatch):
        monkeypatch.setattr(autotune, "most_threads", lambda: 1)  # in this process, one after the other
        config = make_config(max_steps=3)
        words = [*words_of(config, "group"), "--seeds", "2"]
        script(*words_of(config, "group-seed0"), "--group", "group")
        Run("group-seed1").create(MODEL, replace(config, seed=1), group="group")
        code, printed = script(*words, "--resume")
        assert code == 0 and "2 seeds are finished: group-seed0, group-seed1" in printed, printed
        assert json.loads(Run("group-seed1").read("group.json")) == {"group": "group"}
