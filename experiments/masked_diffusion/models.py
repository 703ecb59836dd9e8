"""Masked diffusion (MDLM: Sahoo et al. 2024, arXiv 2406.07524; LLaDA: Nie et al. 2025, arXiv 2502.09992).

The forward process replaces more and more tokens by a mask; the model learns to fill in all masks at once.

B canvases, T places, N masked tokens, D model dim, V vocabulary.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F

from config import ModelConfig
from inference import next_token_probabilities
from model import BLOCKS
from modules.canvas import CanvasModel


class MDLM(CanvasModel):
    """Masked diffusion. It fills in a canvas in `turns` passes, about equally many tokens in each.

    order="confidence" keeps the most probable of the drawn tokens of each pass (LLaDA, section 2.4), order="ancestral" random
    ones, as the reverse process does. `samples` as in CanvasModel.
    """

    def __init__(
        self, config: ModelConfig, vocab_size: int, blocks: dict[str, type] = BLOCKS, turns: int = 64,
        order: Literal["confidence", "ancestral"] = "ancestral", samples: int = 1,
    ):  # fmt: skip
        super().__init__(config, vocab_size + 1, blocks, samples)  # one more token: the mask
        if turns < 1:
            raise ValueError(f"turns={turns}: give a whole number of at least 1")
        self.mask_id, self.turns, self.order = vocab_size, turns, order

    def noise(self, T, generator=None):
        return torch.rand(T, generator=generator)

    def bound(self, canvas, levels, noise):
        """The bound of each canvas in nats (B), and the losses of blocks.

        Of n open tokens, l are masked, l = 1 to n equally likely, and the summed loss of these is weighted by n / l (LLaDA,
        equation 6). Its mean is that of MDLM's equation 10, with noise levels t from 0 to 1 and weights 1 / t, at less variance.
        """
        tokens, is_open, _ = canvas
        num_open = is_open.sum(dim=1)  # (B)
        num_masked = (1 + (levels * num_open).long()).minimum(num_open)  # (B)
        ranks = noise.masked_fill(~is_open, math.inf).argsort(dim=1).argsort(dim=1)  # (B, T)
        is_masked = ranks < num_masked[:, None]
        x, shared = self.hidden_states(tokens.masked_fill(is_masked, self.mask_id), story_ids=canvas.story_ids)
        losses = F.cross_entropy(self.logits(x[is_masked]), tokens[is_masked], reduction="none")  # (N)
        row = is_masked.nonzero()[:, 0]  # (N)
        weights = num_open / num_masked.clamp(min=1)  # (B)
        return torch.zeros_like(levels).index_add(0, row, losses * weights[row]), shared["losses"]

    def logits(self, x):
        """Logits of the tokens without the mask.  (..., D) -> (..., V)"""
        return self.score(x, None, {})[0][..., : self.mask_id]

    def guess(self, tokens):
        return self.logits(self.hidden_states(tokens)[0])

    def fill(self, canvas, sampling, generators):
        is_masked = canvas.is_open.clone().cpu()
        tokens = canvas.tokens.masked_fill(canvas.is_open, self.mask_id)
        for turns_left in range(self.turns, 0, -1):
            if not is_masked.any():
                break
            x, _ = self.hidden_states(tokens, story_ids=canvas.story_ids)
            for row, generator in enumerate(generators):
                places = is_masked[row].nonzero()[:, 0]  # (N)
                if not len(places):
                    continue
                logits = self.logits(x[row, places]).float().cpu()  # (N, V)
                drawn = torch.multinomial(next_token_probabilities(logits, sampling), 1, generator=generator)  # (N, 1)
                if self.order == "confidence":
                    priority = logits.softmax(dim=-1).gather(1, drawn)[:, 0]  # (N)
                else:
                    priority = torch.rand(len(places), generator=generator)  # (N)
                chosen = priority.topk(math.ceil(len(places) / turns_left)).indices
                tokens[row, places[chosen]] = drawn[chosen, 0].to(tokens.device)
                is_masked[row, places[chosen]] = False
        return tokens


MODELS = {"MDLM": MDLM}
