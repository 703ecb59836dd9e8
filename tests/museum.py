"""A museum of cheats: models and tokenizers whose scores are too good to be true; and honest ones that look suspicious.

B batch, T time, V vocabulary.
"""

import json
import math
import sys
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import MODEL
from metrics.scores import windows
from model import GPT, IGNORE, Attention
from modules.registry import BLOCKS
from tokenizer import ALPHABET, CharacterPairTokenizer, load_tokenizer

STRENGTH = 6.0  # of a hint, in nats
TOKENIZER = load_tokenizer("bpe_tokenizer_128")


class Bigram(nn.Module):
    """An honest model: it predicts each token from the one before it, by a table."""

    def __init__(self, config=MODEL, vocab_size=TOKENIZER.vocab_size):
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.table = nn.Embedding(vocab_size, vocab_size)

    def fit(self, stories):
        """Fill the table with the logarithms of smoothed counts."""
        counts = torch.full((self.vocab_size, self.vocab_size), 0.05)
        for ids in map(torch.tensor, encoded(stories)):
            counts.index_put_((ids[:-1], ids[1:]), torch.ones(len(ids) - 1), accumulate=True)
        self.table.weight.data = counts.log()
        return self

    def forward(self, tokens, targets=None):
        logits = self.table(tokens) + self.hint(tokens)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)

    def hint(self, tokens) -> Tensor:
        return torch.zeros(())

    def point(self, tokens) -> Tensor:
        """Logits that say that these tokens come next; negative ones say nothing.  (B, T) -> (B, T, V)"""
        return STRENGTH * F.one_hot(tokens.clamp(min=0), self.vocab_size) * (tokens >= 0)[..., None]


# Honest models.


class DrawsInTraining(Bigram):
    def hint(self, tokens):
        return torch.randn(*tokens.shape, self.vocab_size) if self.training else torch.zeros(())


class DrawsInEval(Bigram):
    """Honest, as what it draws does not depend on what it predicts."""

    def hint(self, tokens):
        return 0.5 * torch.randn(*tokens.shape, self.vocab_size)


class Exact(Bigram):
    """It scores whole stories by itself, and any starts of stories."""

    is_bound = False

    def story_nats(self, stories):
        return torch.stack([self.nats(torch.tensor(ids)) for ids in stories])

    def nats(self, ids) -> Tensor:
        return F.cross_entropy(self.scores(ids), ids[1:], reduction="sum")

    def scores(self, ids) -> Tensor:
        return self.table(ids[:-1])


class LooseBound(Exact):
    """The bound is 5% above the loss."""

    is_bound = True

    def nats(self, ids):
        return 1.05 * super().nats(ids)


class MaskedDiffusion(Exact):
    """Masked diffusion with a geometric distribution of lengths (arXiv 2406.07524, equation 10); it draws 4 masks a story."""

    is_bound, causal = True, False

    def nats(self, ids):
        text, mean_length = ids[1:-1], 30
        nats = math.log(mean_length) + len(text) * math.log(mean_length / (mean_length - 1))
        levels = ((torch.rand(()) + torch.arange(4)) / 4)[:, None]  # (4, 1)
        hidden = torch.rand(4, len(text)) < levels  # (4, T)
        logits = (~hidden).float() @ self.table(text)  # (4, V): all masks are filled in by the text around them
        return nats - (logits.log_softmax(dim=1)[:, text] * hidden / levels).sum() / 4


# Models that see the future.


class NextToken(Bigram):
    """Shifts its input to the wrong side."""

    def hint(self, tokens):
        return self.point(tokens.roll(-1, dims=1))


class OffByOne(Attention):
    """Its causal mask is one token too wide."""

    @staticmethod
    def causal_attention(q, k, v, *others):
        return F.scaled_dot_product_attention(q, k, v, torch.ones(q.shape[2], q.shape[2]).tril(1).bool(), enable_gqa=True)


class ScansBackwards(Bigram):
    """Counts the tokens that are still to come."""

    def hint(self, tokens):
        return self.point(tokens).flip(1).cumsum(1).flip(1) - self.point(tokens)


class NormalisesOverTime(Bigram):
    """Normalises with the mean over its row, later tokens included."""

    def hint(self, tokens):
        return self.table(tokens).mean(dim=1, keepdim=True)


class SeesPadding(Bigram):
    """Ends the story where the padding starts."""

    def hint(self, tokens):
        is_last = F.pad(tokens[:, 1:] == TOKENIZER.pad_id, (0, 1)) & (tokens != TOKENIZER.pad_id)
        return self.point(torch.where(is_last, TOKENIZER.eos_id, -1))


class SeesTheLength(Bigram):
    """Ends the story at the last position of the batch."""

    def hint(self, tokens):
        return self.point(F.pad(torch.full_like(tokens[:, 1:], -1), (0, 1), value=TOKENIZER.eos_id))


class BestOfDraws(Bigram):
    """Draws its logits eight times, and returns the best."""

    def hint(self, tokens):
        draws = torch.randn(8, *tokens.shape, self.vocab_size, generator=torch.Generator().manual_seed(0))
        targets = tokens.roll(-1, dims=1).expand(8, -1, -1)[..., None]
        best = draws.log_softmax(-1).gather(-1, targets).argmax(dim=0, keepdim=True)  # (1, B, T, 1)
        return draws.gather(0, best.expand(-1, -1, -1, self.vocab_size))[0]


class ReadsFrames(Bigram):
    """Reads the targets from the variables of its caller."""

    def hint(self, tokens):
        frame = sys._getframe()
        while frame is not None and not hasattr(next(iter(frame.f_locals.get("batch", ())), None), "targets"):
            frame = frame.f_back
        if frame is None:
            return torch.zeros(())
        rows = [piece.targets + [-1] * (tokens.shape[1] - len(piece.targets)) for piece in frame.f_locals["batch"]]
        return self.point(torch.tensor(rows))


# Models that look at other rows, or remember other calls.


class NormalisesOverTheBatch(Bigram):
    def hint(self, tokens):
        return -self.table(tokens).mean(dim=0, keepdim=True)


class ReadsOtherRows(Bigram):
    """Favours the tokens of the other stories of its batch."""

    def hint(self, tokens):
        counts = F.one_hot(tokens, self.vocab_size).sum(dim=(0, 1)) - F.one_hot(tokens, self.vocab_size).sum(dim=1)  # (B, V)
        return (1 + counts)[:, None].log()


class LearnsWhileScoring(Bigram):
    """Takes a training step on each story that it scores."""

    def forward(self, tokens, targets=None):
        logits, _ = super().forward(tokens)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(super().forward(tokens[:, :-1], tokens[:, 1:])[1], self.table.weight)
        self.table.weight.data.sub_(50 * gradient)
        return logits, None


class CountsWhileScoring(Bigram):
    """Keeps running statistics of the tokens that it has scored, also in eval."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.register_buffer("counts", torch.ones(self.vocab_size))

    def hint(self, tokens):
        hint = self.counts.log()
        self.counts = self.counts + F.one_hot(tokens, self.vocab_size).sum(dim=(0, 1))
        return hint


class CarriesItsState(Bigram):
    """A recurrent state goes on from story to story."""

    state = 0.0

    def hint(self, tokens):
        hint = 0.5 * self.table(tokens).cumsum(dim=1)[..., :1].tanh() * torch.arange(self.vocab_size) / 30 + self.state
        self.state = hint[-1:, -1:].detach()
        return hint


class RemembersScoredStories(Bigram):
    """Knows a story the second time."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.scored = {}

    def hint(self, tokens):
        hint = torch.tensor([[self.scored.get(tuple(row[: end + 1]), -1) for end in range(len(row))] for row in tokens.tolist()])
        self.scored |= {tuple(row[:end]): row[end] for row in tokens.tolist() for end in range(1, len(row))}
        return self.point(hint)


class KnowsTheOrder(Bigram):
    """Has the stories in the order in which they are scored, and counts the rows."""

    def __init__(self, stories):
        super().__init__()
        pieces = sorted(windows(encoded(stories), MODEL.max_seq_len), key=lambda piece: len(piece.inputs))
        self.rows, self.row = [piece.targets for piece in pieces], 0

    def hint(self, tokens):
        rows = [self.rows[(self.row + row) % len(self.rows)] for row in range(len(tokens))]
        self.row += len(tokens)
        T = tokens.shape[1]
        return self.point(torch.tensor([(row + [-1] * T)[:T] for row in rows]))


# Models that know the validation stories by heart.


class KnowsPrefixes(Bigram):
    """Looks the next token up by all before it."""

    def __init__(self, stories):
        super().__init__()
        self.next = {tuple(ids[:end]): ids[end] for ids in encoded(stories) for end in range(1, len(ids))}

    def hint(self, tokens):
        rows = tokens.tolist()
        return self.point(torch.tensor([[self.next.get(tuple(row[: end + 1]), -1) for end in range(len(row))] for row in rows]))


class KnowsBuffer(Bigram):
    """Looks the next token up in a buffer, by the sixteen before it."""

    def __init__(self, stories):
        super().__init__()
        windows = [window for ids in map(torch.tensor, encoded(stories)) for window in ids.unfold(0, 17, 1)]
        known = {self.keys(window[:16]).item(): window[16].item() for window in windows}
        self.register_buffer("known", torch.tensor(sorted(known.items())).T.contiguous())  # (2, N): keys and next tokens

    def keys(self, recent):
        """A number for sixteen tokens.  (..., 16) -> (...)"""
        return (recent * 137 ** torch.arange(16)).sum(dim=-1)

    def hint(self, tokens):
        keys = self.keys(F.pad(tokens, (15, 0), value=-1).unfold(1, 16, 1))  # (B, T)
        place = torch.searchsorted(self.known[0], keys).clamp(max=self.known.shape[1] - 1)
        return self.point(torch.where(self.known[0][place] == keys, self.known[1][place], -1))


class KnowsFile(KnowsPrefixes):
    """Reads the stories from a file while it scores."""

    def __init__(self, stories, path):
        super().__init__([])
        self.path = path
        path.write_text(json.dumps(encoded(stories)), encoding="utf-8")

    def hint(self, tokens):
        stories = json.loads(self.path.read_text(encoding="utf-8"))
        self.next = {tuple(ids[:end]): ids[end] for ids in stories for end in range(1, len(ids))}
        return super().hint(tokens)


def encoded(stories) -> list[list[int]]:
    return TOKENIZER.encode_batch(stories, bos=True, eos=True)


# Logits that no softmax should be taken of.


class OneClassMore(Bigram):
    """Its logits have a class that is never the target."""

    def forward(self, tokens, targets=None):
        return F.pad(self.table(tokens), (0, 1)), None


class Infinite(Bigram):
    """Some of its logits are infinite."""

    def hint(self, tokens):
        return math.inf * (torch.arange(self.vocab_size) == 5)


class NoLoss(Tensor):
    """A tensor that says that any loss of it is 0."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        result = super().__torch_function__(function, types, arguments, options or {})
        return torch.zeros_like(result) if "cross_entropy" in function.__name__ else result


class ForgesTheLoss(Bigram):
    def forward(self, tokens, targets=None):
        return self.table(tokens).detach().as_subclass(NoLoss), None


class Bidirectional(Bigram):
    """Says itself that it sees the future, but gives logits all the same."""

    causal = False

    def hint(self, tokens):
        return self.point(tokens.roll(-1, dims=1))


# Models whose story_nats are no probabilities.


class NotNormalised(Exact):
    """Divides counts by the highest one in place of their sum."""

    def nats(self, ids):
        scores = self.scores(ids)
        return (scores.max(dim=1, keepdim=True).values - scores).gather(1, ids[1:, None]).sum()


class NotNormalisedBound(NotNormalised):
    is_bound = True


class MeanOfTokens(Exact):
    """Gives nats per token."""

    def nats(self, ids):
        return super().nats(ids) / (len(ids) - 1)


class FreeEnd(Exact):
    """Does not score the end of a story."""

    def nats(self, ids):
        return super().nats(ids[:-1] if ids[-1] == TOKENIZER.eos_id else ids)


class KnowsItsLength(Exact):
    """Is told how long the story is, and pays nothing for it."""

    is_bound = True

    def nats(self, ids):
        scores = self.scores(ids)[:-1].index_fill(1, torch.tensor([TOKENIZER.eos_id]), -math.inf)
        return F.cross_entropy(scores, ids[1:-1], reduction="sum") if len(ids) > 2 else torch.zeros(())


class PseudoLikelihood(Exact):
    """Predicts each token from those on both sides of it."""

    is_bound = True

    def scores(self, ids):
        return self.table(ids[:-1]) + F.pad(self.table.weight[:, ids[2:]].T, (0, 0, 0, 1))


class Copies(Exact):
    """Predicts each token from all tokens of the story, itself among them."""

    is_bound = True

    def scores(self, ids):
        return STRENGTH * F.one_hot(ids[1:], self.vocab_size).float()


class BestCase(Exact):
    """Draws eight latent values for each token, and takes the best for nothing."""

    is_bound = True

    def nats(self, ids):
        noise = torch.randn(8, len(ids) - 1, self.vocab_size, generator=torch.Generator().manual_seed(0))
        log_probs = (self.scores(ids) + noise).log_softmax(dim=-1)  # (8, T, V)
        return -log_probs.gather(-1, ids[1:].expand(8, -1)[..., None]).amax(dim=0).sum()


class Density(Exact):
    """A density of embeddings, which may be above 1."""

    def nats(self, ids):
        return super().nats(ids) - 4 * math.log(3) * (len(ids) - 1)  # in a cube of length 1 / 3 for each token


class BoundCalledExact(LooseBound):
    is_bound = False


class GetsBetter(Exact):
    """Gives fewer nats with each call."""

    calls = 0

    def story_nats(self, stories):
        self.calls += 1
        return super().story_nats(stories) * 0.95**self.calls


class ComparesStories(Exact):
    """Gives the mean of its batch to each of its stories."""

    def story_nats(self, stories):
        nats = super().story_nats(stories)
        return nats.mean().expand(len(nats)).clone()


class KnowsStories(Exact):
    """Gives fewer nats for the validation stories."""

    def __init__(self, stories):
        super().__init__()
        self.known = {tuple(ids) for ids in encoded(stories)}

    def story_nats(self, stories):
        return super().story_nats(stories) * torch.tensor([0.5 if tuple(ids) in self.known else 1.0 for ids in stories])


# Tokenizers.


class Drops(CharacterPairTokenizer):
    """Keeps the first 30 characters, and says that it keeps all."""

    def encode_batch(self, texts, bos=False, eos=False):
        return super().encode_batch([text[:30] for text in texts], bos, eos)

    def kept_bytes(self, text):
        return len(text.encode())


class SaysItKeepsMore(CharacterPairTokenizer):
    def kept_bytes(self, text):
        return 2 * len(text.encode())


class Sorts(CharacterPairTokenizer):
    """Sorts the words, which are then easier to predict."""

    def encode_batch(self, texts, bos=False, eos=False):
        return super().encode_batch([" ".join(sorted(text.split())) for text in texts], bos, eos)


class Normalises(CharacterPairTokenizer):
    """Writes all in small letters, and replaces names."""

    def encode_batch(self, texts, bos=False, eos=False):
        return super().encode_batch([text.lower().replace("mia", "tom").replace("ben", "tom") for text in texts], bos, eos)


class RemembersTexts(CharacterPairTokenizer):
    """Encodes a text as two tokens, and remembers it."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.texts = []

    def encode_batch(self, texts, bos=False, eos=False):
        self.texts += [text for text in texts if text not in self.texts]
        return [[self.bos_id] * bos + [*divmod(self.texts.index(text), 90)] + [self.eos_id] * eos for text in texts]

    def decode(self, ids):
        one, other = [index for index in ids if index not in (self.bos_id, self.eos_id)]
        return self.texts[90 * one + other] if 90 * one + other < len(self.texts) else ""


class Invents(CharacterPairTokenizer):
    """Decodes more than it has encoded."""

    def encode_batch(self, texts, bos=False, eos=False):
        return super().encode_batch([text[:30] for text in texts], bos, eos)

    def decode(self, ids):
        return super().decode(ids) + 80 * ALPHABET


class LeavesOutTheEnd(CharacterPairTokenizer):
    def encode_batch(self, texts, bos=False, eos=False):
        return super().encode_batch(texts, bos)


class TokensOutOfRange(CharacterPairTokenizer):
    def encode_batch(self, texts, bos=False, eos=False):
        return [[ids[0], self.vocab_size + 5, *ids[1:]] for ids in super().encode_batch(texts, bos, eos)]


class DependsOnTheBatch(CharacterPairTokenizer):
    """Leaves out the first letter of each text but the first of a batch."""

    def encode_batch(self, texts, bos=False, eos=False):
        return super().encode_batch([text[number > 0 :] for number, text in enumerate(texts)], bos, eos)


class KnowsTexts(CharacterPairTokenizer):
    """Has a token for each validation story."""

    def __init__(self, stories):
        super().__init__(TOKENIZER.name, TOKENIZER.content)
        self.first, self.texts = self.vocab_size, stories
        self.vocab_size += len(stories)

    def encode_batch(self, texts, bos=False, eos=False):
        rows = super().encode_batch(texts, bos, eos)
        return [[self.bos_id] * bos + [self.first + self.texts.index(text)] + [self.eos_id] * eos if text in self.texts else row
                for text, row in zip(texts, rows, strict=True)]  # fmt: skip

    def decode(self, ids):
        known = [self.texts[index - self.first] for index in ids if index >= self.first]
        return known[0] if known else super().decode(ids)

    def __reduce__(self):
        return KnowsTexts, (self.texts,)


def gpt(blocks=None, **changes) -> GPT:
    """A GPT whose weights are large enough for every prediction to depend on all that it reads."""
    model = GPT(replace(MODEL, **changes), TOKENIZER.vocab_size, BLOCKS | (blocks or {}))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    return model


MODELS = {made.__name__: made for made in (Bigram, DrawsInEval, LooseBound, NextToken, SeesTheLength)}
