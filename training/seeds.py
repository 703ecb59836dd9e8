"""The same config with several seeds, as one group of runs: NAME-seed0, NAME-seed1, …

Side by side, with a thread and a process each, where the machine's cores get more done that way; else one after the other.
"""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from data.cache import say
from modules.registry import build_model
from runs.command_line import Arguments, command
from runs.folder import Run
from tokenizer import load_tokenizer
from training import autotune as probe
from training.machine import choose_device
from training.report import write_report


def member_names(arguments: Arguments) -> list[str]:
    first = arguments.train.seed
    return [f"{arguments.name}-seed{seed}" for seed in range(first, first + arguments.seeds)]


def members(arguments: Arguments) -> list[Arguments]:
    """What to train: a run for each seed that is not finished. Those that were begun keep the number of their threads.

    Raises ValueError where a run of the group is there and is not to be resumed, or has other configs.
    """
    config = arguments.train
    if Run(arguments.name).folder.exists():
        raise ValueError(f"a single run is called {arguments.name!r}, so no group of seeds can be: take another --name")
    begun = [Run(name) for name in member_names(arguments) if Run(name).folder.exists()]
    if begun and not arguments.resume:
        raise ValueError(f"the run {begun[0].name!r} exists. Take another --name, or go on with the group by --resume")
    if arguments.resume and not begun:
        raise ValueError(f"no run of the group {arguments.name!r} has been begun: leave --resume out")
    if begun and config.threads == "auto":
        config = replace(config, threads=begun[0].train_config.threads)
    if begun and config.data == "auto":
        config = replace(config, data=begun[0].train_config.data)
    chosen = []
    for number, name in enumerate(member_names(arguments)):
        seeded = replace(config, seed=config.seed + number, data_seed=config.seed if arguments.same_data else config.data_seed)
        run = Run(name)
        if run in begun and (run.model_config, run.train_config) != (arguments.model, seeded):
            raise ValueError(f"the run {name!r} has other configs: resume the group with the options that it was begun with")
        if run in begun and not is_over(run) and not run.was_stopped():
            write_report(name)  # it was killed between its last step and its report
        if not (run in begun and is_over(run)):
            chosen.append(replace(arguments, name=name, train=seeded, resume=run in begun, seeds=1, group=arguments.name))
    return chosen


def is_over(run: Run) -> bool:
    """Trained to its end, and reported; or diverged, which it would do again."""
    return (run.folder / "story_losses.json").exists() or run.diverged is not None


def side_by_side(arguments: Arguments, count: int) -> bool:
    """Whether so many runs are sooner done with a thread each, by the speed with one and with all threads. Says so."""
    config, cores = arguments.train, probe.most_threads()
    device = choose_device(config.device)
    if device.type != "cpu" or cores == 1 or count == 1 or config.threads not in ("auto", 1):
        return False
    if config.threads == 1:
        say(f"{count} seeds with one thread each: {min(cores, count)} side by side")
        return True
    model = build_model(arguments.model, load_tokenizer(config.tokenizer).vocab_size)
    with probe.undisturbed():
        way = probe.first_guess(config, probe.micro_batch_sizes(model, config, device), device)
        ways = [replace(way, threads=threads) for threads in (1, cores)]
        one, all_of_them = (probe.seconds_per_token(model, config, chosen, device) for chosen in ways)
    rounds = -(-count // cores)
    faster = rounds * one < count * all_of_them
    say(f"{1 / one:,.0f} tokens/s with one thread, {1 / all_of_them:,.0f} with {cores}: {count} seeds are sooner done "
        + (f"side by side, one thread each, {min(cores, count)} at a time" if faster else "one after the other"))  # fmt: skip
    return faster


def train_group(arguments: Arguments, train_one: Callable[[Arguments], bool], python: str):
    """Train every seed, those that were finished before left out. train_one trains a run and tells whether it reached its end.

    A seed that fails is told, and the others go on; ChildProcessError is raised in the end, with their names.
    """
    todo = members(arguments)
    again = f"the same command with --resume, or {python} train.py --name {arguments.name} --seeds {arguments.seeds} --resume"
    finished = arguments.seeds - len(todo)
    if finished:
        say(f"{finished} of {arguments.seeds} seeds are finished")
    failed, stopped = train_members(arguments, todo, train_one)
    if stopped:
        begun = any(Run(name).folder.exists() for name in member_names(arguments))
        print(f"stopped; what was begun is saved. To go on: {again}" if begun else "stopped before anything was begun")
        return
    if failed:
        lines = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise ChildProcessError(f"{len(failed)} of {arguments.seeds} seeds failed, the others are finished ({lines})")
    print(f"""
{arguments.seeds} seeds are finished: {", ".join(member_names(arguments))}
Compare with others:  {python} -m evaluation compare {arguments.name} ANOTHER""")


def train_members(
    arguments: Arguments, todo: list[Arguments], train_one: Callable[[Arguments], bool]
) -> tuple[dict[str, str], bool]:
    """Train these runs of a group the faster way: why some failed, by their names; and whether Ctrl-C came."""
    if side_by_side(arguments, len(todo)) if not arguments.resume else todo and todo[0].train.threads == 1:
        return run_side_by_side([replace(one, train=replace(one.train, threads=1)) for one in todo])
    return run_in_turn(todo, train_one)


def run_in_turn(todo: list[Arguments], train_one: Callable[[Arguments], bool]) -> tuple[dict[str, str], bool]:
    """One after the other, with all threads: why some failed, by their names; and whether Ctrl-C came."""
    failed = {}
    for arguments in todo:
        print(f"\n{arguments.name}:")
        try:
            if not train_one(arguments):
                return failed, True
        except FloatingPointError as error:
            failed[arguments.name] = str(error)
            say(f"{arguments.name}: {error}")
    return failed, False


def words_of(arguments: Arguments) -> list[str]:
    """The command line that trains one run of a group."""
    if arguments.resume:
        line = f"python train.py --name {arguments.name} --resume"
    else:
        line = command(arguments.model, arguments.train, arguments.name, arguments.continue_from) + f" --group {arguments.group}"
    return [sys.executable, str(Path(__file__).parents[1] / "train.py"), *shlex.split(line)[2:]]


@contextmanager
def presses_of_ctrl_c():
    """Gives a list that grows by one with each Ctrl-C, which interrupts nothing: no process is forgotten while it is begun."""
    presses = []
    previous = signal.signal(signal.SIGINT, lambda *_: presses.append(True))
    try:
        yield presses
    finally:
        signal.signal(signal.SIGINT, previous)


def run_side_by_side(todo: list[Arguments], at_a_time: int | None = None) -> tuple[dict[str, str], bool]:
    """A process each, as many at a time as there are cores by default; as `run_in_turn`.

    Ctrl-C lets each finish its step and save. In a terminal each has a line that shows how far it is; a file gets a line for each
    that ends.
    """
    at_a_time = at_a_time or probe.most_threads()
    waiting, running, failed, heard = list(enumerate(todo)), {}, {}, 0
    with presses_of_ctrl_c() as presses, tqdm(total=0, position=len(todo), bar_format="{desc}", disable=None) as line:
        while (waiting and not presses) or running:
            while waiting and not presses and len(running) < at_a_time:
                number, arguments = waiting.pop(0)
                running[arguments.name] = Child(arguments, number)
            if (pressed := len(presses)) > heard:  # another may come meanwhile
                for child in running.values():
                    child.stop(at_once=heard > 0)
                heard = pressed
            for name, child in list(running.items()):
                if child.is_over():
                    del running[name]
                    if child.process.returncode:
                        failed[name] = child.last.removeprefix("error: ")
                    if line.disable:
                        say(f"{name}: {failed.get(name, 'ended')}")
            line.set_description_str(f"{len(running)} running, {len(waiting)} waiting, {len(failed)} failed")
            time.sleep(0.1)
    return failed, bool(presses)


class Child:
    """A training in a process of its own, with a line of the terminal that shows what it said last."""

    def __init__(self, arguments: Arguments, position: int):
        # In a session of its own, so that Ctrl-C comes to it once, by us, and not by the terminal, too.
        self.process = subprocess.Popen(
            words_of(arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
            start_new_session=True, env={**os.environ, "TQDM_MININTERVAL": "0.5"},
        )  # fmt: skip
        self.name, self.last = arguments.name, "begins"
        self.line = tqdm(total=0, position=position, bar_format="{desc}", disable=None)
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        for text in self.process.stdout:  # a progress bar ends its lines with \r, which counts as an end here
            if text.strip():
                self.last = text.strip()
                self.line.set_description_str(f"{self.name}: {self.last[:100]}")

    def is_over(self) -> bool:
        if self.process.poll() is None:
            return False
        self.reader.join()
        self.line.close()
        return True

    def stop(self, at_once: bool):
        """Windows gives Ctrl-C to all processes of a terminal by itself."""
        if at_once:
            self.process.kill()
        elif sys.platform != "win32":
            self.process.send_signal(signal.SIGINT)
