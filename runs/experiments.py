"""Experiments by name, and their presets: one idea, one folder in experiments/."""

import importlib
from pathlib import Path

from config import did_you_mean
from runs.moved import moved_to

FOLDER = Path(__file__).parents[1] / "experiments"


def experiment_names() -> list[str]:
    return sorted(path.parent.name for path in FOLDER.glob("*/__init__.py"))


def check_experiment(name: str):
    """Raises ValueError with the nearest match where there is no experiment of that name."""
    if name not in experiment_names():
        there = experiment_names()
        raise ValueError(f"no experiment is called {name!r}.{did_you_mean(name, there)} There are: {', '.join(there)}")


def experiment_preset(name: str):
    """The Preset `EXPERIMENT/PRESET`: PRESET in the PRESETS of experiments/EXPERIMENT/config.py.

    Raises ValueError with the nearest match for an unknown one, ImportError where that file cannot be imported.
    """
    experiment, _, own = name.partition("/")
    check_experiment(experiment)
    module = f"experiments.{experiment}.config"
    try:
        presets = importlib.import_module(module).PRESETS
    except Exception as error:  # a reader's own code: anything may be wrong in it
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ImportError(f"the presets of {module} cannot be had: {reason}.{moved_to(error)}") from error
    if own not in presets:
        there = [f"{experiment}/{preset}" for preset in presets]
        raise ValueError(f"no preset is called {name!r}.{did_you_mean(name, there)} There are: {', '.join(there)}")
    return presets[own]
