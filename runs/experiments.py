"""Experiments by name, and their presets: one idea, one folder in experiments/."""

import importlib
from pathlib import Path

from config import look_up
from runs.moved import moved_to

FOLDER = Path(__file__).parents[1] / "experiments"


def experiment_names() -> list[str]:
    names = (path.parent.name for path in FOLDER.glob("*/__init__.py"))
    return sorted(name for name in names if name != "templates")  # which new experiments are copied from


def check_experiment(name: str):
    """Raise ValueError with the nearest match if there is no experiment of that name."""
    look_up("experiment", name, dict.fromkeys(experiment_names()))


def experiment_preset(name: str):
    """The Preset `EXPERIMENT/PRESET`, from PRESETS in experiments/EXPERIMENT/config.py.

    Raises ValueError with the nearest match for an unknown name, ImportError if that file cannot be imported.
    """
    experiment = name.partition("/")[0]
    check_experiment(experiment)
    module = f"experiments.{experiment}.config"
    try:
        presets = importlib.import_module(module).PRESETS
    except Exception as error:  # the user's own code may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ImportError(f"the presets of {module} cannot be imported: {reason}.{moved_to(error)}") from error
    return look_up("preset", name, {f"{experiment}/{preset}": presets[preset] for preset in presets})
