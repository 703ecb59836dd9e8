"""Tokenizers with one mistake each; the docstring is what the message must say, or the line on what is lost."""

import numpy as np
from own_data import Bytes

from tokenizer import Tokenizer


class HasNoPad(Tokenizer):
    """its pad_id is None: set it to a whole number"""

    vocab_size, bos_id, eos_id = 258, 256, 257


class PadsBeyondItsVocabulary(Bytes):
    """pad_id=300: ids go from 0 to vocab_size - 1 = 258"""

    pad_id = 300


class PadsWithEos(Bytes):
    """pad_id=257 is also bos or eos, which the loss would ignore: give pad an id of its own"""

    pad_id = 257


class CountsItself(Bytes):
    """it has a method kept_bytes(), by which it would judge itself: leave it out"""

    def kept_bytes(self, text):
        return len(text.encode())


class GivesArrays(Bytes):
    """has the id 79, of type uint8: ids are int, from 0 to vocab_size - 1 = 258"""

    def ids_of(self, text):
        return np.frombuffer(text.encode(), np.uint8)


class GivesCharacters(Bytes):
    """has the id 8217, of type int: ids are int, from 0 to vocab_size - 1 = 258"""

    def ids_of(self, text):
        return list(map(ord, text))

    def text_of(self, ids):
        return "".join(map(chr, ids))


class AddsBosItself(Bytes):
    """has the ids [256] of bos, eos or pad, which no text may have"""

    def ids_of(self, text):
        return [256, *text.encode()]


class GivesBytes(Bytes):
    """are decoded to bytes: return a str"""

    def text_of(self, ids):
        return bytes(ids)


class CannotDecode(Bytes):
    """NotImplementedError: later"""

    def text_of(self, ids):
        raise NotImplementedError("later")


class RemembersTheText(Bytes):
    """are decoded to another text at another time: make ids of the text alone, and text of the ids alone"""

    last = ""

    def ids_of(self, text):
        RemembersTheText.last = text
        return [0] * len(text)

    def text_of(self, ids):
        return RemembersTheText.last if ids else ""


class NumbersAsItGoes(Bytes):
    """another tokenizer of the class cannot read the ids of the text 'Once upon a time, th'… (list index out of range)"""

    def __init__(self):
        super().__init__()
        self.characters = []

    def ids_of(self, text):
        self.characters += [character for character in dict.fromkeys(text) if character not in self.characters]
        return [self.characters.index(character) for character in text]

    def text_of(self, ids):
        return "".join(self.characters[index] for index in ids)


class Sorts(Bytes):
    """it gives back 'Once upon a time, th'… in another order"""

    def ids_of(self, text):
        return sorted(text.encode())


class HasTooFewPieces(Bytes):
    """pieces for 117 ids: return one for each id"""

    def tokens(self, text):
        return text.split()


class LosesCapitals(Bytes):
    """loses 3.4% of plain English, such as 'OLT': it is not counted as predicted, and beyond 1% the run is not compared"""

    def ids_of(self, text):
        return list(text.lower().encode())


class NoTokenizer:
    """it is no Tokenizer: derive it from tokenizer.Tokenizer"""


WRONG = [value for value in list(vars().values()) if isinstance(value, type) and value.__module__ == __name__]
