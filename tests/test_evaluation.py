"""Promises of evaluation.py, against a slow reference that reads one story at a time."""

import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import fast
from conftest import MODEL
from fast import blocks, build, ops
from inference import load_model
from metrics.scores import Evaluation, evaluate, ranks_of, windows
from model import GPT, IGNORE
from tokenizer import load_tokenizer


@pytest.fixture
def model_and_tokenizer():
    """Random weights that are large enough for every prediction to depend on all that was read."""
    torch.manual_seed(1)
    tokenizer = load_tokenizer("bpe_tokenizer_128")
    model = GPT(replace(MODEL, num_layers=2), tokenizer.vocab_size)
    for weight in model.parameters():
        weight.data.normal_(std=0.4)
    return model.eval(), tokenizer


TEXTS = [
    "Tom ran.",
    "Once upon a time there was a cat. " * 9,
    "Lily saw “a café”.",
    "A big red ball.",
    "Mia and Ben lost a hat, and " * 4,
    "x",
]


@torch.no_grad()
def reference(model, tokenizer, text):
    """[(nats, rank)] of each token behind bos: each window of a long story begins half a context behind the one before."""
    ids = tokenizer.encode(text, bos=True, eos=True)
    context, scored, start = model.config.max_seq_len, [], 0
    while len(scored) < len(ids) - 1:
        piece = ids[start : start + context + 1]
        log_probs = model(torch.tensor([piece[:-1]]))[0][0].double().log_softmax(dim=-1)
        for at in range(len(scored) - start, len(piece) - 1):
            own = log_probs[at, piece[at + 1]]
            scored.append((-own.item(), (log_probs[at] > own).sum().item()))
        start += context // 2
    return scored


class TestEvaluate:
    def test_against_the_slow_reference(self, model_and_tokenizer):
        model, tokenizer = model_and_tokenizer
        score = evaluate(model, tokenizer, TEXTS, batch_size=3, top_k=(1, 5, 10))
        wanted = [reference(model, tokenizer, text) for text in TEXTS]
        for nats, tokens, story in zip(score.story_nats, score.story_tokens, wanted, strict=True):
            assert tokens == len(story)
            assert nats.item() == pytest.approx(sum(loss for loss, _ in story), rel=1e-5)
        losses, ranks = zip(*(token for story in wanted for token in story), strict=True)
        assert score.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert score.perplexity == pytest.approx(math.exp(score.loss))
        num_bytes = sum(len(text.encode("utf-8")) for text in TEXTS) - len("“é”".encode())
        assert score.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / num_bytes, rel=1e-5)
        for k in (1, 5, 10):
            assert score.top_k[k] == pytest.approx(sum(rank < k for rank in ranks) / len(ranks))

    def test_a_story_that_fits_is_scored_by_the_models_own_loss(self, model_and_tokenizer):
        model, tokenizer = model_and_tokenizer
        ids = torch.tensor([tokenizer.encode("Tom ran.", bos=True, eos=True)])
        assert ids.shape[1] <= MODEL.max_seq_len
        _, loss = model(ids[:, :-1], ids[:, 1:])
        assert evaluate(model, tokenizer, ["Tom ran."]).loss == pytest.approx(loss.item(), rel=1e-5)

    def test_batch_size_and_order_do_not_matter(self, model_and_tokenizer):
        model, tokenizer = model_and_tokenizer
        wanted = evaluate(model, tokenizer, TEXTS, batch_size=1, top_k=(3,))
        order = random.Random(0).sample(range(len(TEXTS)), len(TEXTS))
        for batch_size in (2, 5, 100):
            score = evaluate(model, tokenizer, [TEXTS[i] for i in order], batch_size=batch_size, top_k=(3,))
            torch.testing.assert_close(score.story_nats, wanted.story_nats[order], rtol=1e-5, atol=1e-4)
            assert torch.equal(score.story_bytes, wanted.story_bytes[order])
            assert score.top_k == wanted.top_k

    def test_a_model_that_knows_nothing_needs_ln_v_nats(self, model_and_tokenizer):
        model, tokenizer = model_and_tokenizer
        model.head.weight.data.zero_()
        score = evaluate(model, tokenizer, TEXTS)
        assert score.loss == pytest.approx(math.log(tokenizer.vocab_size), rel=1e-6)
        assert score.perplexity == pytest.approx(tokenizer.vocab_size, rel=1e-5)

    @pytest.mark.parametrize("name", ["bpe_tokenizer_95", "bpe_tokenizer_1024"])
    def test_no_byte_that_the_tokenizer_loses_is_predicted(self, name):
        """Bits per byte of a model that knows nothing are tokens x log2 V / bytes: here of a comma, two spaces and a dot."""
        tokenizer = load_tokenizer(name)
        model = GPT(MODEL, tokenizer.vocab_size)
        model.head.weight.data.zero_()
        score = evaluate(model, tokenizer, ["Жил, был кот."])
        assert score.story_bytes.tolist() == [4] and score.story_tokens.tolist() == [9 + 4 + 1]
        assert score.bits_per_byte == pytest.approx(14 * math.log2(tokenizer.vocab_size) / 4, rel=1e-6)
        assert evaluate(model, tokenizer, ["Жил"]).bits_per_byte == math.inf

    @pytest.mark.parametrize("training", [True, False])
    def test_dropout_is_off_and_the_mode_is_left_as_it_was(self, training):
        tokenizer = load_tokenizer("bpe_tokenizer_128")
        model = GPT(replace(MODEL, dropout=0.5), tokenizer.vocab_size).train(training)
        state = torch.get_rng_state()
        assert evaluate(model, tokenizer, TEXTS).loss == evaluate(model, tokenizer, TEXTS).loss
        assert model.training is training
        assert torch.equal(torch.get_rng_state(), state)
        assert all(weight.grad is None for weight in model.parameters())

    @pytest.mark.skipif(build.fingerprint() == "none", reason="there is no C++ compiler")
    def test_our_kernels_score_the_same_for_many_stories_or_where_they_are_compiled(self, model_and_tokenizer, monkeypatch):
        model, tokenizer = model_and_tokenizer
        calls, attention = [], ops.attention
        monkeypatch.setattr(ops, "attention", lambda *inputs: calls.append(inputs) or attention(*inputs))
        wanted = evaluate(model, tokenizer, TEXTS, top_k=(1, 5))
        assert not calls
        for many_stories in (len(TEXTS), 1000):
            monkeypatch.setattr(blocks, "MANY_STORIES", many_stories)
            score = evaluate(model, tokenizer, TEXTS, top_k=(1, 5))
            torch.testing.assert_close(score.story_nats, wanted.story_nats, rtol=1e-5, atol=1e-4)
            assert calls and score.top_k == wanted.top_k and not fast.is_used(model)
            calls.clear()
            library = build.library_path(build.fingerprint())
            library.parent.mkdir(exist_ok=True)
            library.touch()  # they may have been compiled for another test

    def test_a_model_that_is_configured_for_training_is_left_as_it_is(self, model_and_tokenizer, monkeypatch):
        model, tokenizer = model_and_tokenizer
        monkeypatch.setattr(blocks, "MANY_STORIES", 1)
        monkeypatch.setattr(ops, "attention", lambda *_: pytest.fail("a kernel attends"))
        fast.use(model, kernels=False, loss_chunk=5)
        classes = [type(module) for module in model.modules()]
        evaluate(model, tokenizer, TEXTS)
        assert [type(module) for module in model.modules()] == classes and model.loss_chunk == 5

    def test_ranks_against_a_sort_and_ties_count_against_the_model(self):
        torch.manual_seed(0)
        logits, targets = torch.randn(3, 4, 11), torch.randint(11, (3, 4))
        places = logits.argsort(dim=-1, descending=True).eq(targets[..., None]).int().argmax(dim=-1)
        assert torch.equal(ranks_of(logits, targets), places)
        assert ranks_of(torch.zeros(1, 2, 5), torch.tensor([[3, IGNORE]])).tolist() == [[4, 5]]
        assert ranks_of(torch.full((1, 1, 5), math.nan), torch.tensor([[3]])).tolist() == [[5]]

    def test_no_stories(self, model_and_tokenizer):
        with pytest.raises(ValueError, match="no stories to evaluate on"):
            evaluate(*model_and_tokenizer, [])

    def test_half_a_character_is_lost_and_no_crash(self, model_and_tokenizer):
        """JSON can hold \\ud83d, one half of an emoji, which has no bytes in UTF-8."""
        assert evaluate(*model_and_tokenizer, ["Tom \ud83d ran."]).story_bytes.tolist() == [9]

    def test_the_perplexity_of_a_hopeless_model_is_infinite(self):
        hopeless = Evaluation(torch.tensor([1e5]), torch.tensor([10]), torch.tensor([10]), {})
        assert hopeless.perplexity == math.inf

    def test_the_loss_of_a_trained_model_is_that_of_transformers(self, tiny_run):
        """Its own cross entropy of the same logits, shifted and averaged by the library."""
        from transformers.loss.loss_utils import ForCausalLMLoss

        model, tokenizer = load_model(tiny_run)
        ids = torch.tensor([tokenizer.encode("Tom had a ball.", bos=True, eos=True)])
        logits, _ = model(ids)
        wanted = ForCausalLMLoss(logits, ids, vocab_size=tokenizer.vocab_size).item()
        assert evaluate(model, tokenizer, ["Tom had a ball."]).loss == pytest.approx(wanted, rel=1e-5)
        assert wanted == pytest.approx(F.cross_entropy(logits[0, :-1], ids[0, 1:]).item(), rel=1e-5)


class TestWindows:
    def test_the_example_of_the_docstring(self):
        a, b, c, d, e, f, g = range(7)
        first, second = windows([[a, b, c, d, e, f, g]], max_seq_len=4)
        assert (first.inputs, first.targets) == ([a, b, c, d], [b, c, d, e])
        assert (second.inputs, second.targets) == ([c, d, e, f], [IGNORE, IGNORE, f, g])

    @pytest.mark.parametrize("max_seq_len", [1, 2, 3, 8, 9, 32])
    @pytest.mark.parametrize("length", [2, 3, 7, 8, 9, 10, 16, 17, 33, 100])
    def test_every_target_once_behind_half_a_window(self, max_seq_len, length):
        stories = [list(range(length)), list(range(1000, 1000 + length // 2 + 2))]
        seen = {0: [], 1: []}
        for piece in windows(stories, max_seq_len):
            assert len(piece.inputs) == len(piece.targets) <= max_seq_len
            for context, (token, target) in enumerate(zip(piece.inputs, piece.targets, strict=True), 1):
                assert token in stories[piece.story]
                if target != IGNORE:
                    assert target == token + 1
                    from_the_start = piece.inputs[0] == stories[piece.story][0]
                    assert from_the_start or context > max_seq_len // 2
                    seen[piece.story].append(target)
        assert seen == {0: stories[0][1:], 1: stories[1][1:]}
