"""The audit of scores: each cheat of the museum is caught, honest models pass, and no comparison takes a run that failed."""

import json
import re
from dataclasses import replace

import museum
import own_models
import pytest
import torch
from museum import TOKENIZER, Bigram

from conftest import MODEL, change
from evaluation import __main__ as evaluation
from evaluation.comparison import compare
from evaluation.curves import plot_curves
from evaluation.page import as_page
from metrics.audit import audit
from metrics.audit.memory import check_memory, reference_stories
from metrics.audit.subject import Subject
from metrics.measures import token_scores
from metrics.scores import evaluate
from metrics.story_losses import read_losses, save_losses
from model import GPT
from runs.folder import Run
from train import train
from training.report import plot_losses, table, write_report

# Each cheat with the check that names its cause; other checks may catch it as well.
MODELS = {
    "NextToken": "future", "ScansBackwards": "future", "NormalisesOverTime": "future", "BestOfDraws": "future",
    "ReadsFrames": "future", "SeesPadding": "length", "SeesTheLength": "length", "NormalisesOverTheBatch": "rows",
    "ReadsOtherRows": "rows", "ComparesStories": "rows", "LearnsWhileScoring": "weights", "CountsWhileScoring": "weights",
    "CarriesItsState": "order", "RemembersScoredStories": "order", "GetsBetter": "order", "OneClassMore": "logits",
    "Infinite": "logits", "ForgesTheLoss": "logits", "Bidirectional": "model", "NotNormalised": "next",
    "NotNormalisedBound": "source", "MeanOfTokens": "next", "FreeEnd": "next", "KnowsItsLength": "shortest",
    "PseudoLikelihood": "source", "Copies": "source", "BestCase": "source", "Density": "shortest", "BoundCalledExact": "next",
}  # fmt: skip
WITH_STORIES = {"KnowsPrefixes": "memory", "KnowsBuffer": "memory", "KnowsStories": "memory", "KnowsTheOrder": "order"}
TOKENIZERS = (
    "Drops", "SaysItKeepsMore", "Sorts", "Normalises", "RemembersTexts", "Invents", "LeavesOutTheEnd", "TokensOutOfRange",
    "DependsOnTheBatch",
)  # fmt: skip
HONEST = ("Bigram", "DrawsInTraining", "DrawsInEval", "Exact", "LooseBound", "MaskedDiffusion")


@pytest.fixture
def failures(stories):
    """The names of the checks that fail; the validation stories are the first 120, and the next ones those of training."""

    def run(model, tokenizer=TOKENIZER, memory=True) -> list[str]:
        reference = stories[120:240] if memory else None
        checks = audit(model, tokenizer, stories[:120], reference, same_source=True, num_stories=8)
        assert all(check.how for check in checks)
        return [check.name for check in checks if check.problem]

    torch.manual_seed(0)
    return run


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cheats_is_caught(failures, stories, name):
    assert MODELS[name] in failures(getattr(museum, name)().fit(stories[120:240]), memory=False)


@pytest.mark.parametrize("name", WITH_STORIES)
def test_a_model_that_knows_the_stories_is_caught(failures, stories, name):
    model = getattr(museum, name)(stories[:120])
    assert WITH_STORIES[name] in failures(model)
    assert evaluate(model, TOKENIZER, stories[:120]).loss < evaluate(Bigram(), TOKENIZER, stories[:120]).loss - 1


def test_stories_on_disk_are_caught(failures, stories, tmp_path):
    assert "memory" in failures(museum.KnowsFile(stories[:120], tmp_path / "stories.json"))


def test_a_causal_mask_off_by_one_is_caught(failures):
    assert "future" in failures(museum.gpt({"Attn": museum.OffByOne}), memory=False)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_cheats_is_caught(failures, name):
    assert "text" in failures(Bigram(), getattr(museum, name)(TOKENIZER.name, TOKENIZER.content), memory=False)


def test_a_tokenizer_that_knows_the_stories_is_caught(failures, stories):
    tokenizer = museum.KnowsTexts(stories[:120])
    assert failures(Bigram(MODEL, tokenizer.vocab_size), tokenizer) == ["memory"]


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_model_passes(failures, stories, name):
    assert failures(getattr(museum, name)().fit(stories[120:240])) == []


@pytest.mark.parametrize("changes", [
    {"dropout": 0.3, "max_seq_len": 20}, {"layers": "Norm->Attn(window=5)->+->Norm->MoE(num_experts=4)->+"},
])  # fmt: skip
def test_gpt_passes(failures, changes):
    assert failures(museum.gpt(**changes)) == []


@pytest.mark.parametrize("name", own_models.MODELS)
def test_models_without_story_ids_or_cache_pass(failures, name):
    model = own_models.MODELS[name](MODEL, TOKENIZER.vocab_size)
    model.config, model.vocab_size = MODEL, TOKENIZER.vocab_size
    assert failures(model) == []


class TestWorld:
    """On storyworld the reference stories are new ones, and the entropy is a bound for all models."""

    @pytest.fixture
    def world(self):
        from data.sources import open_source

        source = open_source("storyworld_small:200")
        validation = [*source.stories("validation", None)][:60]
        return source, validation

    def test_reference_stories_are_new_and_follow_the_seed(self, world):
        source, validation = world
        one, other, again = (reference_stories(source, validation, 20, seed) for seed in ("a", "b", "a"))
        assert one == again != other and len(set(one)) == 20 and not set(one) & set(validation)
        assert not set(one) & set(source.stories("train", None))

    def test_a_model_that_beats_the_world_is_caught(self, world):
        source, validation = world
        reference = reference_stories(source, validation, 60, "seed")
        problems = []
        for model in (Bigram(), museum.NextToken(replace(MODEL, max_seq_len=512)).fit(reference)):
            subject = Subject(model, TOKENIZER, validation, num_stories=12)
            problems.append(check_memory(subject, reference, source.name, same_source=True)[1])
        assert problems[0] is None and "better than the world itself" in problems[1]


class TestRuns:
    @pytest.fixture
    def runs(self, tiny_run, make_config):
        """Runs of models of the museum's plugin, with their losses. The weights are those of an honest one."""

        def make(name):
            config = replace(MODEL, model="Bigram", plugins=("museum",))
            list(train(config, make_config(max_steps=2, eval_every=2, packing="padded"), name))
            change(name, "model_config.json", model=name)
            save_losses(name)

        return make

    def test_no_comparison_takes_a_run_whose_audit_failed(self, runs, capsys):
        runs("NextToken")
        assert "the audit of NextToken failed: future: NextToken sees the future" in capsys.readouterr().out
        assert read_losses("NextToken")[1].audit[0].startswith("future: NextToken sees the future")
        write_report("NextToken")
        assert "- the audit failed: future: NextToken sees the future" in Run("NextToken").path("README.md").read_text()
        result = compare("tiny", "NextToken")
        assert not result.verdicts and "NextToken is left out, as its audit failed: future: " in "\n".join(result.notes)

    def test_an_honest_run_is_compared(self, runs):
        runs("DrawsInEval")
        assert read_losses("DrawsInEval")[1].audit == []
        assert len(compare("tiny", "DrawsInEval").verdicts) == 1

    def test_the_command_reports_each_check_and_the_exit_code(self, runs, capsys):
        evaluation.main(["audit", "tiny", "--num_stories", "10"])
        lines = capsys.readouterr().out.splitlines()
        names = [line.split()[1] for line in lines if line.startswith("ok")]
        assert names == ["text", "logits", "future", "length", "prefix", "rows", "order", "weights", "memory", "saved"]
        assert "tiny: all 10 checks passed" in lines and read_losses("tiny")[1].audit == []
        runs("SeesTheLength")
        with pytest.raises(SystemExit) as stop:
            evaluation.main(["audit", "SeesTheLength", "--num_stories", "10"])
        assert stop.value.code == 1 and "FAIL  length    10 stories cut" in capsys.readouterr().out

    def test_losses_that_were_changed_by_hand_are_caught(self, make_run, capsys):
        make_run("better", shift=-0.1)
        with pytest.raises(SystemExit):
            evaluation.main(["audit", "better", "--num_stories", "10"])
        assert "the column nats of story_losses.csv is not that of the model" in capsys.readouterr().out
        assert "better is left out, as its audit failed: saved: " in "\n".join(compare("tiny", "better").notes)

    def test_looking_does_not_change_the_training(self, make_config, monkeypatch):
        """The model draws random numbers in eval, too: when it is scored, and when it writes."""
        monkeypatch.setattr("training.setup.try_out", lambda model: None)  # which warns of that
        config, weights = replace(MODEL, model="DrawsInEval", plugins=("museum",)), []
        for name, eval_every in (("often", 1), ("once", 4)):
            list(train(config, make_config(max_steps=4, eval_every=eval_every, packing="padded"), name))
            weights.append(Run(name).load("checkpoint.pth", {"model"})["model"]["table.weight"])
        assert weights[0].equal(weights[1])


class TestBounds:
    """An upper bound is called one wherever it stands."""

    @pytest.fixture
    def bound(self, tiny_run, make_config):
        config = replace(MODEL, model="LooseBound", plugins=("museum",))
        list(train(config, make_config(max_steps=4, eval_every=2, packing="padded"), "bound"))
        return "bound"

    def test_in_the_readme(self, bound):
        write_report(bound)
        losses, scored = read_losses(bound)
        assert scored.is_bound and Run(bound).is_bound and losses["top1"].isna().all()
        readme = Run(bound).path("README.md").read_text(encoding="utf-8")
        assert "- ≤ " in readme and "loss ≤ " in readme and "≤ marks upper bounds" in readme and ": ≤ " in readme

    def test_in_tables_curves_and_pages(self, bound):
        rows = table("tiny", bound, num_stories=20)
        assert rows.loc[bound, "bits per byte"].startswith("≤ ") and rows.loc["tiny", "bits per byte"] < 8
        for axes in (plot_losses("tiny", bound), plot_curves("tiny", bound)):
            first, second = axes.get_legend_handles_labels()[1]
            assert first.startswith("tiny") and second.startswith("≤ bound")
        result = compare("tiny", bound)
        assert result.candidates.loc[bound, "bits per byte"].startswith("≤ ") and "≤ " in str(result)
        assert "≤ marks an upper bound, as of bound, which may be better than it looks" in "\n".join(result.notes)
        page = as_page(result, num_stories=5, prompts=("Tom",))
        assert "≤ " in page and "it gives no probabilities of the next token" in page

    def test_measures_of_tokens_say_that_there_are_none(self, stories):
        with pytest.raises(ValueError, match="needs the probabilities of the next token, and LooseBound gives none"):
            token_scores(museum.LooseBound(), TOKENIZER, stories[:3])

    @pytest.mark.parametrize(("bounds", "verdict"), [
        ("a", "no verdict on a and b: the loss of b is lower than the upper bound of a by .* which may be better than its bound"),
        ("b", "b is better than a by .* at least, as its loss is an upper bound"),
        ("ab", "no verdict on a and b: the upper bound of b is lower than the upper bound of a by"),
    ])  # fmt: skip
    def test_in_the_verdict(self, make_run, bounds, verdict):
        for seed in range(3):
            for name, shift in (("a", 0.0), ("b", -0.1)):
                make_run(f"{name}-seed{seed}", shift * (1 + 0.01 * seed), seed, name, is_bound=name in bounds)
        assert re.match(verdict, compare("a", "b").verdicts[0])


class TestScorer:
    def test_scores_of_a_model_that_draws_repeat_and_leave_no_trace(self, stories):
        model = museum.DrawsInEval()
        state = torch.get_rng_state()
        one, other = (evaluate(model, TOKENIZER, stories[:20]).story_nats for _ in range(2))
        assert one.equal(other) and torch.get_rng_state().equal(state)

    @pytest.mark.parametrize(("model", "said"), [
        (museum.OneClassMore, r"must return \(logits, loss\) with float logits \(\d, \d+, 131\), not a torch.float32 tensor of"),
        (museum.ForgesTheLoss, "not a NoLoss"),
        (museum.Bidirectional, "Bidirectional sees the future .* give the model story_nats"),
        (museum.Density, r"story_nats of Density gave -\d.* A density is no probability"),
    ])  # fmt: skip
    def test_what_cannot_be_scored_is_an_error_of_one_line(self, stories, model, said):
        with pytest.raises(ValueError, match=said):
            evaluate(model().fit(stories), TOKENIZER, stories[:3])

    def test_attention_to_the_future_is_not_scored_by_logits(self, stories):
        class Both(museum.Attention):
            """Sees all.  (B, T, D) -> (B, T, D)"""

            causal = False

        with pytest.raises(ValueError, match="GPT with Both sees the future"):
            evaluate(museum.gpt({"Attn": Both}), TOKENIZER, stories[:3])

    def test_bytes_are_not_counted_by_the_tokenizer(self, stories):
        tokenizer = museum.SaysItKeepsMore(TOKENIZER.name, TOKENIZER.content)
        score = evaluate(GPT(MODEL, TOKENIZER.vocab_size), tokenizer, stories[:3])
        assert score.story_bytes.tolist() == [len(story.encode()) for story in stories[:3]]

    def test_old_losses_are_no_bounds_and_not_audited(self, make_run):
        values = json.loads(Run("tiny").path("story_losses.json").read_text())
        del values["is_bound"], values["audit"]
        Run("tiny").save_text("story_losses.json", json.dumps(values))
        assert read_losses("tiny")[1].is_bound is False and read_losses("tiny")[1].audit is None
