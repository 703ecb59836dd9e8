"""Promises of curves.py: the mean over seeds and its band, point by point, and the floor of storyworld."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from conftest import MODEL
from evaluation.curves import curve, plot_all_curves, plot_curves, plot_positions
from metrics.world_floor import world_floor
from runs.folder import Run
from train import train


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def seeds(tiny_run):
    """Make a run of a group with a curve of its own: bits per byte at steps, with a row without an evaluation between any two."""

    def make(name, steps, bits, group="group"):
        shutil.copytree(Run(tiny_run).folder, Run(name).folder)
        rows = [{"step": step, "bits_per_byte": value} for step, value in zip(steps, bits, strict=True)]
        rows += [{"step": step + 1, "bits_per_byte": None} for step in steps]
        log = pd.DataFrame(rows).sort_values("step")
        step = log["step"]
        log = log.assign(tokens=100 * step, seconds=step / 2, flops=1e6 * step, train_loss=1.0)
        log = log.assign(validation_loss=log["bits_per_byte"])
        Run(name).save_text("log_data.csv", log.to_csv(index=False))
        Run(name).save_text("group.json", f'{{"group": "{group}"}}')
        return name

    return make


class TestCurve:
    @pytest.mark.parametrize("by, unit", [("step", 1), ("tokens", 100), ("seconds", 0.5), ("flops", 1e6)])
    def test_the_band_is_students_t_at_each_point(self, seeds, by, unit):
        values = np.array([[2.0, 1.5, 1.2], [2.1, 1.4, 1.3], [2.05, 1.6, 1.1]])
        for number, bits in enumerate(values):
            seeds(f"group-seed{number}", [10, 20, 30], bits)
        drawn = curve("group", by)
        assert drawn.x.tolist() == [10 * unit, 20 * unit, 30 * unit] and drawn.seeds == 3
        wanted = [stats.ttest_1samp(point, 0).confidence_interval(0.95) for point in values.T]
        assert drawn.mean.tolist() == pytest.approx(values.mean(axis=0).tolist())
        assert drawn.low.tolist() == pytest.approx([interval.low for interval in wanted])
        assert drawn.high.tolist() == pytest.approx([interval.high for interval in wanted])

    def test_the_band_covers_the_truth_in_95_percent(self, seeds):
        """As a band over many points whose truth is 1."""
        random = np.random.default_rng(0)
        for number in range(3):
            seeds(f"group-seed{number}", list(range(0, 4000, 2)), random.normal(1, 0.01, 2000))
        drawn = curve("group")
        assert 0.93 <= np.mean((drawn.low <= 1) & (1 <= drawn.high)) <= 0.97

    def test_seeds_are_read_between_their_evaluations_where_all_have_some(self, seeds):
        seeds("group-seed0", [10, 30, 50], [2.0, 1.0, 0.8]), seeds("group-seed1", [20, 40, 60], [1.4, 1.0, 0.6])
        drawn = curve("group")
        assert drawn.x.tolist() == [20, 30, 40, 50]
        assert drawn.mean.tolist() == pytest.approx([(1.5 + 1.4) / 2, (1.0 + 1.2) / 2, (0.9 + 1.0) / 2, (0.8 + 0.8) / 2])

    def test_one_seed_has_no_band_and_the_diverged_are_left_out(self, seeds):
        seeds("group-seed0", [10, 20], [2.0, 1.0]), seeds("group-seed1", [10, 20], [9.0, 9.0])
        Run("group-seed1").save_text("diverged.txt", "the loss is no longer finite at step 25")
        drawn = curve("group")
        assert drawn.seeds == 1 and drawn.mean.tolist() == [2.0, 1.0] and np.isnan([drawn.low, drawn.high]).all()
        assert curve("group-seed0", members=("group-seed0", "group-seed1")).mean.tolist() == [5.5, 5.0]

    def test_bad_input(self, seeds):
        seeds("group-seed0", [10, 20], [2.0, 1.0]), seeds("group-seed1", [30, 40], [2.0, 1.0])
        with pytest.raises(ValueError, match="no range of steps in common"):
            curve("group")
        with pytest.raises(ValueError, match="by='hours': it must be one of"):
            curve("group", "hours")
        with pytest.raises(FileNotFoundError, match="no run is called 'nobody'"):
            curve("nobody")
        seeds("empty", [10], [None], "another")
        with pytest.raises(ValueError, match="'empty' was stopped before it was evaluated"):
            curve("empty")
        Run("empty").save_text("diverged.txt", "the loss is no longer finite at step 1")
        with pytest.raises(ValueError, match="'empty' diverged: there is no curve"):
            curve("empty")


class TestPlot:
    def test_a_band_for_seeds_and_a_thin_line_for_one(self, seeds):
        for number, luck in enumerate((0.0, 0.02)):
            seeds(f"group-seed{number}", [1, 10, 20], np.array([3.0, 1.5, 1.0]) + luck)
        seeds("alone", [1, 10, 20], [3.0, 1.4, 0.9], "another")
        axes = plot_curves("group", "alone")
        assert axes.get_legend_handles_labels()[1] == ["group (mean of 2 seeds)", "alone (one seed, no band)"]
        assert axes.figure.legends[0].get_title().get_text() == "band: 95% interval of the mean"
        group, alone = axes.get_lines()
        assert group.get_linewidth() > alone.get_linewidth() and alone.get_ydata().tolist() == [3.0, 1.4, 0.9]
        (band,) = axes.collections
        edges = band.get_paths()[0].vertices
        drawn = curve("group")
        assert edges[:, 1].min() == pytest.approx(drawn.low.min()) and edges[:, 1].max() == pytest.approx(drawn.high.max())
        low, high = axes.get_ylim()
        assert low < 0.9 and 1.51 < high < 3.0  # the first step is out of sight
        assert not axes.get_title()

    def test_other_validation_stories_are_said(self, tiny_run, make_config, corpus, tmp_path):
        other = tmp_path / "other.txt"
        other.write_text(Path(corpus).read_text(encoding="utf-8").replace("Tom", "Tim"), encoding="utf-8")
        list(train(MODEL, make_config(data=str(other), max_steps=2, eval_every=1), "other"))
        assert plot_curves(tiny_run, "other").get_title() == "Different data: do not compare!"

    def test_all_four_axes(self, seeds):
        seeds("group-seed0", [1, 10, 20], [3.0, 1.5, 1.0])
        figure = plot_all_curves("group")
        assert [axes.get_xlabel() for axes in figure.axes] == ["steps", "tokens", "training FLOPs", "seconds"]
        assert not plt.get_fignums()

    def test_the_loss_by_position_and_its_difference_to_the_first(self):
        losses = pd.DataFrame({"base": [1.5, 0.5, 0.75], "idea": [1.25, 0.5, 1.0]}, index=["1 to 1", "2 to 3", "4 to 7"])
        left, right = plot_positions(losses).axes
        assert [line.get_ydata().tolist() for line in left.get_lines()] == [[1.5, 0.5, 0.75], [1.25, 0.5, 1.0]]
        assert [line.get_ydata().tolist() for line in right.get_lines()] == [[0, 0, 0], [-0.25, 0, 0.25]]
        assert [tick.get_text() for tick in left.get_xticklabels()] == ["1", "2–3", "4–7"]
        assert right.get_ylabel() == "difference to base"


def test_storyworld_has_its_entropy_as_a_line_and_the_excess_on_the_right(make_config, tiny_run):
    config = make_config(data="storyworld:300", tokenizer="bpe_tokenizer_256", max_steps=2, eval_every=1)
    list(train(replace(MODEL, max_seq_len=32), config, "world"))
    floor = world_floor("world").bits_per_byte
    axes = plot_curves("world")
    line = axes.get_lines()[-1]
    assert line.get_ydata()[0] == pytest.approx(floor) and line.get_label() == f"entropy of the world, {floor:.4f}"
    low, high = axes.get_ylim()
    assert low < floor < high
    (excess,) = axes.child_axes
    axes.figure.canvas.draw()
    assert excess.get_ylim() == pytest.approx((low - floor, high - floor)) and math.isfinite(floor)
    assert excess.get_ylabel() == "excess over the entropy"
    mixed = plot_curves("world", tiny_run)
    assert len(mixed.get_lines()) == 2 and not mixed.child_axes  # on other data there is no such line
