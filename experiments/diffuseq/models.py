"""DiffuSeq (Gong et al. 2022, arXiv 2210.08933): Gaussian diffusion of token embeddings, with rounding to tokens.

Noise is added to the embeddings of the open tokens alone, while those of a prompt stay clean (partial noising). The model guesses
the clean embeddings from the noisy ones, and the last, hardly noisy ones are rounded to tokens.

Unlike in the paper, the guess is a mean of embeddings, weighted by the probabilities of their tokens: the likelihood of the noisy
embedding, which is known, times what the network makes of the context (Gulrajani and Hashimoto 2023, arXiv 2305.18619: the
categorical reparameterization and the output prior).

    z_t     noisy embeddings after t of `steps` steps: sqrt(1 - v_t) EMB(w) + sqrt(v_t) noise
    v_t     the variance of the noise, from v_0, with which rounding starts, to nearly 1
    SNR     (1 - v_t) / v_t

B canvases, T places, N open tokens, D model dim, E width of the embeddings, V vocabulary.
"""

import math
from collections import defaultdict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from config import ModelConfig
from inference import next_token_probabilities
from model import BLOCKS, linear, story_starts
from modules.canvas import CanvasModel

FIRST_VARIANCE, LAST_VARIANCE = 0.1, 0.9999  # of the noise
NUM_WAVES = 16  # cosines that say how much noise there is


class DiffuSeq(CanvasModel):
    """Diffusion of embeddings of `width` channels in `steps` steps; it writes in `turns` of them.

    clamp=True moves each guess to the nearest embedding while it writes (Li et al. 2022, arXiv 2205.14217, section 4.2).
    `samples` and `prompts` as in CanvasModel.
    """

    def __init__(
        self, config: ModelConfig, vocab_size: int, blocks: dict[str, type] = BLOCKS, width: int = 32, steps: int = 1000,
        turns: int = 64, clamp: bool = False, samples: int = 1, prompts: float = 0.5,
    ):  # fmt: skip
        super().__init__(config, vocab_size, blocks, samples, prompts)
        if config.positions != "rope":
            raise ValueError(f"positions={config.positions!r}: DiffuSeq has RoPE alone, so give positions='rope'")
        if not 1 <= turns <= steps:
            raise ValueError(f"turns={turns}: give a whole number from 1 to steps={steps}")
        self.width, self.steps, self.turns, self.clamp = width, steps, turns, clamp
        self.embedding = nn.Embedding(vocab_size, width)  # of variance 1
        self.head = linear(config.dim, width)
        self.w_in, self.w_time = linear(width, config.dim), linear(NUM_WAVES, config.dim)
        # the square root schedule (Diffusion-LM, appendix A): v_t^2 is linear in t
        variances = torch.linspace(FIRST_VARIANCE**2, LAST_VARIANCE**2, steps + 1).sqrt()
        self.register_buffer("variances", variances, persistent=False)  # (steps + 1)
        angles = torch.outer(torch.arange(steps + 1) / steps, math.pi * torch.arange(NUM_WAVES))
        self.register_buffer("time_waves", angles.cos(), persistent=False)  # (steps + 1, NUM_WAVES)

    def noise(self, T, generator=None):
        """Noise for z_t, and for z_0.  (T, 2, E)"""
        return torch.randn(T, 2, self.width, generator=generator)

    def noisy(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """z_t of clean embeddings.  x (B, T, E), t (B), noise (B, T, E)"""
        variance = self.variances[t][:, None, None]
        return (1 - variance).sqrt() * x + variance.sqrt() * noise

    def denoise(self, z: Tensor, t: Tensor, story_ids: Tensor) -> tuple[Tensor, dict]:
        """The guess of the clean embeddings (B, T, E), and the losses of blocks.  z (B, T, E), t (B), story_ids (B, T)"""
        T = z.shape[1]
        x = self.w_in(z) + self.w_time(self.time_waves[t])[:, None]  # (B, T, D)
        x = F.dropout(x, self.dropout, self.training)
        shared = {"losses": defaultdict(float)}
        rope = self.rope_cos[None, :T], self.rope_sin[None, :T]
        for layer in self.layers:
            x = layer(x, rope=rope, story_start=story_starts(story_ids), window=None, shared=shared)
        prior = self.head(self.norm(x)) @ self.embedding.weight.T  # (B, T, V)
        probabilities = (prior + self.log_likelihoods(z, self.variances[t][:, None, None])).softmax(dim=-1)
        return probabilities @ self.embedding.weight, shared["losses"]

    def log_likelihoods(self, z: Tensor, variance: Tensor) -> Tensor:
        """log q(z_t | token) of every token, up to a constant.  z (..., E), variance broadcastable to it -> (..., V)"""
        table = self.embedding.weight  # (V, E)
        with torch.autocast(z.device.type, enabled=False):  # bfloat16 has too few digits for it
            signal = (1 - variance).sqrt()
            return (signal * z.float() @ table.T - signal.square() * table.square().sum(dim=1) / 2) / variance

    def round(self, z: Tensor) -> Tensor:
        """Logits of the token of each z_0.  (..., E) -> (..., V)"""
        return self.log_likelihoods(z, self.variances[0])

    def bound(self, canvas, levels, noise):
        """The bound of Diffusion-LM (arXiv 2205.14217, equation 2) in nats (B), and the losses that are minimised instead.

        -log p(w) <= E[KL(q(z_T | w) || N(0, 1)) + sum over t of KL(q(z_t-1 | z_t, w) || p(z_t-1 | z_t)) - log p(w | z_0)],
        where p(z_t-1 | z_t) is q(z_t-1 | z_t, guess), so that a KL is half of the error times the fall of the SNR (Kingma et al.
        2021, arXiv 2107.00630, equation 13). Their terms log q(z_0 | w) and -log p(z_0 | z_1) are in the KL of t = 1. One t
        estimates the sum. The losses are those of DiffuSeq, section 3.2: the error at any t alike, the rounding loss, and the
        squared mean of z_T.
        """
        x, is_open = self.embedding(canvas.tokens), canvas.is_open
        t = 1 + (levels * self.steps).long()  # (B)
        z = self.noisy(x, t, noise[:, :, 0]).where(is_open[..., None], x)
        guess, block_losses = self.denoise(z, t, canvas.story_ids)
        error = ((x - guess).square().sum(dim=-1) * is_open).sum(dim=1)  # (B)
        norm = (x.square().sum(dim=-1) * is_open).sum(dim=1)  # (B)
        z_0 = self.noisy(x, torch.zeros_like(t), noise[:, :, 1])
        rounding_losses = F.cross_entropy(self.round(z_0[is_open]), canvas.tokens[is_open], reduction="none")  # (N)
        rounding = torch.zeros_like(error).index_add(0, is_open.nonzero()[:, 0], rounding_losses)  # (B)

        snr, v = (1 - self.variances) / self.variances, LAST_VARIANCE
        kls = self.steps * (snr[t - 1] - snr[t]) / 2 * error  # (B)
        last_kl = ((1 - v) * norm + self.width * is_open.sum(dim=1) * (v - 1 - math.log(v))) / 2  # (B)
        losses = {"error": error / self.width, "rounding": rounding, "prior": (1 - v) * norm / self.width}
        losses = {name: loss.sum() / canvas.num_targets for name, loss in losses.items()}
        return (kls + last_kl + rounding).detach(), losses | block_losses

    def guess(self, tokens):
        x, zeros = self.embedding(tokens), torch.zeros_like(tokens)
        return self.round(self.denoise(x, zeros[:, 0], zeros)[0])

    def fill(self, canvas, sampling, generators):
        """Draw z_T, go back to z_0 in `turns` steps, and round. The temperature scales the noise of every step, too."""
        x, is_open = self.embedding(canvas.tokens), canvas.is_open[..., None]
        widths = (canvas.story_ids == 0).sum(dim=1).tolist()

        def draw() -> Tensor:  # (B, T, E)
            noise = [torch.randn(T, self.width, generator=draws) for T, draws in zip(widths, generators, strict=True)]
            return pad_sequence(noise, batch_first=True).to(x.device)

        z = draw()
        for t, s in pairwise(torch.linspace(self.steps, 0, self.turns + 1).round().long().tolist()):
            guess, _ = self.denoise(z.where(is_open, x), torch.full((len(x),), t, device=x.device), canvas.story_ids)
            if self.clamp:
                guess = self.embedding(torch.cdist(guess, self.embedding.weight).argmin(dim=-1))
            v_t, v_s = self.variances[t].item(), self.variances[s].item()
            kept = (1 - v_t) / (1 - v_s)  # share of the variance of z_s that is left in z_t
            mean = math.sqrt(kept) * v_s / v_t * z + math.sqrt(1 - v_s) * (1 - kept) / v_t * guess
            z = mean + sampling.temperature * math.sqrt(v_s * (1 - kept) / v_t) * draw()
        tokens = canvas.tokens.clone()
        for row, generator in enumerate(generators):
            places = canvas.is_open[row]
            if places.any():
                probabilities = next_token_probabilities(self.round(z[row, places]).float().cpu(), sampling)  # (N, V)
                tokens[row, places] = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(tokens.device)
        return tokens


MODELS = {"DiffuSeq": DiffuSeq}
