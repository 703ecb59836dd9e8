"""The first run of a newcomer: `python train.py` with no options and no hub, by the clock.

    python benchmarks/first_run.py --threads 2 1 --seeds 0 1 2 --save first_run

Each run is a process that finds nothing tokenised, compiled or measured. The minutes are of the whole command, from its start to
the last line that it prints. Then storyworld grades samples of the model, drawn without a prompt.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from script import HERE, Row, in_new_process, report, run_script, save

TEMPERATURES = (1.0, 0.8, 0.5)


@dataclass(frozen=True)
class Arguments:
    seeds: tuple[int, ...] = (0, 1, 2)
    threads: tuple[int, ...] = (2, 1)
    num_samples: int = 200  # per run and temperature
    set: tuple[str, ...] = ()  # options of train.py instead of its defaults, such as "--train.max_minutes 1"
    save: str | None = None  # write benchmarks/results/SAVE.json


def main(arguments: Arguments):
    runs = []
    for seed in arguments.seeds:
        for threads in arguments.threads:
            with tempfile.TemporaryDirectory(prefix="first_run-") as folder:
                seconds = train(seed, threads, arguments.set, folder)
                result = in_new_process(grade, folder, arguments.num_samples)
            runs.append({"seed": seed, "threads": threads, "seconds": seconds, **result})
            raw = {"num_samples": arguments.num_samples, "runs": runs}
            if arguments.save:  # what is measured is kept if the script is stopped
                save(arguments.save, raw)
    report(tables, raw, arguments.save)


def train(seed: int, threads: int, options: tuple[str, ...], folder: str) -> float:
    """Run the command in an empty cache without the hub; return its seconds."""
    command = [sys.executable, "train.py", "--name", "first", "--train.threads", str(threads), "--train.seed", str(seed)]
    command += " ".join(options).split()
    places = {name: f"{folder}/{name}" for name in ("BASEGPT_RUNS", "BASEGPT_CACHE", "HF_HOME")} | {"HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    subprocess.run(command, cwd=HERE.parent, env=os.environ | places, check=True, stdout=2)  # to standard error
    return time.perf_counter() - began


def grade(folder: str, num_samples: int) -> dict:
    os.environ["BASEGPT_RUNS"] = f"{folder}/BASEGPT_RUNS"
    from metrics.world_floor import world_floor
    from metrics.world_grades import grade_run
    from runs.folder import Run

    last = Run("first").log().dropna(subset="bits_per_byte").iloc[-1]
    return {
        "steps": int(last["step"]), "tokens": int(last["tokens"]), "training_seconds": float(last["seconds"]),
        "bits_per_byte": float(last["bits_per_byte"]), "floor": world_floor("first").bits_per_byte,
        "accepted": {str(temperature): grade_run("first", num_samples, temperature).accepted for temperature in TEMPERATURES},
    }  # fmt: skip


def tables(raw: dict) -> dict[str, list[Row]]:
    """A row per number of threads: medians over seeds, with their range."""
    rows = []
    for threads in dict.fromkeys(run["threads"] for run in raw["runs"]):
        runs = [run for run in raw["runs"] if run["threads"] == threads]
        row = {"threads": str(threads), "seeds": str(len(runs))}
        row |= spread("minutes in all", [run["seconds"] / 60 for run in runs], ".1f")
        row |= spread("steps", [run["steps"] for run in runs], ".0f")
        row |= spread("bits per byte", [run["bits_per_byte"] for run in runs], ".3f")
        row |= spread("over the floor", [run["bits_per_byte"] - run["floor"] for run in runs], ".3f")
        for temperature in TEMPERATURES:
            accepted = [100 * run["accepted"][str(temperature)] / raw["num_samples"] for run in runs]
            row |= spread(f"accepted at temperature {temperature:g}, %", accepted, ".0f")
        rows.append(row)
    return {"Medians over seeds, and the range": rows}


def spread(column: str, values: list[float], style: str) -> Row:
    low, high = min(values), max(values)
    return {column: f"{median(values):{style}}", f"{column}: from": f"{low:{style}}", f"{column}: to": f"{high:{style}}"}


if __name__ == "__main__":
    run_script(main, Arguments, __doc__)
