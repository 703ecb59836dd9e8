"""Promises of seeds.py: one config, several seeds, one group; resumed where it was stopped; side by side where that is faster."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import MODEL
from evaluation.comparison import compare
from runs.command_line import Arguments, command, parse
from runs.folder import Run, group_members
from train import train
from training import autotune, seeds
from training.report import write_report

ROOT = Path(__file__).parents[1]


def words_of(config, *more):
    return [*shlex.split(command(MODEL, config, "group"))[2:], "--seeds", "2", *more]


@pytest.fixture
def quick(make_config):
    return make_config(max_steps=6, eval_every=3, checkpoint_every=3, threads=1)


def log_of(name):
    return Run(name).log()[["step", "train_loss", "validation_loss"]].values.tolist()


class TestInTurn:
    @pytest.fixture
    def quick(self, quick, monkeypatch):
        """With all threads, of which there is one."""
        monkeypatch.setattr(autotune, "most_threads", lambda: 1)
        return replace(quick, threads="auto")

    def test_a_group_is_what_single_runs_are(self, quick, script):
        code, printed = script(*words_of(quick))
        assert code == 0 and "2 seeds are finished: group-seed0, group-seed1" in printed
        assert group_members("group") == ["group-seed0", "group-seed1"]
        for seed in (0, 1):
            config = replace(quick, seed=seed)
            list(train(MODEL, config, f"alone{seed}"))
            assert Run(f"group-seed{seed}").train_config == config and log_of(f"group-seed{seed}") == log_of(f"alone{seed}")
        assert compare("group", "alone1").candidates["seeds"].tolist() == [2, 1]
        code, printed = script(*words_of(quick))
        assert code == 1 and "the run 'group-seed0' exists" in printed

    def test_the_same_command_goes_on_where_it_was_stopped(self, quick, script):
        script(*words_of(quick))
        wanted = log_of("group-seed1")
        for file in Run("group-seed1").folder.iterdir():
            file.unlink()
        Run("group-seed1").folder.rmdir()
        stopped = train(MODEL, replace(quick, seed=1), "group-seed1", group="group")
        [next(stopped) for _ in range(4)]
        stopped.close()
        before = Run("group-seed0").path("model.pth").stat().st_mtime_ns
        code, printed = script(*words_of(quick, "--resume"))
        assert code == 0 and "1 of 2 seeds are finished" in printed and log_of("group-seed1") == wanted
        assert Run("group-seed0").path("model.pth").stat().st_mtime_ns == before
        code, printed = script("--name", "group", "--seeds", "3", "--resume")
        assert code == 0 and len(group_members("group")) == 3
        code, printed = script(*words_of(replace(quick, lr_max=1e-3), "--resume"))
        assert code == 1 and "'group-seed0' has other configs" in printed

    def test_killed_before_the_report_is_reported_later(self, quick, script):
        script(*words_of(quick))
        Run("group-seed0").path("story_losses.json").unlink()
        assert script(*words_of(quick, "--resume"))[0] == 0
        assert Run("group-seed0").path("story_losses.json").exists()

    def test_the_same_order_of_the_data_by_choice(self, quick, script):
        script(*words_of(quick, "--same_data"))
        assert [Run(name).train_config.data_seed for name in group_members("group")] == [0, 0]
        list(train(MODEL, replace(quick, seed=1, data_seed=0), "alone"))
        list(train(MODEL, replace(quick, seed=1), "other"))
        assert log_of("group-seed1") == log_of("alone") != log_of("other")

    def test_a_seed_that_diverges_is_told_and_the_others_go_on(self, make_config, script):
        hot = make_config(lr_max=1e38, warmup_steps=0, checkpoint_every=1, grad_clip=None)
        code, printed = script(*words_of(hot))
        assert code == 1 and "2 of 2 seeds failed" in printed and "group-seed1: the loss is no longer finite" in printed
        result = compare("group", "group-seed0")
        assert "group-seed0 diverged and is left out" in result.notes[0] and not result.verdicts

    def test_bad_input(self, quick, script):
        assert "no run is called 'nobody'" in script("--name", "nobody", "--seeds", "2", "--resume")[1]
        for count in ("0", "1001"):
            assert f"seeds={count}: give a whole number from 1 to 1000" in script("--seeds", count)[1]


class TestUntilDecided:
    def test_both_groups_grow_until_the_verdict(self, make_run, quick, monkeypatch):
        make_run("base-seed0", seed=0, group="base"), make_run("base-seed1", seed=1, group="base")
        trained, looks = [], iter([False, False, True])
        monkeypatch.setattr(seeds, "train_group", lambda one, *_: trained.append((one.name, one.seeds, one.resume)) or True)
        monkeypatch.setattr(seeds, "is_decided", lambda *_: next(looks))
        idea = Arguments(name="idea", seeds_until_decided="base", model=MODEL, train=quick)
        seeds.train_until_decided(idea, None, "python")
        assert trained == [("base", 2, True), ("idea", 2, False), ("base", 3, True), ("idea", 3, True), ("base", 4, True),
                           ("idea", 4, True)]  # fmt: skip

    def test_a_single_run_is_no_baseline(self, make_run, script):
        make_run("alone")
        code, printed = script("--name", "idea", "--seeds_until_decided", "alone")
        assert code == 1 and "that is a single run. Name a group of seeds" in printed

    @pytest.mark.parametrize("code, decided", [(0, True), (3, False)])
    def test_the_exit_code_of_compare_decides(self, monkeypatch, code, decided):
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=code))
        assert seeds.is_decided("group", "idea") is decided

    def test_groups_that_do_not_compare_end_it(self, monkeypatch):
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
        with pytest.raises(ChildProcessError, match="group and idea could not be compared"):
            seeds.is_decided("group", "idea")


class TestSideBySide:
    @pytest.mark.parametrize("one, both, wanted", [(0.2, 0.15, True), (0.2, 0.09, False)])
    def test_by_measured_speeds(self, quick, monkeypatch, capsys, one, both, wanted):
        monkeypatch.setattr(autotune, "most_threads", lambda: 2)
        monkeypatch.setattr(autotune, "seconds_per_token", lambda model, config, way, device: one if way.threads == 1 else both)
        arguments = Arguments(name="group", seeds=4, model=MODEL, train=replace(quick, threads="auto", device="cpu"))
        assert seeds.side_by_side(arguments, 4) is wanted
        printed = "".join(capsys.readouterr())
        assert ("side by side" in printed) is wanted and ("one after the other" in printed) is not wanted
        assert not seeds.side_by_side(arguments, 1)
        assert not seeds.side_by_side(replace(arguments, train=replace(quick, threads=2)), 4)

    def test_what_failed_says_why(self, quick, monkeypatch):
        monkeypatch.setattr(seeds, "child_command", lambda _: [sys.executable, "-c", "import sys; sys.exit('error: no room')"])
        one = Arguments(name="group-seed0", model=MODEL, train=quick, group="group")
        assert seeds.run_side_by_side([one]) == ({"group-seed0": "no room"}, False)

    def test_the_command_of_a_member(self, quick):
        member = Arguments(name="group-seed3", model=MODEL, train=replace(quick, seed=3), group="group")
        python, script, *words = seeds.child_command(member)
        assert python == sys.executable and script.endswith("train.py")
        assert parse(words) == replace(member, preset=parse(words).preset)


COUNTS = """
import signal, sys, time
presses = []
signal.signal(signal.SIGTERM, lambda *_: presses.append(True))
open(sys.argv[1], "w").close()
while not presses:
    time.sleep(0.01)
time.sleep(0.3)
sys.exit(f"error: {len(presses)} heard")
"""


class TestSignals:
    """A group in processes of its own, stopped in its middle."""

    def test_a_closed_terminal_stops_all_seeds_and_they_resume(self, quick, script, monkeypatch, tmp_path):
        """It sends SIGHUP to the group of processes. What is resumed comes to the numbers of single runs."""
        model = replace(MODEL, layers="Norm->Attn->+->Norm->MLP->+->Held->+", plugins=("held_blocks",))
        words = [*shlex.split(command(model, quick, "group"))[2:], "--seeds", "2"]
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
        held = tmp_path / "held"
        held.mkdir()
        # Both at a time also where there is but one core.
        code = "from training import autotune; autotune.most_threads = lambda: 2; import runpy, sys; "
        code += f"sys.argv = {['', *words]!r}; "
        code += "runpy.run_path('train.py', run_name='__main__')"
        with subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "HELD": str(held)}, start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # which nohup has the tests ignore
        ) as group:  # fmt: skip
            while len(list(held.iterdir())) < 2 and group.poll() is None:
                time.sleep(0.02)
            if group.poll() is None:
                os.killpg(group.pid, signal.SIGHUP)
            printed, _ = group.communicate(timeout=120)
        assert group.returncode == 0 and "2 seeds with one thread each: 2 side by side" in printed
        assert "stopped; what was begun is saved. To go on: the same command with --resume" in printed
        for name in ("group-seed0", "group-seed1"):
            assert Run(name).was_stopped() and not seeds.is_over(Run(name)), printed

        list(train(model, replace(quick, seed=0), "group-seed0", resume=True))
        write_report("group-seed0")
        code, printed = script(*words, "--resume")  # the other one, in a process of its own
        assert code == 0 and "1 of 2 seeds are finished" in printed
        assert "\ngroup-seed1: ended\n" in printed and "\x1b" not in printed  # this is no terminal
        for seed in (0, 1):
            list(train(model, replace(quick, seed=seed), f"alone{seed}"))
            assert log_of(f"group-seed{seed}") == log_of(f"alone{seed}")
            assert json.loads(Run(f"group-seed{seed}").path("group.json").read_text()) == {"group": "group"}

    def test_a_press_is_passed_on_to_each_process_once(self, quick, monkeypatch, tmp_path):
        """As by a service manager, who sends the signal to the first process alone."""
        monkeypatch.setattr(seeds, "child_command", lambda one: [sys.executable, "-c", COUNTS, str(tmp_path / one.name)])

        def press():
            until = time.monotonic() + 60
            while len(list(tmp_path.glob("group-seed*"))) < 2 and time.monotonic() < until:
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGINT)

        todo = [Arguments(name=f"group-seed{seed}", model=MODEL, train=quick) for seed in range(3)]
        threading.Thread(target=press, daemon=True).start()
        failed, stopped = seeds.run_side_by_side(todo, at_a_time=2)
        assert stopped and failed == {"group-seed0": "1 heard", "group-seed1": "1 heard"}

    def test_each_press_is_heard_and_the_second_stops_at_once(self, quick, monkeypatch):
        stops = []

        class Stubborn:
            process = SimpleNamespace(returncode=0)

            def __init__(self, arguments, number):
                os.kill(os.getpid(), signal.SIGINT)  # while it is begun

            def stop(self, at_once):
                stops.append(at_once)
                os.kill(os.getpid(), signal.SIGINT)

            def is_over(self):
                return len(stops) == 2

        monkeypatch.setattr(seeds, "Child", Stubborn)
        todo = [Arguments(name=f"group-seed{seed}", model=MODEL, train=replace(quick, seed=seed)) for seed in range(3)]
        assert seeds.run_side_by_side(todo) == ({}, True) and stops == [False, True]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
