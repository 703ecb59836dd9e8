"""Load a tokenizer class of your own, "my_module:Bytes" or "my_module:Bytes(size=1)", and check it: each mistake is one line."""

import hashlib
import importlib
import inspect
from collections import Counter
from difflib import SequenceMatcher
from functools import cache
from typing import Any

from config import did_you_mean, init_parameters, name_and_options
from data.cache import say

OURS = ("normalise", "kept_bytes", "lost_share")  # methods that say what is lost, which is not for the class to say
PLAIN = 'Once upon a time, there was a girl named Lily. "Let\'s play!" she said to her 12 cats; then they ran (fast).\n\nThe end?'
# what the fingerprint is made of, besides the code: to change them is to change the fingerprints of all such tokenizers
SAMPLES = (PLAIN, "", "ran\tZoë’s café – 12 €, 你好 😀 <bos> <eos> <pad> \ud83d", " ".join(PLAIN.split()[::-1]) * 3)


def load_class(name: str, base: type) -> Any:
    """Build the tokenizer that is called module:Class or module:Class(option=value), a subclass of base.

    Raises ImportError if it cannot be imported, ValueError for any other mistake in it.
    """
    module, _, call = name.partition(":")
    class_name, options = name_and_options(call)
    try:
        classes = vars(importlib.import_module(module))
    except Exception as error:  # a reader's own code: anything may be wrong in it
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ImportError(f"the tokenizer {name!r} cannot be imported: {reason}. Put its file beside train.py") from error
    if class_name not in classes:
        raise ValueError(f"the tokenizer {name!r}: {module} has no {class_name}.{did_you_mean(class_name, classes)}")
    made = classes[class_name]
    try:
        require(isinstance(made, type) and issubclass(made, base), "it is no Tokenizer: derive it from tokenizer.Tokenizer")
        parameters = init_parameters(made)
        for option in options:
            hint = f"{did_you_mean(option, parameters)} There are: {', '.join(parameters) or 'none'}"
            require(option in parameters, f"it has no option {option!r}.{hint}")
        tokenizer, twin = made(**options), made(**options)
        tokenizer.name = twin.name = name
        check_numbers(tokenizer, base)
        encoded = [checked_ids(tokenizer, twin, text) for text in SAMPLES]
        check_loss(tokenizer)
    except Exception as error:
        kind = "" if isinstance(error, Mistake) else f"{type(error).__name__}: "
        raise ValueError(f"the tokenizer {name!r}: {kind}{' '.join(str(error).split())}") from error
    if not isinstance(getattr(tokenizer, "fingerprint", None), str):
        code = [inspect.getsource(each) for each in made.__mro__[: made.__mro__.index(base)]]
        content = repr((code, options, encoded, tokenizer.vocab_size, special_ids(tokenizer)))
        tokenizer.fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
    return tokenizer


class Mistake(ValueError):
    """What a tokenizer does wrong, and the cure."""


def require(condition: Any, problem: str):
    if not condition:
        raise Mistake(problem)


def special_ids(tokenizer) -> tuple[int, int, int]:
    return tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id


def check_numbers(tokenizer, base: type):
    """The numbers of a tokenizer are there and go together, and it leaves it to us to count what it loses."""
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id"):
        value = getattr(tokenizer, name, None)
        require(type(value) is int, f"its {name} is {value!r}: set it to a whole number")
        most = tokenizer.vocab_size - 1
        require(name == "vocab_size" or 0 <= value <= most, f"{name}={value}: ids go from 0 to vocab_size - 1 = {most}")
    is_own = tokenizer.pad_id not in special_ids(tokenizer)[:2]
    require(is_own, f"pad_id={tokenizer.pad_id} is also bos or eos, which the loss would ignore: give pad an id of its own")
    for method in OURS:
        is_ours = getattr(type(tokenizer), method).__module__ == base.__module__
        require(is_ours, f"it has a method {method}(), by which it would judge itself: leave it out")


def checked_ids(tokenizer, twin, text: str) -> list[int]:
    """The ids of a text, if they are right, and if another tokenizer of the class makes and reads the same ones."""
    ids, most = tokenizer.encode(text), tokenizer.vocab_size - 1
    shown = f"the text {text[:20]!r}…"
    for index in ids:
        is_right = type(index) is int and 0 <= index <= most
        kind = type(index).__name__
        require(is_right, f"{shown} has the id {index}, of type {kind}: ids are int, from 0 to vocab_size - 1 = {most}")
    special = {*ids} & {*special_ids(tokenizer)}
    require(not special, f"{shown} has the ids {sorted(special)} of bos, eos or pad, which no text may have")
    whole = [tokenizer.bos_id, *ids, tokenizer.eos_id]
    is_equal = tokenizer.encode_batch([text, "a"], bos=True, eos=True)[0] == whole
    require(is_equal, f"encode_batch gives {shown} other ids than encode")
    decoded = tokenizer.decode(whole)
    require(isinstance(decoded, str), f"the ids of {shown} are decoded to {type(decoded).__name__}: return a str")
    cure = "make ids of the text alone, and text of the ids alone"
    require(tokenizer.normalise(text) == decoded, f"the ids of {shown} are decoded to another text at another time: {cure}")
    try:
        is_equal = twin.decode(ids) == decoded and twin.encode(text) == ids
    except Exception as error:  # a reader's own code
        raise Mistake(f"another tokenizer of the class cannot read the ids of {shown} ({error}): {cure}") from error
    require(is_equal, f"another tokenizer of the class has other ids for {shown}: {cure}")
    pieces = len(tokenizer.tokens(text))
    require(pieces == len(ids), f"tokens() of {shown} has {pieces} pieces for {len(ids)} ids: return one for each id")
    return ids


def check_loss(tokenizer):
    """Say what is lost of plain English. Raises Mistake if it comes back in another order, so that the loss cannot be counted."""
    decoded = tokenizer.decode(tokenizer.encode(PLAIN))
    in_order = sum(block.size for block in SequenceMatcher(None, PLAIN, decoded, autojunk=False).get_matching_blocks())
    kept = (Counter(PLAIN) & Counter(decoded)).total()
    require(in_order > 0.9 * kept, f"it gives back {PLAIN[:20]!r}… in another order, as {decoded[:20]!r}…")
    lost = "".join(dict.fromkeys((Counter(PLAIN) - Counter(decoded)).elements()))
    if lost:
        say_once(f"{tokenizer.name} loses {tokenizer.lost_share([PLAIN]):.1%} of plain English, such as {lost[:8]!r}: it is not "
                 "counted as predicted, and beyond 1% the run is not compared")  # fmt: skip


@cache
def say_once(line: str):
    say(line)
