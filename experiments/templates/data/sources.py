"""Say here what the model is trained on, and name the paper.  B batch, T time."""

import torch

from data.plugin import DataPlugin


class Template(DataPlugin):
    """Rows with some random tokens among the inputs: put your idea in its place.

    Validation stories stay as they are. data/plugin.py says what a row is, and how to bring other stories, or a memory.
    """

    def __init__(self, data, share: float = 0.05):
        super().__init__(data)
        self.share = share

    def batch(self, start: int, batch_size: int, seed: int):
        batch = self.data.batch(start, batch_size, seed)  # inputs, targets, story_ids: each (B, T)
        random = torch.Generator().manual_seed(1_000_003 * seed + start)  # the same rows for the same arguments
        noise = torch.randint(self.data.tokenizer.vocab_size, batch.inputs.shape, generator=random)
        is_noise = torch.rand(batch.inputs.shape, generator=random) < self.share
        return batch._replace(inputs=torch.where(is_noise, noise, batch.inputs))


DATA = {"Template": Template}
