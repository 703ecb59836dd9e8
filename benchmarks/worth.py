"""Compare presets, or ablations of one, by bits per byte after equal minutes of training.

    python benchmarks/worth.py --runs ../worth --side_by_side 2 --save worth
    python benchmarks/worth.py --runs ../worth --budget clock --presets 1m mamba_like --minutes 5
    python benchmarks/worth.py --runs ../ablations --presets speedrun --ablate all --minutes 2 --save ablations
    python benchmarks/worth.py --runs ../adamw --presets speedrun --ablate tune_AdamW --seeds 1 --minutes 1.25 --save adamw

Presets are also compared by position in the story; --ablate compares one preset with changes of it, one at a time, from
ablations.py. Every preset is trained with every seed, as by train.py, into its own folder in --runs. Finished runs are not
repeated and unfinished ones are resumed, so the command can be stopped at any time and given again.

--budget steps does not depend on the load of the machine: first the speed of each preset is measured, in turns on a quiet
machine (--measure_only stops there), and saved in speeds.json; then each is trained for as many steps as fit into the minutes at
that speed. --budget clock trains for the minutes by the clock, evaluations included.
"""

import itertools
import json
import math
import os
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ablations import changed, chosen_ablations
from preset_speed import RECURRENT
from script import HERE, describe_machine, in_new_process, new_process, page, quartiles, report, run_script
from time_to_loss import are_same, settings_of, with_train
from train_speed import Variant, list_variants, take_turn, warm_up
from worth_tables import draw_differences, draw_positions, tables

from config import TrainConfig
from evaluation.comparison import Candidate, Comparison, compare
from evaluation.statistics import Difference, over_stories
from inference import load_model
from metrics.measures import loss_by_position, token_scores
from metrics.story_losses import validation_stories
from runs.command_line import Arguments as Training
from runs.execution import ExecutionPlan
from runs.folder import Run, runs_folder
from runs.presets import Preset, preset
from tokenizer import load_tokenizer
from training import seeds
from training.checkpoint import saved_plan
from training.schedules import growing_batch_size

EVALUATIONS = 4  # per run with --budget steps
NO_TIME = (  # fields that do not affect the time of a step, or are not part of the measured step
    "lr_init", "lr_max", "lr_min", "warmup_steps", "schedule", "betas", "eps", "weight_decay", "embedding_decay", "muon_lr_scale",
    "muon_momentum", "ema_decay", "grad_clip", "window_start", "batch_size_start",
)  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    runs: Path | None = None  # folder for the runs, created if missing; by default $BASEGPT_RUNS
    presets: tuple[str, ...] = ("1m", *RECURRENT)  # the others are compared with the first
    ablate: tuple[str, ...] = ()  # ablations of a single preset: names in ablations.py, all, or tune_AdamW
    minutes: float = 10.0  # per run
    seeds: int = 3  # per preset, from 0
    budget: Literal["steps", "clock"] = "steps"  # steps that fit into the minutes on a quiet machine, or the clock
    side_by_side: int = 1  # runs at a time, each in its own process
    threads: int = 1  # per run
    data: str = "tinystories"  # any source that training accepts
    set: tuple[str, ...] = ()  # changes of every preset, such as train.lr_max=2e-3
    rounds: int = 9  # turns of each preset in the measurement of speeds
    seconds: float = 3.0  # per turn
    measure_only: bool = False  # only measure the speeds, on a quiet machine; do not train
    position_stories: int = 500  # validation stories for the loss by position
    save: str | None = None  # write the raw results to benchmarks/results/SAVE.json, and plot benchmarks/SAVE.png


@dataclass(frozen=True)
class Speed:
    """Measured speed of a preset on a quiet machine: an entry of speeds.json."""

    settings: dict  # of the preset at that time
    plan: dict  # its ExecutionPlan
    tokens_per_second: list[float]  # by turn
    machine: str


def main(arguments: Arguments):
    check_early(arguments)
    presets = chosen_presets(arguments)
    speeds = {}
    if arguments.budget == "steps":
        speeds = measured_speeds(presets, arguments)
        presets = {name: for_steps(chosen, speeds[name], arguments.minutes) for name, chosen in presets.items()}
        print(speed_table(presets, speeds))
    if arguments.measure_only:
        return
    failed = train_missing(presets, arguments)
    result = compare(*(name for name in presets if any(map(is_scored, seeds.member_names(group_of(name, presets, arguments))))))

    if arguments.ablate:  # the most helpful change first
        result.groups[1:] = sorted(result.groups[1:], key=lambda candidate: candidate.values.mean())
    results = {group.name: raw_results(group, result, speeds) for group in result.groups}
    raw = {"caption": caption(arguments, speeds), "results": results}
    if not arguments.ablate:
        raw["by_position"] = losses_by_position(result.groups, arguments)
    report(tables, raw, arguments.save)
    print("\n".join(f"- {line}" for line in result.notes + ([] if arguments.ablate else result.verdicts)))
    if arguments.save:
        draw = draw_differences if arguments.ablate else draw_positions
        draw(raw, HERE / f"{arguments.save}.png")
    if failed:
        raise ChildProcessError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))


def check_early(arguments: Arguments):
    """What is missing is better missed now than after hours. Raises ValueError, OSError or ImportError with the cure."""
    import matplotlib  # noqa: F401
    import scipy.stats  # noqa: F401

    if arguments.runs is not None:
        os.environ["BASEGPT_RUNS"] = str(arguments.runs.resolve())
    if "BASEGPT_RUNS" not in os.environ:
        raise ValueError("name a folder for the runs by --runs, or in the environment variable BASEGPT_RUNS")
    for name in ("seeds", "side_by_side", "threads", "rounds", "position_stories"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name}={getattr(arguments, name)}: give a whole number of at least 1")
    if arguments.ablate and len(arguments.presets) > 1:
        raise ValueError(f"presets={arguments.presets}: give the single one to ablate")
    if not arguments.ablate and len(set(arguments.presets)) < max(2, len(arguments.presets)):
        raise ValueError(f"presets={arguments.presets}: give two or more, each once")
    if arguments.measure_only and arguments.budget != "steps":
        raise ValueError("measure_only: the clock needs no speeds; leave it out, or take --budget steps")
    runs_folder().mkdir(parents=True, exist_ok=True)


def chosen_presets(arguments: Arguments) -> dict[str, Preset]:
    """Presets by name, or a single preset and its ablations, without those that change nothing; the first is the baseline."""
    presets = {name: base_preset(name, arguments) for name in arguments.presets}
    (base, *_) = presets.values()
    for name, change in chosen_ablations(arguments.ablate).items():
        if (ablated := changed(base, change)) == base:
            print(f"{name} is left out: it changes nothing in this preset", file=sys.stderr)
        else:
            presets[name] = ablated
    return presets


def base_preset(name: str, arguments: Arguments) -> Preset:
    """The preset with the minutes and the changes of the command line, without compile, which would use up time."""
    shared = {"data": arguments.data, "threads": arguments.threads, "compile": False}
    return changed(with_train(preset(name), max_steps=None, max_minutes=arguments.minutes, **shared), arguments.set)


def measured_speeds(presets: dict[str, Preset], arguments: Arguments) -> dict[str, Speed]:
    """Read the speed of each preset from speeds.json, or measure and save it.

    Raises ValueError if it was measured with other settings.
    """
    path = runs_folder() / "speeds.json"
    known = {name: read_speed(entry) for name, entry in json.loads(path.read_text()).items()} if path.exists() else {}
    settings = {name: settings_of(chosen, arguments.data) for name, chosen in presets.items()}
    for group in settings.values():
        del group["train"]["max_minutes"]  # a speed holds for any budget
    for name in known.keys() & presets.keys():
        if not are_same(known[name].settings, settings[name]):
            raise ValueError(f"{path} has the speed of {name} with other settings: give those again, or another folder as --runs")
    missing = {name: chosen for name, chosen in presets.items() if name not in known}
    if missing:
        known |= measure(missing, settings, arguments)
        path.write_text(json.dumps({name: asdict(speed) for name, speed in known.items()}, indent=1))
    return known


def read_speed(entry: dict) -> Speed:
    """Read an entry of speeds.json, also of version 1, whose plan was called choices."""
    return Speed(entry["settings"], asdict(saved_plan(entry)), entry["tokens_per_second"], entry["machine"])


def measure(presets: dict[str, Preset], settings: dict[str, dict], arguments: Arguments) -> dict[str, Speed]:
    """Measure the presets in turns, each in its own process, so that other load affects all of them."""
    stand_ins = as_fast(presets)
    variants = {name: in_new_process(fastest_way, presets[name]) for name in dict.fromkeys(stand_ins.values())}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(new_process()) for name in variants}
        for name, process in processes.items():
            process.submit(warm_up, variants[name]).result()
        turns = {name: [] for name in variants}
        for _, (name, process) in itertools.product(range(arguments.rounds), processes.items()):
            turns[name].append(process.submit(take_turn, arguments.seconds).result())
    return {name: Speed(settings[name], asdict(variants[measured].plan), turns[measured], describe_machine())
            for name, measured in stand_ins.items()}  # fmt: skip


def as_fast(presets: dict[str, Preset]) -> dict[str, str]:
    """Map each preset to the first one of equal speed, which differs only in NO_TIME: they share a measurement."""
    first, same = {}, {field: getattr(TrainConfig(), field) for field in NO_TIME}
    return {name: first.setdefault(str(with_train(chosen, **same)), name) for name, chosen in presets.items()}


def fastest_way(chosen: Preset) -> Variant:
    (variant,) = list_variants(chosen, load_tokenizer(chosen.train.tokenizer).vocab_size, ["ours_probed"]).values()
    return variant


def for_steps(chosen: Preset, speed: Speed, minutes: float) -> Preset:
    """Set the preset to the number of steps that fit into the minutes at this speed, and to the plan of the measurement.

    A growing batch size counts as its mean, at the tokens/s of the full batch size.
    """
    plan = ExecutionPlan(**speed.plan)
    rows = np.mean([growing_batch_size(share, chosen.train) for share in np.linspace(0, 1, 1000, endpoint=False)])
    tokens = rows * chosen.model.max_seq_len
    steps = max(1, round(60 * minutes * float(np.median(speed.tokens_per_second)) / tokens))
    trained = with_train(
        chosen, max_steps=steps, max_minutes=None, eval_every=math.ceil(steps / EVALUATIONS), dtype=plan.dtype,
        micro_batch_size=plan.micro_batch_size, fast=plan.fast,
    )  # fmt: skip
    return trained


def train_missing(presets: dict[str, Preset], arguments: Arguments) -> dict[str, str]:
    """Train every unfinished run; return the reasons of failures by name. Raises KeyboardInterrupt after Ctrl-C."""
    todo = [run for name in presets for run in seeds.members(group_of(name, presets, arguments))]
    total = len(presets) * arguments.seeds
    print(f"{total - len(todo)} of {total} runs are finished", file=sys.stderr, flush=True)
    by_seed = sorted(todo, key=lambda run: run.train.seed)  # so that presets have equally many runs if stopped early
    failed, stopped = seeds.run_side_by_side(by_seed, arguments.side_by_side)
    if stopped:
        raise KeyboardInterrupt
    return failed


def group_of(name: str, presets: dict[str, Preset], arguments: Arguments) -> Training:
    """The group of runs of a preset, as command line arguments of train.py."""
    model, train = presets[name]
    group = Training(preset=name, name=name, seeds=arguments.seeds, model=model, train=replace(train, seed=0))
    begun = any(Run(member).folder.exists() for member in seeds.member_names(group))
    return replace(group, resume=begun)


def is_scored(name: str) -> bool:
    return (Run(name).folder / "story_losses.json").exists()


def caption(arguments: Arguments, speeds: dict[str, Speed]) -> str:
    threads = f"{arguments.threads} thread{'s' * (arguments.threads > 1)}"
    minutes = f"{arguments.minutes:g} minutes"
    same = "all with the same learning rate and batches"
    if arguments.ablate:
        same = f"of the preset {arguments.presets[0]} and of changes of it, one at a time"
    told = [f"{arguments.seeds} seeds of each on {arguments.data}, {same}."]
    if arguments.budget == "clock":
        told += [f"Each run had {minutes} by the clock with {threads}, evaluations included, {arguments.side_by_side} at a time."]
    else:
        measured = " and ".join(sorted({speed.machine for speed in speeds.values()}))
        told += [f"The budget of a run is the number of steps that fit into {minutes} at the tokens/s of its preset, which were",
                 f"measured once, in turns on a quiet machine, with {threads} ({measured}). Evaluations and start-up are not",
                 "counted, and the load of the machine during the training does not matter."]  # fmt: skip
    if arguments.set:
        told += [f"Changed in all: {', '.join(arguments.set)}."]
    return " ".join([
        *told, "Bits per byte are on all validation stories, ± is the 95% interval over seeds (Student's t). The difference to",
        "the first is paired by seed where the two have the same first weights and batches. It and p are corrected for the",
        "number of comparisons (Bonferroni) and for later looks. The interval over stories covers other stories, but not other",
        "seeds: it is no verdict.",
    ])  # fmt: skip


def speed_table(presets: dict[str, Preset], speeds: dict[str, Speed]) -> str:
    rows = []
    for name, planned in presets.items():
        pace = quartiles("tokens/s", speeds[name].tokens_per_second, ".0f")
        rows.append({"": name} | pace | {"steps": f"{planned.train.max_steps}", "how": str(ExecutionPlan(**speeds[name].plan))})
    return page({"": rows})


def raw_results(candidate: Candidate, result: Comparison, speeds: dict[str, Speed]) -> dict:
    """Values of each seed, and the difference to the first candidate over seeds and over stories."""
    first, logs = result.groups[0], [member.log for member in candidate.members]
    paces = speeds[candidate.name].tokens_per_second if speeds else list(pd.concat(logs)["tokens_per_second"])
    raw = {
        "seeds": candidate.seeds, "parameters": candidate.parameters, "bits_per_byte": candidate.values.tolist(),
        "steps": [int(log["step"].max()) for log in logs], "tokens": [int(log["tokens"].max()) for log in logs],
        "tokens_per_second": float(np.median(paces)),
    }  # fmt: skip
    pair = f"{candidate.name} - {first.name}"
    if pair in result.differences.index:
        row = result.differences.loc[pair]
        nats = [np.mean([member.losses["nats"] for member in group.members], axis=0) for group in (first, candidate)]
        over = over_stories(*nats, first.members[0].losses["bytes"])
        ends = (row["95% from"], row["to"], row["p"]) if row["over"].startswith("seeds") else [math.nan] * 3
        raw["difference"] = asdict(Difference(row["difference"], *ends))
        raw |= {"p_corrected": row["p (corrected)"], "over_stories": asdict(over)}
    return raw


def losses_by_position(groups: list[Candidate], arguments: Arguments) -> dict:
    """Nats per token by octave of the position in the story, for each preset and seed."""
    stories = validation_stories(arguments.data, None)[1][: arguments.position_stories]
    losses = {}
    for candidate in groups:
        scored = [loss_by_position(token_scores(*load_model(member.name), stories)) for member in candidate.members]
        losses[candidate.name] = [list(table["loss"]) for table in scored]
    return {"stories": len(stories), "octaves": list(scored[0].index), "tokens": scored[0]["tokens"].tolist(), "losses": losses}


if __name__ == "__main__":
    run_script(main, Arguments, __doc__, "The same command goes on where each run was")
