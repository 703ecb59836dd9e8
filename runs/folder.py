"""The run folder: trained_models/NAME holds everything about one trained model.

README.md          results, a sample, how to reproduce it
model_config.json  the architecture
train_config.json  how it was trained
tokenizer.json     the tokenizer
data_path.txt      where its data were on this machine, if they are local; git ignores it
execution.json     what the machine chose (number format, kernels, rows, threads, compile), and which machine it was
log_data.csv       the training log, a row every few steps
samples.csv        the story that the model wrote at every evaluation
blocks.csv         metrics that blocks report at every evaluation, such as how evenly experts are used; if there are any
model.pth          the best weights so far, and the size and fingerprint of the tokenizer
checkpoint.pth     the last training state, to resume from
story_losses.csv   the loss on every validation story;  story_losses.json: digests of the weights, data and code
diverged.txt       the step at which the loss was no longer finite; if it ever was not
digests.txt        a digest of each of these files, as it was saved
training.lock      the process that trains it, while it does
group.json         the group of seeds that the run belongs to; if there is one
loss.png           the loss curve;  grades.png: the share of samples that storyworld accepts, against the loss; if it grades

The run EXPERIMENT/RUN belongs to an experiment: its folder is experiments/EXPERIMENT/trained_models/RUN.
Files are written to a temporary name and then moved, so that a crash or a full disk leaves the old ones as they were.
"""

import csv
import io
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from config import ModelConfig, TrainConfig, did_you_mean, from_json, stories_of, to_json
from runs import digests
from runs.execution import ExecutionPlan, Stage
from runs.experiments import FOLDER as EXPERIMENTS
from runs.experiments import check_experiment, experiment_names
from runs.files import cure_of, write_atomically

LOCK = "training.lock"
BEFORE_TRAINING = {  # files that a run has before its first checkpoint
    "model_config.json", "train_config.json", "group.json", "tokenizer.json", "data_path.txt", "execution.json", "log_data.csv",
    digests.FILE,
}  # fmt: skip
RESERVED_ON_WINDOWS = {"CON", "PRN", "AUX", "NUL", *(f"{port}{i}" for port in ("COM", "LPT") for i in range(1, 10))}


def runs_folder(experiment: str | None = None) -> Path:
    """trained_models/ of the repository, or of an experiment; the environment variable BASEGPT_RUNS names another folder."""
    if folder := os.environ.get("BASEGPT_RUNS"):
        return Path(folder, experiment or "")
    return EXPERIMENTS / experiment / "trained_models" if experiment else Path(__file__).parents[1] / "trained_models"


def run_names(with_file: str = "model.pth") -> list[str]:
    """The names of all runs that have this file; those of experiments come last."""
    names = sorted(path.parent.name for path in runs_folder().glob(f"*/{with_file}"))
    for experiment in experiment_names():
        names += sorted(f"{experiment}/{path.parent.name}" for path in runs_folder(experiment).glob(f"*/{with_file}"))
    return names


def group_names() -> list[str]:
    """The names of all groups of seeds, and of all runs that are in no group."""
    return list(dict.fromkeys(group_of(name) or name for name in run_names()))


def group_of(name: str) -> str | None:
    return Run(name).group


def group_members(name: str) -> list[str]:
    """The runs of a group of seeds, or the run of that name. Raises FileNotFoundError if there is neither."""
    if not Run(name).folder.is_dir():
        members = [member for member in run_names() if group_of(member) == name]
        if members:
            return members
        Run(name).path("model.pth")  # raises
    return [name]


def default_name(preset: str) -> str:
    """The preset and the time, in characters that are safe on every file system."""
    return f"{preset}_{datetime.now():%Y-%m-%d_%H-%M-%S}"


def is_safe(name: str) -> bool:
    safe = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) and not name.endswith(".")
    return bool(safe) and name.split(".")[0].upper() not in RESERVED_ON_WINDOWS


@dataclass(frozen=True)
class Run:
    """A folder in trained_models/, or EXPERIMENT/RUN. Raises ValueError for a name that is not safe on every file system."""

    name: str

    def __post_init__(self):
        parts = self.name.split("/")
        if len(parts) > 2 or not all(map(is_safe, parts)):
            raise ValueError(f"{self.name!r} cannot be a run's name: use letters, digits, '_', '-' and '.', such as my_run_2")

    @property
    def folder(self) -> Path:
        *experiment, name = self.name.split("/")
        return runs_folder(*experiment) / name

    def check_is_new(self):
        """Raise ValueError if the run exists, or if its experiment does not."""
        if "/" in self.name:
            check_experiment(self.name.split("/")[0])
        if self.is_begun:
            raise ValueError(f"a run called {self.name!r} exists. Take another --name, or go on with it by --resume")
        if self.name in map(group_of, run_names("group.json")):
            raise ValueError(f"a group of seeds is called {self.name!r}, so no single run can be: take another --name")

    @property
    def is_begun(self) -> bool:
        """Whether its folder holds more than what is there before the first checkpoint. If not, a kill left it."""
        return self.folder.exists() and not (self.folder.is_dir() and self._files() <= BEFORE_TRAINING)

    def _files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir() if path.suffix != ".unfinished" and not path.name.startswith(LOCK)}

    def check_is_begun(self):
        """Raise FileNotFoundError if there is no such run, ValueError if it has no checkpoint yet."""
        if not self.is_begun:
            self.path("model_config.json")
            raise ValueError(f"the run {self.name!r} was killed before its first checkpoint: start it again, without --resume")

    def make_folder(self):
        """Make the folder, if a kill has not left one. Raises OSError with the cure."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            cure = cure_of(error, self.folder.parent, "BASEGPT_RUNS")
            raise OSError(f"could not make the folder of the run {self.name!r} ({error.strerror}): {cure}") from error

    def create(self, model_config: ModelConfig, train_config: TrainConfig, group: str | None = None):
        """Make the folder with the configs and the group. Raises ValueError if the run exists."""
        self.check_is_new()
        self.make_folder()
        for path in self.folder.iterdir():  # what a kill has left
            if path.name != LOCK:
                path.unlink()
        try:
            self.save_text("model_config.json", to_json(model_config))
            self.save_text("train_config.json", to_json(train_config))
            if group is not None:
                self.save_text("group.json", json.dumps({"group": group}) + "\n")
        except OSError:
            shutil.rmtree(self.folder)
            raise

    def remove_unfinished(self):
        """Remove the large files that a kill has left half written; only the owner of the run's lock writes such."""
        for path in self.folder.glob("*.pth.*.unfinished"):
            path.unlink(missing_ok=True)

    def path(self, file: str) -> Path:
        """The path of a file of the run. Raises FileNotFoundError if the run or the file is missing."""
        if not self.folder.is_dir():
            names = run_names("model_config.json")
            if members := [name for name in names if group_of(name) == self.name]:
                raise FileNotFoundError(f"{self.name!r} is a group of seeds: name one of its runs, {', '.join(members)}")
            hint = f"{did_you_mean(self.name, names)} There are: {', '.join(names) or 'none yet'}"
            raise FileNotFoundError(f"no run is called {self.name!r}.{hint}")
        path = self.folder / file
        if not path.is_file():
            raise FileNotFoundError(f"the run {self.name!r} has no {file}: restore it, or train the model again")
        return path

    def read(self, file: str) -> bytes:
        """Read a file of the run. Raises FileNotFoundError if it is missing, ValueError if it is not what was saved."""
        content = self.path(file).read_bytes()
        if not digests.is_as_saved(self.folder, file, content):
            raise ValueError(
                f"{file} of the run {self.name!r} is damaged or was changed: restore it, or, if you changed it, delete the lines "
                f"on it in {digests.FILE}"
            )
        return content

    @property
    def model_config(self) -> ModelConfig:
        return self._config(ModelConfig, "model_config.json")

    @property
    def train_config(self) -> TrainConfig:
        return self._config(TrainConfig, "train_config.json")

    def _config(self, config_class, file: str):
        content = self.read(file)
        try:
            return from_json(config_class, content.decode("utf-8"))
        except ValueError as error:  # from_json, or not UTF-8
            raise ValueError(f"{file} of the run {self.name!r} cannot be read: {error}") from error

    @property
    def group(self) -> str | None:
        """The group of seeds that the run belongs to, or None. Raises ValueError if group.json is damaged."""
        if not (self.folder / "group.json").exists():
            return None
        content = self.read("group.json")
        try:
            return json.loads(content)["group"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"group.json of the run {self.name!r} is damaged: write {{\"group\": \"NAME\"}}") from error

    @property
    def stages(self) -> list[Stage]:
        """How machines executed the run; empty for a run of an older version. Raises ValueError if execution.json is damaged."""
        if not (self.folder / "execution.json").exists():
            return []
        content = self.read("execution.json")
        try:
            stages = json.loads(content)
            return [Stage(stage["from_step"], ExecutionPlan(**stage["plan"]), dict(stage["machine"])) for stage in stages]
        except (ValueError, KeyError, TypeError) as error:
            problem = f"execution.json of the run {self.name!r} is damaged"
            raise ValueError(f"{problem}: restore it, or train the model again") from error

    def add_stage(self, stage: Stage):
        """Record how the run is executed from a step on."""
        stages = [earlier for earlier in self.stages if earlier.from_step < stage.from_step]
        if not stages or (stages[-1].plan, stages[-1].machine) != (stage.plan, stage.machine):
            stages.append(stage)
        self.save_text("execution.json", json.dumps([asdict(each) for each in stages], indent=2) + "\n")

    @property
    def diverged(self) -> str | None:
        """The message about the step at which the loss was no longer finite; None if it always was."""
        return self.read("diverged.txt").decode(errors="replace").strip() if (self.folder / "diverged.txt").exists() else None

    @property
    def data(self) -> str:
        """The source of its data for `open_source`, from any working directory: where they were, or what its config names."""
        if (self.folder / "data_path.txt").exists():
            path = self.read("data_path.txt").decode(errors="replace").strip()
            if Path(stories_of(path).removeprefix("hub:")).exists():
                return path
        return self.train_config.data

    @property
    def is_bound(self) -> bool:
        """Whether the losses of its model are upper bounds."""
        return self.load("model.pth", {"model"}).get("is_bound", False)

    def log(self):
        """log_data.csv as a pandas DataFrame."""
        import pandas as pd

        content = self.read("log_data.csv")
        try:
            log = pd.read_csv(io.BytesIO(content))
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
            raise ValueError(f"log_data.csv of the run {self.name!r} is damaged: {error}") from error
        for column in ("step", "tokens", "seconds", "train_loss", "validation_loss"):
            if column not in log:
                raise ValueError(f"log_data.csv of the run {self.name!r} is damaged: it has no column {column!r}")
            if len(log) and not pd.api.types.is_numeric_dtype(log[column]):
                raise ValueError(f"log_data.csv of the run {self.name!r} is damaged: not all of {column!r} are numbers")
        return log

    def seconds_include_overhead(self) -> bool:
        """Whether the seconds of the log, and max_minutes, also count compiling and evaluating, as in older versions."""
        log = self.log()
        return "overhead_seconds" not in log or bool(log["overhead_seconds"].isna().any())

    def was_stopped(self) -> bool:
        """Whether the run was stopped before max_steps or max_minutes."""
        log, config = self.log(), self.train_config
        return log.empty or bool(config.progress(log["step"].max(), log["seconds"].max()) < 1)

    @property
    def is_reported(self) -> bool:
        """Whether it was scored on its whole validation set, and its README.md was written after that."""
        return all((self.folder / file).exists() for file in ("story_losses.json", "README.md"))

    def load(self, file: str, keys: set[str]) -> dict:
        """Read a file of `save`. Raises ValueError if it is damaged, or not one of ours."""
        import torch

        content = self.read(file)
        try:
            content = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many types for a damaged file
            problem = f"{file} of the run {self.name!r} is damaged or not one of ours ({type(error).__name__})"
            raise ValueError(f"{problem}: restore it, or train the model again") from error
        if not isinstance(content, dict) or not keys <= content.keys():
            raise ValueError(f"{file} of the run {self.name!r} was not written by train.py: it lacks {', '.join(sorted(keys))}")
        return content

    def save(self, file: str, content: dict):
        """Write tensors and plain values with torch.save. Raises OSError with the cure if the disk is full."""
        import torch

        buffer = io.BytesIO()
        torch.save(content, buffer)
        self._write(file, buffer.getvalue())

    def save_text(self, file: str, text: str):
        self._write(file, text.encode())

    def save_log(self, rows: list[dict], columns: list[str], file: str = "log_data.csv"):
        """Write a table as CSV; None is empty, and floats have all digits."""
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self.save_text(file, text.getvalue())

    def save_figure(self, file: str, figure):
        image = io.BytesIO()
        figure.savefig(image)
        self._write(file, image.getvalue())

    def log_rows(self) -> list[dict]:
        """The rows of log_data.csv as text, to write them again unchanged. Raises as `log` does."""
        self.log()
        return list(csv.DictReader(io.StringIO(self.read("log_data.csv").decode("utf-8"), newline="")))

    def _write(self, file: str, content: bytes):
        try:
            digests.record(self.folder, file, content)
            write_atomically(self.folder / file, content)
        except OSError as error:
            cure = cure_of(error, self.folder, "BASEGPT_RUNS")
            has_checkpoint = (self.folder / "checkpoint.pth").exists()
            then = f"go on with --name {self.name} --resume from the last checkpoint" if has_checkpoint else "start again"
            raise OSError(f"could not write {file} of the run {self.name!r} ({error.strerror}): {cure}, and {then}") from error
