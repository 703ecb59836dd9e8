"""Promises of the floor and of the grades of the storyworld: exact, honest about what broke, and no burden on a training."""

import math
import random
import re
import shutil
from collections import Counter
from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import tokenizers as hf
import torch
from torch import nn

from config import ModelConfig, TrainConfig
from data.dataset import load_data
from data.storyworld import world as storyworld
from data.storyworld.nodes import Reference
from evaluation import __main__ as evaluation
from inference import load_model
from metrics import world_grades
from metrics.scores import evaluate
from metrics.world_floor import floor_of, world_floor
from metrics.world_grades import (
    BROKEN,
    COLUMNS,
    KINDS,
    as_told,
    check_tokenizer,
    grade_model,
    grade_texts,
    write_samples,
)
from metrics.world_report import graded_log, log_with_excess, plot_grades
from runs.folder import Run
from tokenizer import HuggingFaceTokenizer, load_tokenizer
from train import train
from training.report import plot_losses, table, write_report

MODEL = ModelConfig(dim=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=16, max_seq_len=64, dropout=0.1)
TRAIN = TrainConfig(
    data="storyworld:200", batch_size=2, max_steps=6, max_minutes=None, eval_every=2, eval_stories=200, checkpoint_every=3,
    warmup_steps=1, grade_stories=5,
)  # fmt: skip
CLOCK = ["seconds", "tokens_per_second", "peak_memory_mb", "overhead_seconds"]


@pytest.fixture(scope="module")
def world_folder(tmp_path_factory):
    """A folder of runs with one on storyworld, "told", whose samples were graded."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BASEGPT_RUNS", str(folder / "runs"))
        patch.setenv("BASEGPT_CACHE", str(folder / "cache"))
        list(train(MODEL, TRAIN, "told"))
    return folder


@pytest.fixture
def told(world_folder, folders):
    shutil.copytree(world_folder, folders, dirs_exist_ok=True)
    return "told"


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@dataclass(frozen=True)
class Mention:
    """A word of a story that stands for the value of a variable."""

    start: int
    word: str
    reference: Reference
    known: bool  # whether an earlier sentence has told the value


@pytest.fixture(scope="module")
def mentions():
    """120 stories, each with what its words stand for."""
    found, draw = [], Reference.sample

    def sample(self, random, env, out):
        known, start = env[self.index] is not None, sum(map(len, out))
        cost = draw(self, random, env, out)
        found[-1][1].append(Mention(start, out[-1], self, known))
        return cost

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reference, "sample", sample)
        rng, texts = random.Random(5), []
        for _ in range(120):
            found.append(("", []))
            texts.append(storyworld.tell(rng)[0])
    return [(text, words) for text, (_, words) in zip(texts, found, strict=True)]


def with_word(text: str, mention: Mention, word: str) -> str:
    return text[: mention.start] + word + text[mention.start + len(mention.word) :]


def bert_like(texts: list[str]) -> HuggingFaceTokenizer:
    """A tokenizer that writes all in small letters."""
    engine = hf.Tokenizer(hf.models.WordPiece(unk_token="[UNK]"))
    engine.normalizer, engine.pre_tokenizer = hf.normalizers.Lowercase(), hf.pre_tokenizers.BertPreTokenizer()
    engine.decoder = hf.decoders.WordPiece()
    engine.train_from_iterator(texts, hf.trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"]))
    return HuggingFaceTokenizer("small_letters", engine.to_str())


def llama_like(texts: list[str]) -> HuggingFaceTokenizer:
    """A tokenizer that puts a space in front of a text, and leaves it there."""
    engine = hf.Tokenizer(hf.models.BPE())
    engine.pre_tokenizer = hf.pre_tokenizers.Metaspace()
    engine.decoder = hf.decoders.Sequence([hf.decoders.Replace("▁", " "), hf.decoders.Fuse()])
    engine.train_from_iterator(texts, hf.trainers.BpeTrainer(vocab_size=400))
    return HuggingFaceTokenizer("space_in_front", engine.to_str())


class TestTexts:
    def test_all_stories_of_the_world_are_accepted_however_they_are_written(self, mentions):
        texts = [text for text, _ in mentions]
        grades = grade_texts(texts)
        assert (grades.samples, grades.accepted, grades.sentences_right, grades.examples) == (120, 120, 1.0, {})
        for change in (
            lambda text: f" {text}\n",
            lambda text: text.replace('"', "\u201d").replace("'", "\u2019"),
            lambda text: text.replace(" ", "  "),
            lambda text: text.replace(" ", "\u00a0"),
            lambda text: text.replace("\n", " \r\n\r\n "),
        ):
            assert all(change(text) != text for text in texts)
            assert grade_texts(map(change, texts)).accepted == 120
        assert all(as_told(text) == text for text in texts)
        assert grade_texts(text.replace(". ", ".") for text in texts).accepted == 0  # but a space between words must be there

    @pytest.mark.parametrize("kind", ["who", "what", "where", "why"])
    def test_one_fact_that_broke_is_named(self, mentions, kind):
        """A word for what was told before becomes another word of its kind, so that exactly one fact is broken."""
        rng, broken, examples = random.Random(0), [], set()
        for text, words in mentions:
            for mention in rng.sample(words, len(words)):
                others = [word for word in mention.reference.anything.by_text if word != mention.word]
                if mention.known and mention.reference.fact == kind and others and len(broken) < 60:
                    broken.append((with_word(text, mention, rng.choice(others)), mention))
                    examples.add(mention.reference.variable.table)
                    break
        assert len(broken) >= 20 and len(examples) >= 2, (len(broken), examples)
        grades = grade_texts(text for text, _ in broken)
        assert grades.broken == {other: len(broken) * (other == kind) for other in KINDS}, grades.examples
        assert list(grades.examples) == [kind] and f"this is not {kind} it can be here" in grades.examples[kind]
        right = [text[: mention.start].count(". ") for text, mention in broken]
        assert 0 < grades.sentences_right < 1 and max(right) > 3

    def test_of_two_facts_that_contradict_each_other_the_later_one_is_blamed(self, mentions):
        """The hero becomes another animal where it is introduced: what is said of it later no longer suits it."""
        kinds, elsewhere = Counter(), Counter()
        for text, words in mentions:
            first = next(mention for mention in words if mention.reference.variable.name == "kind")
            for animal, plots in storyworld.program().cast.items():
                if animal.name in ("dog", "cat", "bear", "duck") and first.word not in ("girl", "boy", animal.name):
                    graded = grade_texts([with_word(text, first, animal.name)])
                    suits = storyworld.score(text).plot in [plot.name for plot in plots]
                    (kinds if suits else elsewhere).update(+Counter(graded.broken))
        assert set(kinds) == {"who", "what"} and min(kinds.values()) > 5, kinds
        assert elsewhere["grammar"] > 0, elsewhere  # a plot in which such an animal has no part

    def test_what_is_no_story_at_all(self, mentions):
        for text, words in mentions[:30]:
            spans = storyworld.sentence_spans(text)
            middle, end = spans[len(spans) // 2], spans[6][0]
            cut, longer = text[: end - 1], f"{text} They went to bed."
            salad = text[: middle[0]] + "Spoon the quickly of blue seven." + text[middle[1] :]
            unknown = with_word(text, words[-1], "Zanzibar")
            for wrong in (cut, text[: end + 3]):
                assert grade_texts([wrong]).broken["end"] == 1, wrong
            for wrong in (salad, unknown, longer):
                assert grade_texts([wrong]).broken["grammar"] == 1, wrong
            assert grade_texts([salad]).sentences_right == pytest.approx(len(spans) // 2 / len(storyworld.sentence_spans(salad)))
        assert grade_texts([""]).broken["end"] == grade_texts(["Hello there."]).broken["grammar"] == 1
        assert grade_texts(["", *(text for text, _ in mentions[:3])]).columns == {
            "accepted": 3 / 4, "sentences_right": 3 / 4, **dict.fromkeys(BROKEN, 0.0), "broken_end": 1 / 4,
        }  # fmt: skip

class TestTokenizers:
    def test_those_that_keep_stories_are_taken(self, mentions):
        texts = [text for text, _ in mentions]
        spaced = llama_like(texts)
        assert spaced.decode(spaced.encode(texts[0])) != texts[0]
        for tokenizer in (spaced, *map(load_tokenizer, ("bpe_tokenizer_95", "bpe_tokenizer_1024"))):
            check_tokenizer(tokenizer)
            assert grade_texts(tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)).accepted == len(texts)

    def test_one_that_does_not_is_refused_and_has_no_floor(self, mentions, capsys):
        texts = [text for text, _ in mentions]
        small = bert_like(texts)
        with pytest.raises(ValueError, match=r"small_letters does not keep the stories of the world .* take a tokenizer"):
            check_tokenizer(small)
        assert floor_of(texts, small, "storyworld") is None
        assert "small_letters does not keep the stories" in capsys.readouterr().err


class TestFloor:
    @pytest.mark.parametrize("name", ["bpe_tokenizer_95", "bpe_tokenizer_1024"])
    def test_is_the_code_length_of_the_very_stories(self, mentions, name):
        texts, tokenizer = [text for text, _ in mentions[:20]], load_tokenizer(name)
        nats = num_tokens = num_bytes = 0
        for text in texts:
            nats -= storyworld.score(text).log_prob
            num_tokens += len(tokenizer.encode(text, bos=True, eos=True)) - 1
            num_bytes += len(text)
        floor = floor_of(texts, tokenizer, "storyworld")
        assert floor.nats_per_token == pytest.approx(nats / num_tokens)
        assert floor.bits_per_byte == pytest.approx(nats / num_bytes / math.log(2))
        with pytest.raises(ValueError, match="not a story of this world"):
            floor_of([*texts, "The cat sat."], tokenizer, "storyworld")

    def test_of_a_run_is_that_of_the_stories_it_was_scored_on(self, told, tiny_run, capsys):
        model, tokenizer = load_model(told)
        stories = load_data(TRAIN.data, tokenizer, MODEL.max_seq_len).validation[: TRAIN.eval_stories]
        floor = world_floor(told)
        assert floor == floor_of(stories, tokenizer, "storyworld") and world_floor(tiny_run) is None
        log = Run(told).log().dropna(subset="validation_loss")
        score = evaluate(model, tokenizer, stories)
        excess = log_with_excess(told).dropna(subset="validation_loss")
        assert excess["excess"].min() == pytest.approx(score.loss - floor.nats_per_token, abs=1e-6)
        assert excess["excess_bits_per_byte"].tolist() == (log["bits_per_byte"] - floor.bits_per_byte).tolist()
        assert log_with_excess(tiny_run)["excess"].isna().all()

        saved = Run(told).load("model.pth", set())
        Run(told).save("model.pth", saved | {"validation_fingerprint": "other stories"})
        capsys.readouterr()
        assert world_floor(told) is None
        assert "the storyworld has changed since the run 'told' was trained" in capsys.readouterr().err


class Teller(nn.Module):
    """A model that has learned some stories by heart, and tells each of them equally often."""

    def __init__(self, tokenised: list[list[int]], vocab_size: int):
        super().__init__()
        self.config, self.vocab_size, self.follows = ModelConfig(max_seq_len=1024), vocab_size, {}
        self.weight = nn.Parameter(torch.zeros(1))
        for ids in tokenised:
            for at in range(1, len(ids)):
                self.follows.setdefault(tuple(ids[:at]), Counter())[ids[at]] += 1

    def forward(self, tokens, targets=None):
        logits = torch.full((len(tokens), 1, self.vocab_size), -math.inf)  # of the last token alone, as no other is asked for
        for row, ids in enumerate(tokens.tolist()):
            for token, count in self.follows.get(tuple(ids), {0: 1}).items():  # whatever comes behind the end
                logits[row, -1, token] = math.log(count)
        return logits, None


class TestModels:
    def test_a_model_is_graded_by_the_stories_it_tells(self, mentions, monkeypatch):
        tokenizer = load_tokenizer("bpe_tokenizer_1024")
        right = [text for text, _ in mentions[:4]]
        wrong = [text[: storyworld.sentence_spans(text)[5][1]] for text, _ in mentions[6:8]]
        teller = Teller(tokenizer.encode_batch([*right, *wrong], bos=True, eos=True), tokenizer.vocab_size)
        samples = write_samples(teller, tokenizer, 10, seed=3)
        assert len(samples) == 10 and set(samples) <= {*right, *wrong}
        grades = grade_model(teller, tokenizer, 10, seed=3)
        assert 0 < grades.accepted == sum(text in right for text in samples) < 10
        assert grades.broken["end"] == 10 - grades.accepted
        monkeypatch.setattr(world_grades, "BATCH_SIZE", 4)
        assert write_samples(teller, tokenizer, 10, seed=3) == samples
        assert write_samples(teller, tokenizer, 9, seed=4) == samples[1:]


class TestTraining:
    def test_grades_are_in_the_log_and_disturb_nothing(self, told):
        records = list(train(MODEL, replace(TRAIN, grade_stories=0), "ungraded"))
        graded, ungraded = Run(told).log(), Run("ungraded").log()
        assert set(graded) - set(ungraded) == set(COLUMNS) and list(graded)[-len(COLUMNS) :] == list(COLUMNS)
        pd.testing.assert_frame_equal(graded.drop(columns=[*CLOCK, *COLUMNS]), ungraded.drop(columns=CLOCK), check_exact=True)
        assert all(record.grades is None for record in records)
        assert np.allclose(graded[["accepted", *BROKEN]].sum(axis=1), 1)
        assert graded["accepted"].notna().tolist() == graded["validation_loss"].notna().tolist() == [True] * 3
        for file in ("model.pth", "checkpoint.pth"):
            one, other = (Run(name).load(file, {"model"}) for name in (told, "ungraded"))
            assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])
        assert torch.equal(one["random_state"]["cpu"], other["random_state"]["cpu"])
        model, tokenizer = load_model(told)
        best = graded.loc[graded["validation_loss"].idxmin()]
        assert best[list(COLUMNS)].to_dict() == grade_model(model, tokenizer, TRAIN.grade_stories).columns

    def test_resume_is_bit_for_bit(self, told):
        for record in train(MODEL, TRAIN, "stopped"):
            if record.step == 3:
                break
        records = list(train(MODEL, TRAIN, "stopped", resume=True))
        assert [record.grades is None for record in records] == [False, True, False]
        logs = [Run(name).log().drop(columns=CLOCK) for name in (told, "stopped")]
        pd.testing.assert_frame_equal(*logs, check_exact=True)

    def test_without_the_world_it_is_an_error(self, corpus, mentions, monkeypatch, folders):
        for data in (corpus, "auto"):
            with pytest.raises(ValueError, match="grade_stories=4: only storyworld can grade stories, and not data="):
                TrainConfig(data=data, grade_stories=4)
        with pytest.raises(ValueError, match="grade_stories=-1"):
            TrainConfig(data="storyworld", grade_stories=-1)
        monkeypatch.setattr("training.setup.load_tokenizer", lambda name: bert_like([text for text, _ in mentions]))
        with pytest.raises(ValueError, match="small_letters does not keep the stories"):
            next(train(MODEL, TRAIN, "small"))
        assert not Run("small").folder.exists()


class TestReport:
    def test_curves_show_the_floor(self, told, tiny_run):
        floor = world_floor(told).nats_per_token
        for names, lines in (((told,), 1), ((told, tiny_run), 1), ((tiny_run,), 0)):
            axes = plot_losses(*names)
            flat = [line for line in axes.get_lines() if "entropy of the world" in line.get_label()]
            assert len(flat) == lines and all(set(line.get_ydata()) == {floor} for line in flat)
            assert lines == 0 or axes.get_ylim()[0] < floor

    def test_table_has_the_excess(self, told, tiny_run):
        rows = table(told, tiny_run, num_stories=30)
        model, tokenizer = load_model(told)
        stories = load_data(TRAIN.data, tokenizer, MODEL.max_seq_len).validation[:30]
        assert rows.loc[told, "entropy"] == floor_of(stories, tokenizer, "storyworld").bits_per_byte
        assert rows.loc[told, "excess"] == pytest.approx(rows.loc[told, "bits per byte"] - rows.loc[told, "entropy"])
        assert math.isnan(rows.loc[tiny_run, "excess"])
        assert "excess" not in table(tiny_run, num_stories=10)

    def test_grades_against_the_excess(self, told, tiny_run):
        log = graded_log(told)
        left, right = plot_grades(told).axes
        assert left.get_lines()[0].get_xdata().tolist() == log["excess"].tolist()
        assert left.get_lines()[0].get_ydata().tolist() == log["accepted"].tolist()
        assert left.get_lines()[-1].get_ydata().tolist() == log["sentences_right"].tolist()
        assert left.get_xlim()[0] > left.get_xlim()[1]
        assert {text.get_text() for text in right.get_legend().get_texts()} == {"accepted", *KINDS}
        shutil.copytree(Run(told).folder, Run("again").folder)
        assert len(plot_grades(told, "again").axes) == 3
        with pytest.raises(ValueError, match="no samples of the run 'tiny' were graded: train on storyworld with --train"):
            plot_grades(tiny_run)

    def test_the_readme_says_both(self, told, tiny_run):
        write_report(told)
        readme, floor = (Run(told).folder / "README.md").read_text(encoding="utf-8"), world_floor(told)
        over = Run(told).log()["bits_per_byte"].min() - floor.bits_per_byte
        assert f"- {over:.4f} bits per byte and " in readme
        assert f"{floor.bits_per_byte:.4f} and {floor.nats_per_token:.4f}" in readme
        assert "of 5 samples at temperature 1 the world accepts 0.0% (95% interval 0.0% to 52.2%)" in readme
        assert "](grades.png)" in readme and (Run(told).folder / "grades.png").stat().st_size > 1000
        write_report(tiny_run)
        readme = (Run(tiny_run).folder / "README.md").read_text(encoding="utf-8")
        assert "entropy" not in readme and "grades" not in readme and "\n\n![loss curve](loss.png)\n\nThree" in readme

    def test_measures_says_the_excess(self, told, capsys):
        evaluation.main(["measures", told, "--num_stories", "20", "--num_samples", "1"])
        loss, over, entropy = re.search(r"loss (.+) nats per token, (.+) over .*, ([\d.]+);", capsys.readouterr().out).groups()
        assert float(over) == pytest.approx(float(loss) - float(entropy), abs=2e-4) and float(entropy) > 0.1

    def test_the_command(self, told, tiny_run, capsys):
        evaluation.main(["grade", told, "--num_samples", "6", "--seed", "2"])
        printed = capsys.readouterr().out
        assert "6 samples each, at temperature 1, seed 2" in printed and "95% from" in printed and "sentence 1, " in printed
        row = next(line for line in printed.splitlines() if line.startswith("told "))
        assert row.split()[:5] == ["told", "6", "0.000", "0.000", "0.459"]
        for words, problem in (
            (["nobody"], "error: no run is called 'nobody'"),
            ([tiny_run], "error: the run 'tiny' was trained on little.txt: the world can only grade models of its own stories"),
            ([told, "--temperature", "-1"], "error: temperature=-1.0"),
        ):
            with pytest.raises(SystemExit) as stop:
                evaluation.main(["grade", *words])
            assert str(stop.value).startswith(problem)
