"""Time to reach a loss, and loss reached in a given time, for a preset and several seeds.

    python benchmarks/time_to_loss.py --preset speedrun --minutes 10 --seeds 0 1 2 --at 1.03 0.64 --save speedrun

Bits per byte on whole validation stories of at most 700 bytes, against the seconds since train() was called: wall-clock time,
which includes compiling, measuring the machine and evaluating. The budget of --minutes counts training alone. Every run has its
own process and starts without any compiled code or measurements of earlier runs; only the tokenised data are cached. The curve is
from the evaluations of the run itself, on at most 200 of the stories; at the end model.pth is scored on all of them.
"""

import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from statistics import median

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ablations import changed
from script import HERE, Row, in_new_process, report, results_file, run_script, save

from config import VERSION, ModelConfig, TrainConfig, migrate
from data.dataset import choose_validation, load_data, open_source, story_hash
from metrics.plots import in_style, line_colour
from runs.presets import Preset, preset
from tokenizer import load_tokenizer

EVALUATIONS = 15  # per run with a constant batch size; a growing one gives more, most of them early
MAX_EVALUATED = 200


@dataclass(frozen=True)
class Arguments:
    preset: str = "speedrun"
    minutes: float = 10.0  # of training, per run
    seeds: tuple[int, ...] = (0, 1, 2)
    data: str = "tinystories"  # any source that training accepts
    longest_story: int | None = 700  # maximum bytes of a validation story; None for no limit
    set: tuple[str, ...] = ()  # changes of the preset, such as train.lr_max=1e-2 model.zero_init=False
    at: tuple[float, ...] = (1.03, 0.64)  # levels of bits per byte to report the time of
    save: str | None = None  # write benchmarks/results/SAVE.json and plot benchmarks/SAVE.png; seeds in the file are not repeated


@dataclass(frozen=True)
class Result:
    """A finished run."""

    seed: int
    settings: dict  # everything that affects the result
    eval_every: int
    steps: int
    tokens: int
    seconds: float  # from the call of train() to its end
    training_seconds: float  # without compiling, evaluating and saving
    tokens_per_second: float  # median of the steps, without evaluations
    curve: list[list[float]]  # [seconds, bits per byte] of each evaluation
    bits_per_byte: float  # of model.pth on all stories; inf if the run diverged


def main(arguments: Arguments):
    raw = run_missing(arguments, base_preset(arguments))
    report(tables, raw, arguments.save)
    if arguments.save:
        draw(raw, HERE / f"{arguments.save}.png")


def run_missing(arguments: Arguments, chosen: Preset) -> dict:
    """Train the seeds that the results file does not have; return the raw results of all."""
    with tempfile.TemporaryDirectory(prefix="time_to_loss-") as folder:
        fingerprint = write_stories(arguments, chosen, Path(folder))
        chosen = with_train(chosen, data=str(Path(folder, "stories")))
        settings = settings_of(chosen, fingerprint)
        results = read_results(arguments.save, settings)
        eval_every = None
        for seed in arguments.seeds:
            if seed in results:
                continue
            eval_every = eval_every or choose_eval_every(arguments, chosen, results, Path(folder))
            one = with_train(chosen, seed=seed, eval_every=eval_every)
            results[seed] = result = Result(seed, settings, eval_every, **in_new_process(run, one, Path(folder)))
            if arguments.save:
                save(arguments.save, raw_results(arguments, results))
            said = f"{result.bits_per_byte:.4f} bits per byte after {result.steps:,} steps, {result.seconds:.0f} s"
            print(f"seed {seed}: {said}", file=sys.stderr, flush=True)
    return raw_results(arguments, results)


def raw_results(arguments: Arguments, results: dict[int, Result]) -> dict:
    caption = f"{', '.join([arguments.preset, *arguments.set])}: {arguments.minutes:g} minutes on {arguments.data}"
    return {"caption": caption, "at": arguments.at, "runs": [asdict(results[seed]) for seed in sorted(results)]}


def base_preset(arguments: Arguments) -> Preset:
    """The preset with the budget and the changes of the command line."""
    chosen = preset(arguments.preset)
    evaluated = min(MAX_EVALUATED, chosen.train.eval_stories)
    budget = with_train(chosen, max_steps=None, max_minutes=arguments.minutes, eval_stories=evaluated)
    return changed(budget, arguments.set)


def with_train(chosen: Preset, **values) -> Preset:
    return Preset(chosen.model, replace(chosen.train, **values))


def write_stories(arguments: Arguments, chosen: Preset, folder: Path) -> str:
    """Write the training stories and the short validation stories as a data source into folder/stories; return its digest.

    Raises ValueError if no validation story is short enough.
    """
    source = open_source(arguments.data)
    validation = choose_validation(source, Counter())
    longest = arguments.longest_story or math.inf
    lengths = {story: len(story.encode(errors="replace")) for story in validation}
    short = [story for story in validation if lengths[story] <= longest]
    if not short:
        shortest = min(lengths.values())
        raise ValueError(f"no validation story has {longest} bytes or fewer: give a --longest_story of {shortest} or more")
    held_out = set(map(story_hash, validation))
    training = (story for story in source.stories("train", Counter()) if story_hash(story) not in held_out)
    (folder / "stories").mkdir()
    for split, stories in (("train", islice(training, chosen.train.max_stories)), ("validation", short)):
        with open(folder / "stories" / f"{split}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": story}) + "\n" for story in stories)
    print(f"{len(short):,} of {len(validation):,} validation stories have at most {longest} bytes", file=sys.stderr)
    return open_source(str(folder / "stories")).fingerprint(folder / "cache")


def settings_of(chosen: Preset, fingerprint: str) -> dict:
    """Everything but the seed that affects the result of a run, as read from JSON."""
    ignored = {"data": fingerprint, "seed": None, "eval_every": None}
    version = {"version": VERSION}
    return json.loads(json.dumps({"model": version | asdict(chosen.model), "train": version | asdict(chosen.train) | ignored}))


def are_same(then: dict, now: dict) -> bool:
    """Compare recorded settings with others, in the fields of today. Fields that are newer than the record are not compared."""
    then, now = migrated(then), migrated(now)
    return all(then[group].items() <= now[group].items() for group in now)


def migrated(settings: dict) -> dict:
    """Settings in the fields of today; version 1 had the attention of the machine in the model."""
    today = {"model": migrate(ModelConfig, settings["model"]), "train": migrate(TrainConfig, settings["train"])}
    if "attention" in settings["model"]:
        today["train"]["fast"] = {"auto": "auto", "kernel": True}.get(settings["model"]["attention"], False)
    return today


def read_results(name: str | None, settings: dict) -> dict[int, Result]:
    """Read the runs of a results file by seed. Raises ValueError if they have other settings.

    Config fields that are newer than the file are not compared.
    """
    if not name or not results_file(name).exists():
        return {}
    runs = json.loads(results_file(name).read_text(encoding="utf-8")).get("raw", {}).get("runs", [])
    if not all(are_same(run["settings"], settings) for run in runs):
        raise ValueError(f"save={name!r}: {results_file(name).name} has runs with other settings: take another name")
    return {run["seed"]: Result(**run) for run in runs}


def choose_eval_every(arguments: Arguments, chosen: Preset, results: dict[int, Result], folder: Path) -> int:
    """Steps between evaluations: from the command line, the results, or the speed of a short trial."""
    if any(change.startswith("train.eval_every=") for change in arguments.set):
        return chosen.train.eval_every
    if results:
        return next(iter(results.values())).eval_every
    return max(1, round(60 * arguments.minutes / EVALUATIONS / in_new_process(seconds_per_step, chosen, folder)))


def seconds_per_step(chosen: Preset, folder: Path) -> float:
    """Seconds per step at the full batch size, without evaluations."""
    with cold_start(chosen, folder):
        from train import train

        times = []
        config = replace(chosen.train, eval_every=10**9, compile=chosen.train.compile is True)  # auto would run a trial first
        for _ in islice(train(chosen.model, config, "trial"), 12):
            times.append(time.perf_counter())
    paces = [later - earlier for earlier, later in pairwise(times)]
    return median(paces) * chosen.train.batch_size / (chosen.train.batch_size_start or chosen.train.batch_size)


def run(chosen: Preset, folder: Path) -> dict:
    """Train and score one model in its own process; return the fields of Result."""
    from inference import load_model
    from metrics.scores import evaluate
    from train import train

    records, curve, bits_per_byte = [], [], math.inf
    budget = chosen.train.max_minutes and 60 * chosen.train.max_minutes
    layout = "{desc}: {percentage:3.0f}%|{bar}| {postfix}"
    with (
        cold_start(chosen, folder) as validation,
        tqdm(desc=f"seed {chosen.train.seed}", total=budget, bar_format=layout, leave=False, disable=None) as bar,
    ):
        began = time.perf_counter()
        try:
            for record in train(chosen.model, chosen.train, "run"):
                records.append(record)
                bar.n = record.seconds
                if record.bits_per_byte is not None:
                    curve.append([time.perf_counter() - began, record.bits_per_byte])
                    bar.set_postfix_str(f"{record.bits_per_byte:.3f} bits per byte")
            seconds = time.perf_counter() - began
            if chosen.train.progress(records[-1].step, records[-1].seconds) < 1:
                raise KeyboardInterrupt  # train() itself only stops early
            bits_per_byte = evaluate(*load_model("run"), validation).bits_per_byte
        except FloatingPointError as error:
            seconds = time.perf_counter() - began
            tqdm.write(f"seed {chosen.train.seed}: {error}", file=sys.stderr)
    return {
        "steps": len(records), "tokens": records[-1].tokens if records else 0, "seconds": seconds,
        "tokens_per_second": median([record.tokens_per_second for record in records] or [0.0]),
        "curve": curve, "bits_per_byte": bits_per_byte, "training_seconds": records[-1].seconds if records else 0.0,
    }  # fmt: skip


@contextmanager
def cold_start(chosen: Preset, folder: Path) -> Iterator[list[str]]:
    """Set up empty caches but for the tokenised data; yield the validation stories."""
    config, tokens = chosen.train, folder / "cache"
    data = load_data(
        config.data, load_tokenizer(config.tokenizer), chosen.model.max_seq_len,
        packing=config.packing, max_stories=config.max_stories, cache_dir=tokens, progress=sys.stderr.isatty(),
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=folder) as place:
        shutil.copytree(tokens, Path(place, "cache"))
        for variable, name in (("BASEGPT_CACHE", "cache"), ("BASEGPT_RUNS", "runs"), ("TORCHINDUCTOR_CACHE_DIR", "compiled")):
            os.environ[variable] = str(Path(place, name))
        yield data.validation


def seconds_to(run: dict, bits_per_byte: float) -> float:
    """Time of the first evaluation at or below a level; inf if there is none."""
    return next((seconds for seconds, reached in run["curve"] if reached <= bits_per_byte), math.inf)


def tables(raw: dict) -> dict[str, list[Row]]:
    """A row for each seed, and the median and the range."""
    runs = raw["runs"]
    columns = {
        "steps": ([run["steps"] for run in runs], ".0f"),
        "tokens": ([run["tokens"] for run in runs], ".0f"),
        "seconds": ([run["seconds"] for run in runs], ".0f"),
        "of training": ([run["training_seconds"] for run in runs], ".0f"),
        "tokens/s": ([run["tokens_per_second"] for run in runs], ".0f"),
        **{f"seconds to {level:g}": ([seconds_to(run, level) for run in runs], ".0f") for level in raw["at"]},
        "bits per byte": ([run["bits_per_byte"] for run in runs], ".4f"),
    }
    rows = [
        {"seed": str(run["seed"])} | {name: shown(values[i], style) for name, (values, style) in columns.items()}
        for i, run in enumerate(runs)
    ]
    middle = {"seed": "median (range)"}
    for name, (values, style) in columns.items():
        numbers = {name: median(values), f"{name}: from": min(values), f"{name}: to": max(values)}
        middle |= {column: shown(number, style) for column, number in numbers.items()}
    return {raw["caption"]: [*rows, middle]}


def shown(value: float, style: str) -> str:
    return f"{value:{style}}" if math.isfinite(value) else "–"


@in_style
def draw(raw: dict, path: Path):
    """Bits per byte against seconds, a curve for each run."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(7, 4.4))
    axes = figure.subplots()
    for run in raw["runs"]:
        seconds, bits_per_byte = zip(*run["curve"], strict=True) if run["curve"] else ([], [])
        axes.plot(seconds, bits_per_byte, color=line_colour(0), linewidth=1)
    for level in raw["at"]:
        axes.axhline(level, color="gray", linewidth=0.8, linestyle=":")
    axes.set(xlabel="seconds since train() was called", ylabel="bits per byte", xscale="log")
    axes.xaxis.set_major_formatter(LogFormatter())
    axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    figure.savefig(path)


if __name__ == "__main__":
    run_script(main, Arguments, __doc__, "With --save the same command goes on after the last finished run")
