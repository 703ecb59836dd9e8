"""Two architectures side by side: what differs in their configs, their modules, weights and costs.

    python -m evaluation diff 1m gemma2_like                     # as text; presets and runs, by name
    python -m evaluation diff 1m gemma2_like --html diff.html    # as one page
    diff("1m", ModelConfig(num_layers=4))             # in a notebook; configs, too
"""

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

from config import ModelConfig
from evaluation.alignment import CHANGED, LEFT, RIGHT, SAME, Group, groups_of
from evaluation.diff_view import as_page, as_table, as_text
from metrics.cost import Cost, config_of, cost_of

TOTALS = {
    "parameters": "parameters",
    "flops": "FLOPs per token",
    "training_flops": "FLOPs per token in training",
    "cache_per_token": "cache bytes per token",
    "cache_fixed": "cache bytes that do not grow",
    "cache": "cache bytes after the context",
}


@dataclass(frozen=True)
class Side:
    """One of the two architectures."""

    title: str
    config: ModelConfig
    vocab_size: int
    cost: Cost


@dataclass(frozen=True)
class Diff:
    """What differs. A notebook shows it as a table, `print` as text, and `as_page` is a page of its own."""

    left: Side
    right: Side

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.left, self.right

    @property
    def config_rows(self) -> list[tuple[str, str, str]]:
        """Each field of the config that differs, and what it is here and there."""
        names = [field.name for field in fields(ModelConfig)]
        rows = [(name, *(shown_field(side.config, name) for side in self.sides)) for name in names]
        rows.append(("vocabulary", *(f"{side.vocab_size:,}" for side in self.sides)))
        return [row for row in rows if row[1] != row[2]]

    @property
    def groups(self) -> list[Group]:
        """All parts of both, aligned, in the order of the models; pairs of layers that are alike stand at the first of them."""
        return groups_of(self.left.cost, self.right.cost)

    @property
    def totals(self) -> list[tuple[str, float, float]]:
        return [(label, *(getattr(side.cost, quantity) for side in self.sides)) for quantity, label in TOTALS.items()]

    @property
    def legend(self) -> str:
        left, right = self.sides
        read = " and ".join(dict.fromkeys(f"{side.cost.T:,}" for side in self.sides))
        return (
            f"{SAME} alike, {CHANGED} differs, {LEFT} only in {left.title}, {RIGHT} only in {right.title}. FLOPs are forward and "
            f"per token, the mean over {read} tokens. Cache is the bytes that each token adds. Numbers are of one layer."
        )

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_table(self)


def diff(left: str | ModelConfig, right: str | ModelConfig, T: int | None = None) -> Diff:
    """What differs between two presets, runs or configs, which read T tokens, by default as many as each can.

    Raises as cost.config_of does.
    """
    titles = [spec if isinstance(spec, str) else "a config" for spec in (left, right)]
    if titles[0] == titles[1]:
        titles = [f"{title} ({side})" for title, side in zip(titles, ("left", "right"), strict=True)]
    sides = zip(titles, (left, right), strict=True)
    return Diff(*(Side(title, *config_of(spec), cost_of(spec, T)) for title, spec in sides))


def shown_field(config: ModelConfig, name: str) -> str:
    """The value of a field; where that is None, also what blocks are given in its place."""
    value, given = getattr(config, name), config.block_values()[name]
    return str(value) if value == given else f"{value} ({given})"


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
