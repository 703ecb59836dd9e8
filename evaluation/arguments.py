"""The command line of each command of `python -m evaluation`: a dataclass, whose comments are the help.  No torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from runs.terminal import UsageError

Runs = Annotated[Positional[tuple[str, ...]], arg(metavar="RUN ...")]
Architectures = Annotated[Positional[tuple[str, ...]], arg(metavar="ARCHITECTURE ...")]
Architecture = Annotated[Positional[str], arg(metavar="ARCHITECTURE")]
Prices = Annotated[tuple[float, ...] | None, arg(metavar="PRICE [PRICE]")]


def check(holds: bool, message: str):
    if not holds:
        raise UsageError(message)


def check_folder(option: str, path: Path | None):
    if path is not None:
        check(path.parent.is_dir(), f"{option} {path}: there is no folder {path.parent}: make it first")


@dataclass(frozen=True)
class Compare:
    """Which run, or group of seeds, is better, by how much, and how certain that is."""

    names: Runs  # runs or groups in trained_models/; all are compared with the first
    at: Literal["end", "parameters", "step", "tokens", "flops", "seconds"] = "end"  # compare at equal cost; end: the best weights
    all_pairs: bool = False  # compare every pair
    data_if_missing: str | None = None  # score runs without losses on this if their own data are not available
    html: Path | None = None  # also write a report into this file, one self-contained page
    exit_code: bool = False  # exit with 3 unless all pairs differ, for scripts
    prompts: tuple[str, ...] = ()  # what the stories in the report start with

    def __post_init__(self):
        check_folder("--html", self.html)
        check(not self.prompts or self.html, "--prompts are for the report: name a file for it by --html")


@dataclass(frozen=True)
class Audit:
    """Whether the scores of runs can be right: no future, no state, no memory of the validation stories. Exits with 1 if not."""

    names: Runs  # runs in trained_models/
    num_stories: int = 100  # validation stories of each check
    data_if_missing: str | None = None  # data to score a run on if its own are not available

    def __post_init__(self):
        check(len(self.names) > 0, "name at least one run")
        check(self.num_stories >= 2, "--num_stories must be at least 2")


@dataclass(frozen=True)
class Measures:
    """Loss by position and word class, calibration and repetition of runs."""

    names: Runs  # runs in trained_models/
    num_stories: int = 300  # validation stories to score
    num_samples: int = 10  # stories to write
    data_if_missing: str | None = None  # data to score a run on if its own are not available

    def __post_init__(self):
        check(len(self.names) > 0, "name at least one run")
        check(min(self.num_stories, self.num_samples) >= 1, "--num_stories and --num_samples must be at least 1")


@dataclass(frozen=True)
class Probes:
    """What architectures learn of synthetic tasks; all take up to 10 minutes of one core for each architecture."""

    specs: Architectures  # presets, runs, or layer strings
    tasks: tuple[str, ...] = ()  # names of tasks, such as "hop chains"; all if left out
    seeds: int = 1  # models of each architecture and task
    steps: int | None = None  # maximum of training steps for each learning rate
    lrs: tuple[float, ...] = ()  # learning rates: the best is taken
    quick: bool = False  # less training, with one learning rate: a first look
    thorough: bool = False  # larger models, 20 times the steps: hours
    plugins: tuple[str, ...] = ()  # modules whose BLOCKS the layer strings name
    save: Path | None = None  # write the radar chart into this file, and the table beside it as .csv

    def __post_init__(self):
        check(len(self.specs) > 0, "name at least one preset, run or layer string")
        check(not (self.quick and self.thorough), "give --quick or --thorough, not both")
        check_folder("--save", self.save)


@dataclass(frozen=True)
class Scaling:
    """How losses fall with size, and which architecture scales better. Also takes the --train options of train.py."""

    specs: Architectures  # presets, EXPERIMENT/PRESET, runs or groups of runs
    sizes: tuple[str, ...]  # parameters, embeddings included, such as 0.25m 0.5m 1m 2m
    seeds: int = 3  # runs of each size; 1 gives no verdicts
    steps: float | None = None  # training steps, equal for all; 2000 if no budget is given
    minutes: float | None = None  # training minutes, equal for all
    tokens_per_parameter: float | None = None  # larger models see more tokens; 20 is common
    name: str = "scaling"  # prefix of the names of the runs
    save: Path | None = None  # write the plot, the table of runs and the verdict into this folder

    def __post_init__(self):
        budgets = [self.steps, self.minutes, self.tokens_per_parameter]
        check(budgets.count(None) >= 2, "give one of --steps, --minutes and --tokens_per_parameter")


@dataclass(frozen=True)
class Grade:
    """Share of samples that are stories of storyworld, and the first errors of the others."""

    names: Runs  # runs or groups of seeds, trained on storyworld
    num_samples: int = 200  # samples per run
    temperature: float = 1.0  # 1 samples the distribution that the model has learned
    seed: int = 0  # of the random draws

    def __post_init__(self):
        check(len(self.names) > 0, "name at least one run")
        check(self.num_samples >= 1, "--num_samples must be at least 1")


@dataclass(frozen=True)
class Cost:
    """Parameters, FLOPs and cache bytes per token of models, or of every block."""

    specs: Architectures = ()  # presets, runs, or layer strings at the sizes of the first preset or run
    blocks: bool = False  # every block of the registry, at the sizes of the default config
    T: int | None = None  # number of tokens; None: the context length of the model
    plugins: tuple[str, ...] = ()  # modules whose BLOCKS the layer strings name

    def __post_init__(self):
        check(self.specs or self.blocks, "name presets, runs or layer strings, or take --blocks")
        check(self.T is None or self.T >= 1, f"--T {self.T}: give at least 1")


@dataclass(frozen=True)
class Diff:
    """The differences between two architectures, block by block."""

    left: Architecture  # a preset, a run, or a layer string at the sizes of the other
    right: Architecture  # another
    html: Path | None = None  # write a page into this file instead of printing
    plugins: tuple[str, ...] = ()  # modules whose BLOCKS the layer strings name

    def __post_init__(self):
        check_folder("--html", self.html)


@dataclass(frozen=True)
class Judge:
    """A large language model grades the stories of small ones, and compares them."""

    runs: Runs  # one is graded, two or more are also compared
    model: str  # the judge, by its name on the server
    base_url: str | None = None  # an OpenAI-compatible server; None: $OPENAI_BASE_URL, or OpenAI's own
    prompts: str = "beginnings"  # beginnings, words, or a file with one prompt per line
    stories_per_prompt: int = 1  # stories of each model
    max_new_tokens: int | None = None  # of a story; None: until it ends or the context is full
    temperature: float = 0.8  # of the models that write
    seed: int = 0  # of the stories, and of the judge
    repeat: float = 0.2  # share of the stories that are judged twice
    judge_temperature: float | None = None  # None: the server's own
    timeout: float = 60.0  # seconds to wait for an answer
    retries: int = 4  # after a time-out, or if the server is busy
    parallel: int = 4  # concurrent calls
    max_answer_tokens: int = 1000  # of an answer of the judge
    price_per_million: Prices = None  # one, or two: of tokens read and written
    save: Path | None = None  # write stories and answers into this file, as JSON
    yes: bool = False  # ask without confirmation

    def __post_init__(self):
        check(len(self.runs) > 0, "name at least one run")
        check(len(set(self.runs)) == len(self.runs), "a run is named twice: name different ones")
        for name in ("stories_per_prompt", "parallel", "max_answer_tokens", "timeout"):
            check(getattr(self, name) > 0, f"--{name} {getattr(self, name)}: give a number above 0")
        check(self.retries >= 0, f"--retries {self.retries}: give 0 or more")
        check(0 <= self.repeat <= 1, f"--repeat {self.repeat}: give a share from 0 to 1")
        prices = self.price_per_million or (0.0,)
        cure = "--price_per_million: give one price, or that of tokens read and that of tokens written"
        check(len(prices) <= 2 and min(prices) >= 0, cure)
        check_folder("--save", self.save)
