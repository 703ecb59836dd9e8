"""Promises of plots.py: one style for all plots, one legend outside the axes, and a text for those who cannot see them."""

import ast
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_hex
from test_imports import LEVELS

from metrics.plots import STYLE, add_legend, alt_text, in_style, line_colour, show_figure

ROOT = Path(__file__).parents[1]


@in_style
def curves(num_axes=1):
    figure, all_axes = plt.subplots(1, num_axes, squeeze=False)
    for number, axes in enumerate(all_axes.flat):
        for name, end in (("base", 1.0), ("idea", 0.5)):
            axes.plot([0, 5, 10], [2.0, 1.5, end], label=name)
        axes.set(xlabel=("steps", "tokens")[number], ylabel="bits per byte")
    add_legend(*all_axes.flat)
    return figure


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def makes_axes(node: ast.FunctionDef) -> bool:
    return any(isinstance(call.func, ast.Attribute) and call.func.attr == "subplots"
               for call in ast.walk(node) if isinstance(call, ast.Call))  # fmt: skip


def test_every_function_that_makes_a_plot_uses_the_style():
    files = [path for room in LEVELS.keys() - {"experiments", "tests"} for path in (ROOT / room).rglob("*.py")]
    makers = [(path.stem, node) for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
              if isinstance(node, ast.FunctionDef) and makes_axes(node)]  # fmt: skip
    assert len(makers) > 8
    bare = {f"{file}.{node.name}" for file, node in makers if "in_style" not in map(ast.unparse, node.decorator_list)}
    assert bare == {"page.new_axes"}  # which adds the colours of the page
    assert "STYLE" in (ROOT / "evaluation" / "page.py").read_text(encoding="utf-8")


def test_the_style_holds_inside_a_function_and_nowhere_else():
    before = dict(plt.rcParams)
    figure = curves()
    assert dict(plt.rcParams) == before
    assert figure.dpi == 150 and figure.axes[0].xaxis.label.get_size() == 9
    with plt.style.context(STYLE):
        expected = [to_hex("C0"), to_hex("C1")]
    assert [line.get_color().lower() for line in figure.axes[0].get_lines()] == expected
    assert in_style(line_colour)(1) == expected[1] != to_hex("C1")


@pytest.mark.parametrize("num_axes", [1, 2])
def test_one_legend_stands_outside_the_axes(num_axes):
    figure = curves(num_axes)
    add_legend(*figure.axes)  # in place of the first
    figure.canvas.draw()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["base", "idea"]
    assert not any(legend.get_window_extent().overlaps(axes.get_tightbbox()) for axes in figure.axes)


def test_the_alt_text_says_what_is_drawn():
    lines = "base from 2 to 1; idea from 2 to 0.5"
    assert alt_text(curves(2)) == f"bits per byte by steps, tokens: {lines}"
    figure = curves()
    figure.axes[0].set_title("tinystories")
    figure.axes[0].axhline(0.25, label="entropy, 0.25")
    assert alt_text(figure) == f"tinystories: bits per byte by steps: {lines}; entropy, 0.25"


def test_a_figure_in_a_notebook_has_its_alt_text(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, **options: shown.append((data, options)))
    show_figure(curves())
    ((data, options),) = shown
    alt = "bits per byte by steps: base from 2 to 1; idea from 2 to 0.5"
    assert data["text/plain"] == alt and options["metadata"]["image/png"] == {"alt": alt, "width": 672}
    assert data["image/png"].startswith("iVBORw0KGgo") and not plt.get_fignums()
