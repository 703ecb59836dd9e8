"""Train one config with several seeds, as a group of runs: NAME-seed0, NAME-seed1, ...

The runs train side by side, one thread and one process each, if that is faster on this machine; otherwise one after the other.
"""

import _thread
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
from runs.folder import Run, group_members
from runs.looks import MAX_SEEDS
from tokenizer import load_tokenizer
from training import autotune
from training.checkpoint import is_trained
from training.machine import choose_device
from training.report import write_report
from training.setup import handled

IS_CHILD = "BASEGPT_IS_CHILD"  # the environment variable that marks the processes that run_side_by_side starts


def end_with_parent():
    """In a process of run_side_by_side: save and end when the process that started it is gone."""
    if os.environ.pop(IS_CHILD, None) is None:
        return

    def wait():
        os.read(sys.stdin.fileno(), 1)  # until the parent, which holds the other end of this pipe, has ended
        if sys.platform == "win32":
            _thread.interrupt_main()
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def member_names(arguments: Arguments) -> list[str]:
    seed = arguments.train.seed
    return [f"{arguments.name}-seed{number}" for number in range(seed, seed + arguments.seeds)]


def members(arguments: Arguments) -> list[Arguments]:
    """The arguments of every run that is not finished. A resumed group keeps the data and the number of threads it started with.

    Raises ValueError if runs of the group exist without --resume, or have other configs.
    """
    config = arguments.train
    if Run(arguments.name).folder.exists():
        raise ValueError(f"a single run is called {arguments.name!r}, so no group of seeds can be: take another --name")
    existing = [Run(name) for name in member_names(arguments) if Run(name).is_begun]
    if existing and not arguments.resume:
        raise ValueError(f"the run {existing[0].name!r} exists. Take another --name, or go on with the group by --resume")
    if arguments.resume and not existing:
        raise ValueError(f"no run of the group {arguments.name!r} has been begun: leave --resume out")
    if existing and config.threads == "auto":
        config = replace(config, threads=existing[0].train_config.threads)
    if existing and config.data == "auto":
        config = replace(config, data=existing[0].train_config.data)
    unfinished = []
    for number, name in enumerate(member_names(arguments)):
        seeded = replace(config, seed=config.seed + number, data_seed=config.seed if arguments.same_data else config.data_seed)
        run = Run(name)
        if run in existing and (run.model_config, run.train_config) != (arguments.model, seeded):
            raise ValueError(f"the run {name!r} has other configs: resume the group with the options that it was begun with")
        if run in existing and not is_over(run) and is_trained(run):
            write_report(name)  # it was killed between its last step and its report
        if not (run in existing and is_over(run)):
            unfinished.append(replace(arguments, name=name, train=seeded, resume=run in existing, seeds=1, group=arguments.name))
    return unfinished


def is_over(run: Run) -> bool:
    """Whether the run is finished and reported, or diverged, which it would do again."""
    return run.is_reported or run.diverged is not None


def side_by_side(arguments: Arguments, count: int) -> bool:
    """Measure whether `count` runs finish sooner with one thread each than in turn with all threads; print the result."""
    config, cores = arguments.train, autotune.most_threads()
    device = choose_device(config.device)
    if device.type != "cpu" or cores == 1 or count == 1 or config.threads not in ("auto", 1):
        return False
    if config.threads == 1:
        say(f"{count} seeds with one thread each: {min(cores, count)} side by side")
        return True
    model = build_model(arguments.model, load_tokenizer(config.tokenizer).vocab_size, config.tokenizer)
    with autotune.preserve_random_state_and_threads():
        guess = autotune.first_guess(config, autotune.micro_batch_sizes(model, config, device), device)
        plans = [replace(guess, threads=threads) for threads in (1, cores)]
        one, every = (autotune.seconds_per_token(model, config, plan, device) for plan in plans)
    rounds = -(-count // cores)
    faster = rounds * one < count * every
    say(f"{1 / one:,.0f} tokens/s with one thread, {1 / every:,.0f} with {cores}: {count} seeds are sooner done "
        + (f"side by side, one thread each, {min(cores, count)} at a time" if faster else "one after the other"))  # fmt: skip
    return faster


def train_group(arguments: Arguments, train_one: Callable[[Arguments], bool], python: str) -> bool:
    """Train every seed that is not finished; return False if a signal stopped it. train_one returns False if it was stopped.

    If a seed fails, the others still train; then ChildProcessError is raised with the names and reasons.
    """
    todo = members(arguments)
    again = f"the same command with --resume, or {python} train.py --name {arguments.name} --seeds {arguments.seeds} --resume"
    finished = arguments.seeds - len(todo)
    if finished:
        say(f"{finished} of {arguments.seeds} seeds are finished")
    failed, stopped = train_members(arguments, todo, train_one)
    if stopped:
        any_saved = any(Run(name).is_begun for name in member_names(arguments))
        print(f"stopped; what was begun is saved. To go on: {again}" if any_saved else "stopped before anything was begun")
        return False
    if failed:
        lines = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise ChildProcessError(f"{len(failed)} of {arguments.seeds} seeds failed, the others are finished ({lines})")
    print(f"""
{arguments.seeds} seeds are finished: {", ".join(member_names(arguments))}
Compare with others:  {python} -m evaluation compare {arguments.name} ANOTHER""")
    return True


def train_until_decided(arguments: Arguments, train_one: Callable[[Arguments], bool], python: str):
    """Train as many seeds as the baseline group has, then one more of both at a time, until compare decides between the groups.

    Its test stays valid however often it looks, up to MAX_SEEDS (evaluation/statistics.py). Raises ValueError if the baseline is
    a single run or has more seeds.
    """
    baseline, names = arguments.seeds_until_decided, group_members(arguments.seeds_until_decided)
    if names == [baseline]:
        raise ValueError(f"--seeds_until_decided {baseline}: that is a single run. Name a group of seeds, trained by --seeds 3")
    first = min(map(Run, names), key=lambda run: run.train_config.seed)
    base = Arguments(name=baseline, model=first.model_config, train=first.train_config, resume=True)
    fewest = max(2, len(names), arguments.seeds)
    if fewest > MAX_SEEDS:
        raise ValueError(f"{fewest} seeds: the test is valid up to {MAX_SEEDS}. Train {fewest} of both by --seeds instead")
    for seeds in range(fewest, MAX_SEEDS + 1):
        for group in (base, replace(arguments, resume=arguments.resume or seeds > fewest)):
            if not train_group(replace(group, seeds=seeds), train_one, python):
                return
        print()
        if is_decided(baseline, arguments.name):
            return
    print(f"not decided with {MAX_SEEDS} seeds of each: the difference is too small")


def is_decided(baseline: str, name: str) -> bool:
    """Print the comparison, and return whether one of the groups is better. Raises ChildProcessError if they do not compare."""
    words = [sys.executable, "-m", "evaluation", "compare", baseline, name, "--exit_code"]
    code = subprocess.run(words, cwd=Path(__file__).parents[1]).returncode
    if code not in (0, 3):
        raise ChildProcessError(f"{baseline} and {name} could not be compared; the lines above say why")
    return code == 0


def train_members(
    arguments: Arguments, todo: list[Arguments], train_one: Callable[[Arguments], bool]
) -> tuple[dict[str, str], bool]:
    """Train runs of a group the faster way; return the reasons of failures by name, and whether Ctrl-C was pressed."""
    if side_by_side(arguments, len(todo)) if not arguments.resume else todo and todo[0].train.threads == 1:
        return run_side_by_side([replace(member, train=replace(member.train, threads=1)) for member in todo])
    return run_in_turn(todo, train_one)


def run_in_turn(todo: list[Arguments], train_one: Callable[[Arguments], bool]) -> tuple[dict[str, str], bool]:
    """Train runs one after the other with all threads; return the reasons of failures by name, and whether Ctrl-C was pressed."""
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


def child_command(arguments: Arguments) -> list[str]:
    """Command line that trains one run of a group."""
    if arguments.resume:
        line = f"python train.py --name {arguments.name} --resume"
    else:
        line = command(arguments.model, arguments.train, arguments.name, arguments.continue_from) + f" --group {arguments.group}"
    return [sys.executable, str(Path(__file__).parents[1] / "train.py"), *shlex.split(line)[2:]]


@contextmanager
def record_stops():
    """Yield a list that grows with the first signal to stop, and with each Ctrl-C, so that no process is lost while it starts."""
    stops = []

    def stop(number, frame):
        if not stops or number == signal.SIGINT:  # a closed terminal may send several of the others
            stops.append(number)

    with handled(stop):
        yield stops


@contextmanager
def stopped_on_error(running: dict[str, "Child"]):
    """Stop the processes that still run when an error ends the one that started them."""
    try:
        yield
    finally:
        for child in running.values():
            child.stop(at_once=False)


def run_side_by_side(todo: list[Arguments], at_a_time: int | None = None) -> tuple[dict[str, str], bool]:
    """Train each run in its own process, by default as many at a time as there are cores; return as run_in_turn does.

    Ctrl-C, SIGTERM and SIGHUP let each run finish its step and save; a second Ctrl-C kills them. A terminal shows a progress line
    per run; a file gets one line when a run ends.
    """
    at_a_time = at_a_time or autotune.most_threads()
    waiting, running, failed, obeyed = list(enumerate(todo)), {}, {}, 0
    bar = tqdm(total=0, position=len(todo), bar_format="{desc}", disable=None)
    with record_stops() as stops, bar as line, stopped_on_error(running):
        while (waiting and not stops) or running:
            while waiting and not stops and len(running) < at_a_time:
                number, arguments = waiting.pop(0)
                running[arguments.name] = Child(arguments, number)
            if (received := len(stops)) > obeyed:  # read once: another signal may come in between
                for child in running.values():
                    child.stop(at_once=obeyed > 0)
                obeyed = received
            for name, child in list(running.items()):
                if child.is_over():
                    del running[name]
                    if child.process.returncode:
                        failed[name] = child.last_line.removeprefix("error: ")
                    if line.disable:
                        say(f"{name}: {failed.get(name, 'ended')}")
            line.set_description_str(f"{len(running)} running, {len(waiting)} waiting, {len(failed)} failed")
            time.sleep(0.1)
    return failed, bool(stops)


class Child:
    """A training process, with a line of the terminal that shows its last output."""

    def __init__(self, arguments: Arguments, position: int):
        # In a new session, so that it is stopped by us alone, and not by the terminal as well. Its input is never written to.
        self.process = subprocess.Popen(
            child_command(arguments), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            encoding="utf-8", errors="replace", start_new_session=True,
            env={**os.environ, IS_CHILD: "1", "PYTHONIOENCODING": "utf-8:replace", "TQDM_MININTERVAL": "0.5"},
        )  # fmt: skip
        self.name, self.last_line = arguments.name, "begins"
        self.line = tqdm(total=0, position=position, bar_format="{desc}", disable=None)
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        for text in self.process.stdout:  # the \r of a progress bar ends a line, too
            if text.strip():
                self.last_line = text.strip()
                self.line.set_description_str(f"{self.name}: {self.last_line[:100]}")

    def is_over(self) -> bool:
        if self.process.poll() is None:
            return False
        self.reader.join()
        self.process.stdin.close()
        self.line.close()
        return True

    def stop(self, at_once: bool):
        if at_once:
            self.process.kill()
        elif sys.platform != "win32":  # Windows sends Ctrl-C to all processes of a terminal
            self.process.send_signal(signal.SIGTERM)
