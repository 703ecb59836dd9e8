"""Promises of training/notebook.py: the live plot, its messages, and the table of presets."""

import signal
from dataclasses import replace

import pytest

from conftest import MODEL
from data.cache import say
from metrics.plots import alt_text
from runs.folder import Run
from runs.presets import PRESETS
from train import train
from training import notebook
from training.notebook import LivePlot, NotebookError, latest_run, preset_table, what_is_special


@pytest.fixture
def screen(monkeypatch):
    """What a notebook would show: figures and stories, with their display options."""
    shown = []
    monkeypatch.setattr(notebook, "show_figure", lambda figure, **options: shown.append((figure, options)))
    monkeypatch.setattr("IPython.display.display", lambda story, **options: shown.append((story, options)))
    return shown


def test_two_runs_share_a_plot_with_readable_names(make_config, screen):
    live, config = LivePlot(), make_config()
    for label, dim in (("base", 16), ("wide", 24)):
        last = live.follow(f"long_name_{label}", train(replace(MODEL, dim=dim), config, f"long_name_{label}"), label)
    (*_, (figure, _), (stories, options)) = screen
    (axes,) = figure.axes
    assert axes.get_legend_handles_labels()[1] == ["base", "wide"]
    assert f"little.txt: {last.bits_per_byte:.3f} bits per byte, finished, " in axes.get_title()
    assert stories.texts == {"wide after 20 steps": last.story} and options["update"]
    assert not screen[0][1]["update"] and len(screen) == 4  # drawn once a run, as each took less than some seconds


def test_it_is_drawn_before_the_first_evaluation(make_config, screen):
    LivePlot(seconds_between=0).follow("mine", train(MODEL, make_config(max_steps=5, eval_every=4), "mine"))
    figures = [figure for figure, options in screen if options["display_id"].startswith("plot")]
    first, *_, last = (figure.axes[0].get_title() for figure in figures)
    assert len(figures) == 6 and "bits per byte" not in first and "of training left" in first and "finished" in last
    assert alt_text(figures[0]).endswith(": mine")  # which has no point yet


def test_a_stopped_run_says_how_to_go_on_and_its_curve_is_whole(make_config, screen, capsys):
    def interrupted():
        for record in train(MODEL, make_config(eval_every=4), "mine"):
            yield record
            if record.step == 12:
                signal.raise_signal(signal.SIGINT)

    LivePlot().follow("mine", interrupted())
    assert "stopped after step 12 and saved; run the cell with resume = True to go on" in capsys.readouterr().out
    LivePlot().follow("mine", train(MODEL, make_config(eval_every=4), "mine", resume=True))
    assert "stopped" not in capsys.readouterr().out
    validation = screen[-2][0].axes[0].get_lines()[1]
    assert validation.get_xdata().tolist() == [4, 8, 12, 16, 20]


def test_the_y_range_leaves_out_the_steep_start(make_config, screen):
    LivePlot().follow("mine", train(MODEL, make_config(max_steps=40), "mine"))
    axes = screen[0][0].axes[0]
    losses = axes.get_lines()[0].get_ydata()
    assert losses[0] > axes.get_ylim()[1] > max(losses[4:])


def test_an_error_is_one_line_in_the_words_of_a_notebook(tiny_run, make_config, screen):
    with pytest.raises(NotebookError) as raised:
        LivePlot().follow(tiny_run, train(MODEL, make_config(), tiny_run))
    line = "error: a run called 'tiny' exists. Take another name, or go on with it by resume = True"
    assert raised.value._render_traceback_() == [line] and not screen


def test_the_latest_run_is_the_one_to_go_on_with(tiny_run):
    with pytest.raises(NotebookError, match="there is no run of quick to go on with"):
        latest_run("quick")
    for name in ("quick_2026-01-02_10-00-00", "quick_2026-01-02_09-00-00", "quick_other"):
        Run(name).folder.mkdir()
        Run(name).save_text("checkpoint.pth", "")
    assert latest_run("quick") == "quick_2026-01-02_10-00-00"


def test_presets_are_a_table_that_unfolds():
    table = preset_table().data
    assert table.startswith(f"<details><summary>All {len(PRESETS)} presets</summary>")
    assert all(f"<th>{name}</th>" in table for name in PRESETS)
    assert what_is_special(PRESETS["mixtral_like"].model) == "MoE, rope_theta 1e+06, no tied_embeddings"


def test_messages_go_to_stdout_in_a_notebook(monkeypatch, capsys):
    say("in a terminal")
    monkeypatch.setattr("data.cache.in_notebook", lambda: True)
    say("raise --train.max_steps")
    assert tuple(capsys.readouterr()) == ("raise max_steps\n", "in a terminal\n")
