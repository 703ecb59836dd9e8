"""New places of the modules of earlier versions, for plugins and experiments that still import the old names."""

import re

MOVED = {  # an old module, or a name in it, and where it is now
    "capability": "evaluation.probes",
    "checkpoint": "training.checkpoint",
    "comparison": "evaluation.comparison",
    "contract": "modules.contract",
    "cost": "metrics.cost",
    "curves": "evaluation.curves",
    "data": "data.dataset",
    "evaluation": "metrics.scores",
    "experiment": "runs.experiments",
    "judge": "evaluation.judge.judging",
    "kernels": "fast.ops",
    "losses": "fast.loss",
    "machine": "training.machine",
    "measures": "metrics.measures",
    "menu": "modules.registry",
    "norms": "model",
    "optim": "training.optim",
    "originals": "originals.load",
    "packing": "data.packing",
    "presets": "runs.presets",
    "probe": "training.autotune",
    "report": "training.report",
    "runs": "runs.folder",
    "runs.load_model": "inference",
    "seeds": "training.seeds",
    "shape_comments": "shapes.comments",
    "sources": "data.sources",
    "story_losses": "metrics.story_losses",
    "storyworld": "data.storyworld.world",
    "visibility": "model",
    "world_grades": "metrics.world_grades",
}


def moved_to(error: BaseException) -> str:
    """The sentence to add to the error of an import from an old place; "" for any other error.

    >>> moved_to(ModuleNotFoundError("No module named 'presets'", name="presets"))
    ' It is now in runs/presets.py: `from runs.presets import ...`'
    """
    if not isinstance(error, ImportError):
        return ""
    name = re.match(r"cannot import name '(\w+)'", str(error))  # from a package with the name of an old module
    place = (name and MOVED.get(f"{error.name}.{name[1]}")) or MOVED.get(error.name)
    return f" It is now in {place.replace('.', '/')}.py: `from {place} import ...`" if place else ""
