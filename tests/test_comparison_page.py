"""Promises of comparison_page.py: all of a comparison on one page that needs nothing from elsewhere, with every text escaped."""

import re
import shutil
from collections import Counter
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pytest

from conftest import MODEL, change, shifted_run
from evaluation import __main__ as evaluation
from evaluation import page
from evaluation.comparison import compare
from evaluation.page import as_page, write_page
from inference import load_model
from metrics.measures import loss_by_position, token_scores
from metrics.scores import evaluate
from metrics.story_losses import save_losses, validation_stories
from runs.folder import Run
from train import train
from training.report import samples

UNCLOSED = {"meta", "br", "wbr", "hr", "img", "input", "link"}
FETCHES = {"src", "srcset", "href", "xlink:href", "data", "action", "poster", "background"}


class Page(HTMLParser):
    """What a page consists of. Fails where a tag is not closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.references, self.texts, self.open = Counter(), [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in UNCLOSED:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags[tag] += 1
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in FETCHES:
                self.references.append(value)
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "style" not in self.open:
            self.texts.append(text)

    @property
    def words(self):
        return " ".join(" ".join(self.texts).split())


GROUPS = ("base", "idea", "thin")  # two of two seeds, and a run of another architecture
PROMPTS = ("Tom had", "Mia saw")
COMMAND = "python -m evaluation compare a b"


@pytest.fixture(scope="module")
def published(trained_folder, make_config, tmp_path_factory):
    """The folder of the runs of GROUPS, their comparison, and its page."""
    runs = tmp_path_factory.mktemp("published") / "runs"
    shutil.copytree(trained_folder / "runs", runs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BASEGPT_RUNS", str(runs))
        patch.setenv("BASEGPT_CACHE", str(trained_folder / "cache"))
        save_losses("tiny")
        for seed in (0, 1):
            shifted_run(f"base-seed{seed}", 0.01 * seed, seed, "base")
            shifted_run(f"idea-seed{seed}", 0.011 * seed - 0.05, seed, "idea")
        thin = replace(MODEL, dim=8, layers="Norm->Attn(window=7)->+->Norm->MLP->+")
        list(train(thin, make_config(max_steps=5, eval_every=2), "thin"))
        save_losses("thin")
        result = compare(*GROUPS)
        return runs, result, as_page(result, prompts=PROMPTS, seed=3, num_stories=20, command=COMMAND)


@pytest.fixture
def groups(published, folders):
    """The runs of GROUPS, in this test's own folder, to read or to change."""
    shutil.copytree(published[0], folders / "runs")
    return GROUPS


@pytest.fixture
def result(groups):
    return compare(*groups)


@pytest.fixture
def without_plots(monkeypatch):
    """Pages without plots, which take longest to make."""
    for name in ("plot_by", "plot_differences"):
        monkeypatch.setattr(page, name, lambda *_: "")


class TestPage:
    def test_the_comparison_is_there(self, published):
        _, result, text = published
        words = Page(text).words
        for said in (*result.verdicts, *result.notes, "one seed only: thin", COMMAND, "torch",
                     "200 whole validation stories of little.txt", "By steps", "By tokens", "By seconds", "By training FLOPs",
                     "base (mean of 2 seeds)", "thin (one seed, no band)", "part by part", "temperature 0.8",
                     "Student's t of the differences between runs of the same seed", "other stories would give"):  # fmt: skip
            assert said in words

    def test_nothing_comes_from_elsewhere(self, published, trained_folder):
        text = published[2]
        assert str(trained_folder) not in text and "--train.data little.txt" in text
        page = Page(text)
        assert page.tags["svg"] == 5 and page.tags["script"] == page.tags["link"] == page.tags["img"] == 0
        assert all(reference.startswith("#") for reference in page.references) and "@import" not in text
        assert {reference[1:] for reference in page.references} <= set(page.ids)
        assert len(set(page.ids)) == len(page.ids) and len(text) < 1_500_000
        assert "currentColor" in text and "#0a0b0c" not in text and "color-scheme: light dark" in text
        assert plt.get_fignums() == []

    def test_the_numbers_are_those_of_the_comparison(self, published):
        _, result, text = published
        words = Page(text).words
        for name, row in result.differences.iterrows():
            ends = " ".join(f"{row[column]:+.4f}" for column in ("difference", "95% from", "to"))
            assert f"{name} {ends}" in words
        for name, row in result.candidates.iterrows():
            assert f"{row['bits per byte']:.4f}" in words and row["parameters"] in words and name in words

    def test_stories_are_the_same_as_elsewhere(self, published, groups):
        told = samples("base-seed0", "idea-seed0", "thin", prompts=PROMPTS, seed=3)
        words = Page(published[2]).words
        assert all(" ".join(story.split()) in words for story in told.to_numpy().flatten())

    def test_what_differs_in_the_configs(self, published):
        words = Page(published[2]).words
        assert "dim 16 16 8" in words and "max_steps 20 20 5" in words and "Attn(window=7)" in words
        assert "num_layers 1 1" not in words and "seed 0 0" not in words.split("Runs")[0].split("Configs")[1]

    def test_where_the_loss_is_as_the_mean_over_the_seeds(self, groups, without_plots, corpus, make_config, capsys):
        list(train(MODEL, make_config(max_steps=9, eval_every=3, seed=1), "other"))
        shutil.copy(Run("other").path("model.pth"), Run("idea-seed1").path("model.pth"))
        save_losses("idea-seed1")
        words = Page(as_page(compare("idea", "thin"), num_stories=20, prompts=("Tom",))).words
        output, errors = capsys.readouterr()
        assert "where the loss is: 100%" in errors and "where the loss is" not in output
        _, stories = validation_stories(corpus, None)
        bits, first = [], []
        for name in ("idea-seed0", "idea-seed1", "thin"):
            model, tokenizer = load_model(name)
            bits.append(evaluate(model, tokenizer, stories[:20]).bits_per_byte)
            first.append(loss_by_position(token_scores(model, tokenizer, stories[:20]))["loss"].iloc[0])
        assert bits[0] != bits[1]
        for row, (one, two, thin) in (("all", bits), ("1 to 1", first)):
            assert f"{row} {np.mean([one, two]):.4f} {thin:.4f}" in words
        for row in ("calibration error", "4 words repeated", "distinct-3", "punctuation", "content"):
            assert row in words

    def test_texts_are_escaped(self, result, without_plots):
        nasty = "<script>alert('Tom & \"Mia\"')</script>"
        result.notes.append(nasty)
        text = as_page(result, prompts=(nasty, "<b>Tom"), num_stories=5, command=nasty)
        page = Page(text)
        assert page.tags["script"] == 0 and nasty not in text and text.count("alert(") >= 3
        assert nasty in page.words

    def test_data_that_are_not_here(self, groups, without_plots, result):
        for name in ("base-seed0", "base-seed1"):
            change(name, "train_config.json", data="moved/<tiny>")
        text = as_page(compare("base", "idea"), num_stories=5, prompts=("Tom",))
        words = Page(text).words
        said = "the loss of base by position and kind of word was not measured: no file, folder or data source is called"
        assert said in words and "By position idea" not in words
        assert "Where the loss is" in words  # that of the other
        words = Page(as_page(compare("base", "idea"), num_stories=5, data_if_missing="storyworld:400")).words
        assert "the loss of base by position and kind of word is measured on storyworld (not its own)" in words
        assert "not measured" not in words

    def test_other_tokenizers_are_said(self, groups, without_plots, make_config):
        list(train(MODEL, make_config(max_steps=5, eval_every=2, tokenizer="bpe_tokenizer_95"), "letters"))
        save_losses("letters")
        words = Page(as_page(compare("base", "letters"), num_stories=5, prompts=("Tom",))).words
        assert "which do not compare between tokenizers" in words and "have different tokenizers" in words

    def test_nothing_to_compare(self, make_run, without_plots):
        make_run("a"), make_run("b", np.inf)
        words = Page(as_page(compare("a", "b"), num_stories=5, prompts=("Tom",))).words
        assert "Nothing could be compared" in words and "b diverged and is left out" in words
        make_run("c", np.inf)
        with pytest.raises(ValueError, match="all runs diverged"):
            as_page(compare("b", "c"))


class TestTerminal:
    def test_a_page_in_place_of_what_was_there(self, make_run, tmp_path, capsys):
        make_run("a"), make_run("b", -0.02, seed=1)
        page = tmp_path / "report.html"
        page.write_text("old")
        evaluation.main(["compare", "a", "b", "--html", str(page), "--prompts", "Tom had", "Mia & Ben"])
        text = page.read_text(encoding="utf-8")
        assert f"the report is in {page}" in capsys.readouterr().out
        assert "<h3>Mia &amp; Ben</h3>" in text and "compare a b --html report.html" in unescape(text)
        Run("a").path("story_losses.csv").unlink()
        evaluation.main(["compare", "a", "b", "--html", str(page)])
        assert "the run 'a' has no losses by story: scoring it" in unescape(page.read_text(encoding="utf-8"))

    @pytest.mark.parametrize("words, said", [
        (["--html", "nowhere/report.html"], "there is no folder nowhere: make it first"),
        (["--prompts", "Tom"], "--prompts are for the report: name a file for it by --html"),
    ])  # fmt: skip
    def test_mistakes_are_told_before_anything_is_measured(self, make_run, capsys, words, said):
        make_run("a"), make_run("b")
        with pytest.raises(SystemExit, match="2"):
            evaluation.main(["compare", "a", "b", *words])
        printed = capsys.readouterr()
        assert not printed.out and said in " ".join(printed.err.replace("│", "").split())

    def test_a_file_that_cannot_be_written(self, result, without_plots, tmp_path):
        with pytest.raises(IsADirectoryError):
            write_page(result, tmp_path, num_stories=5, prompts=("Tom",))
