"""Plugins of DATA with one mistake each; the docstring is what the message must say, a warning if it begins with that word."""

import numpy as np
import torch

from config import IGNORE
from data.dataset import Batch
from data.plugin import DataPlugin


class Wrong(DataPlugin):
    def batch(self, start, batch_size, seed):
        return self.change(self.data.batch(start, batch_size, seed))


class ReturnsATuple(Wrong):
    """batch(0, 32, seed=0) returns tuple: return a Batch(inputs, targets)"""

    def change(self, batch):
        return batch.inputs, batch.targets


class HasFloatTargets(Wrong):
    """the targets of batch(0, 32, seed=0) are torch.float32: make them a tensor of torch.long"""

    def change(self, batch):
        return batch._replace(targets=batch.targets.float())


class HasLists(Wrong):
    """the inputs of batch(0, 32, seed=0) are list: make them a tensor of torch.long"""

    def change(self, batch):
        return batch._replace(inputs=batch.inputs.tolist())


class HasFewerTargets(Wrong):
    """the targets of batch(0, 32, seed=0) are of shape (32, 47): it must be (32, T), with one T for all"""

    def change(self, batch):
        return batch._replace(targets=batch.targets[:, 1:])


class HasFewerRows(Wrong):
    """the inputs of batch(0, 32, seed=0) are of shape (31, 48): it must be (32, T)"""

    def change(self, batch):
        return Batch(batch.inputs[1:], batch.targets[1:])


class IsTooLong(Wrong):
    """batch(0, 32, seed=0) has 96 tokens a row: give 1 to max_seq_len=48"""

    def change(self, batch):
        return Batch(batch.inputs.repeat(1, 2), batch.targets.repeat(1, 2))


class HasNoTargets(Wrong):
    """batch(0, 32, seed=0) has no targets: all are IGNORE"""

    def change(self, batch):
        return batch._replace(targets=torch.full_like(batch.targets, IGNORE))


class IgnoresByMinusOne(Wrong):
    """the targets of batch(0, 32, seed=0), besides IGNORE = -100, hold [-1], but tokens go from 0 to 130"""

    def change(self, batch):
        return batch._replace(targets=batch.targets.masked_fill(batch.targets == IGNORE, -1))


class UsesAnUnknownToken(Wrong):
    """the inputs of batch(0, 32, seed=0) hold [131], but tokens go from 0 to 130"""

    def change(self, batch):
        return batch._replace(inputs=batch.inputs.clone().fill_(131))


class DrawsFromTheGlobalState(Wrong):
    """batch(0, 32, seed=0) uses torch's global random state, as dropout does"""

    def change(self, batch):
        return batch._replace(targets=batch.targets.masked_fill(torch.rand(batch.targets.shape) < 0.1, IGNORE))


class DrawsFromAStateOfItsOwn(Wrong):
    """batch(0, 32, seed=0) gives other rows when it is called again"""

    random = np.random.default_rng(0)

    def change(self, batch):
        kept = torch.from_numpy(self.random.random(batch.targets.shape))
        return batch._replace(targets=batch.targets.masked_fill(kept < 0.1, IGNORE))


class Fails(Wrong):
    """batch(0, 32, seed=0) fails (wrong_data.py, line"""

    def change(self, batch):
        return {}["rows"]


class BringsAMemoryAlone(Wrong):
    """batch(0, 32, seed=0) has a memory, but the plugin has no method memory(prefixes)"""

    def change(self, batch):
        return batch._replace(memory=batch.inputs)


class ShowsTheTargets(Wrong):
    """warning: 100% of the targets equal the input at their position, so the model copies what it reads"""

    def change(self, batch):
        return batch._replace(inputs=batch.targets.clamp(min=0))


class ScoresPadding(Wrong):
    """warning: of the targets are padding. Set them to IGNORE"""

    def change(self, batch):
        return batch._replace(targets=batch.targets.masked_fill(batch.targets == IGNORE, self.tokenizer.pad_id))


class RepeatsItself(DataPlugin):
    """warning: batch(0, 32, seed=0) and batch(32, 32, seed=0) are the same rows. Let them depend on `start`"""

    def batch(self, start, batch_size, seed):
        return self.data.batch(0, batch_size, seed)


class ForgetsSuper(DataPlugin):
    """call super().__init__(data), and leave `validation` as it is"""

    def __init__(self, data):
        pass


class ChoosesItsValidation(DataPlugin):
    """call super().__init__(data), and leave `validation` as it is, as scores on other stories would not compare"""

    def __init__(self, data):
        super().__init__(data)
        self.validation = data.validation[:3]


class TakesNoData(DataPlugin):
    """TakesNoData is a DataPlugin, so its __init__ takes the `data` whose rows it changes"""

    def __init__(self):
        pass


class FailsAtOnce(DataPlugin):
    """data='FailsAtOnce' fails (wrong_data.py, line"""

    def __init__(self, data, rate: float = 2.0):
        raise ValueError("rate=2: give a share")


class Remembers(DataPlugin):
    """Base of those with a wrong memory."""

    def memory(self, prefixes):
        return self.of(torch.tensor(prefixes))


class RemembersALabel(Remembers):
    """memory(prefixes) of two prefixes is torch.int64 of shape (2,): return (2, M) tokens of torch.long or (2, M, D)"""

    def of(self, prefixes):
        return prefixes[:, 0]


class RemembersInFloat64(Remembers):
    """memory(prefixes) of two prefixes is torch.float64 of shape (2, 16, 1): return (2, M) tokens of torch.long or (2, M, D)"""

    def of(self, prefixes):
        return prefixes[..., None].double()


class RemembersUnknownTokens(Remembers):
    """the rows of memory(prefixes) hold [1000], but tokens go from 0 to 130"""

    def of(self, prefixes):
        return torch.full_like(prefixes, 1000)


class RemembersTheBatch(Remembers):
    """memory(prefixes) of a story changes with those beside it: let it depend on its prefix, with one M"""

    def of(self, prefixes):
        return prefixes.float().mean(dim=0).expand(len(prefixes), 1, -1)


class RemembersTheLastCall(Remembers):
    """memory(prefixes) gives something else when it is called again: seed what it draws"""

    count = 0

    def of(self, prefixes):
        self.count += 1
        return torch.full_like(prefixes, self.count)


class RemembersAParameter(Remembers):
    """memory(prefixes) needs a gradient, but only the model is trained: return memory.detach()"""

    def of(self, prefixes):
        return torch.nn.Parameter(prefixes[..., None].float())


class RemembersTheStory(Remembers):
    """of 32 validation stories: make it from training stories, as those of data.take"""

    def of(self, prefixes):
        stories, memories = self.tokenizer.encode_batch(self.validation, bos=True), []
        for prefix in prefixes.tolist():
            similar = [token for tokens in stories if tokens[:16] == prefix for token in tokens]
            memories.append((similar + [0] * 2000)[:2000])
        return torch.tensor(memories)


class RemembersTooMuch(Remembers):
    """prefix=48: give a number of tokens, from 1 to below max_seq_len=48"""

    prefix = 48


class TellsNothing:
    """TellsNothing is no DATA: derive it from data.plugin.DataPlugin if it takes `data`, or give it a method stories()"""


class TellsOnce:
    """stories() gives other stories when it is called again. Make a new iterator at every call, and seed its random numbers"""

    def __init__(self):
        self.iterator = (f"story {number}" for number in range(500))

    def stories(self):
        return self.iterator


class TellsNumbers:
    """TellsNumbers: one of the stories is 0. It has to be a string"""

    def stories(self):
        return range(500)


class TellsUntilItFails:
    """data='TellsUntilItFails': stories() fails (wrong_data.py, line"""

    def stories(self):
        yield "Once"
        raise RuntimeError("no more")


DATA = {
    name: value for name, value in list(vars().items())
    if isinstance(value, type) and value.__module__ == __name__ and value not in (Wrong, Remembers)
}  # fmt: skip
