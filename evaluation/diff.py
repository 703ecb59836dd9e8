"""Two architectures side by side: what differs in their configs, their modules, weights and costs.

    python -m evaluation diff 1m gemma2_like                     # as text; presets and runs, by name
    python -m evaluation diff 1m gemma2_like --html diff.html    # as one page
    diff("1m", ModelConfig(num_layers=4))             # in a notebook; configs, too
"""

import argparse
from pathlib import Path

from config import ModelConfig
from evaluation.alignment import Side
from evaluation.diff_view import DiffView, as_page
from metrics.cost import config_of, cost_of


def diff(left: str | ModelConfig, right: str | ModelConfig, T: int | None = None) -> DiffView:
    """What differs between two presets, runs or configs, which read T tokens, by default as many as each can.

    Raises as cost.config_of does.
    """
    titles = [spec if isinstance(spec, str) else "a config" for spec in (left, right)]
    if titles[0] == titles[1]:
        titles = [f"{title} ({side})" for title, side in zip(titles, ("left", "right"), strict=True)]
    sides = zip(titles, (left, right), strict=True)
    return DiffView(*(Side(title, *config_of(spec), cost_of(spec, T)) for title, spec in sides))


def main(words: list[str]):
    parser = argparse.ArgumentParser(prog="python -m evaluation diff", description="Two architectures side by side.")
    parser.add_argument("left", metavar="PRESET_OR_RUN")
    parser.add_argument("right", metavar="PRESET_OR_RUN")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one page there instead of printing")
    arguments = parser.parse_args(words)
    compared = diff(arguments.left, arguments.right)
    if arguments.html is None:
        print(compared)
    else:
        arguments.html.write_text(as_page(compared), encoding="utf-8")
        print(f"the differences are in {arguments.html}")
