"""Check of a tokenizer: bits per byte count only bytes of the raw text that its tokens alone give back."""

import copy

from data.dataset import MAX_LOST
from metrics.audit.subject import Subject
from metrics.scores import check_tokens, count_bytes

MAX_ADDED = 0.1  # share of a text that a tokenizer may add to it


def check_text(subject: Subject) -> tuple[str, str | None]:
    """Tokens of new texts are decoded by a tokenizer that has not seen these texts."""
    tokenizer, texts = subject.tokenizer, new_texts(subject)
    reader = copy.deepcopy(tokenizer)  # before anything of the new texts is encoded
    together = tokenizer.encode_batch(texts, bos=True, eos=True)
    check_tokens(together, tokenizer)
    one_by_one = [copy.deepcopy(reader).encode(text, bos=True, eos=True) for text in reversed(texts)][::-1]
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    kept = sum(count_bytes(reader, texts, together))
    how = f"{len(texts)} new texts of {size:,} bytes, {1 - kept / size:.2%} of which are lost and not counted"
    if one_by_one != together:
        return how, f"{tokenizer.name} encodes a text otherwise alone than with others: ids must depend on the text alone"
    if kept != sum(count_bytes(tokenizer, texts, together)):
        return how, f"{tokenizer.name} decodes texts that it has encoded before otherwise than others: it must read the ids alone"
    claimed = sum(map(tokenizer.kept_bytes, texts))
    if claimed > kept:
        return how, f"{tokenizer.name} claims to keep {claimed:,} bytes, but its ids give back {kept:,}: leave kept_bytes alone"
    added = sum(map(added_bytes, texts, map(reader.decode, together)))
    if added > MAX_ADDED * size:
        return how, f"{tokenizer.name} decodes {added:,} bytes that are not in the texts: a story must give back itself alone"
    if kept < (1 - MAX_LOST) * size:
        return how, f"bits per byte do not compare where {tokenizer.name} loses more than {MAX_LOST:.0%} of the text"
    return how, None


def new_texts(subject: Subject) -> list[str]:
    """The second half of each story with the first half of another: texts that no one has seen."""
    halves = [(story[: len(story) // 2], story[len(story) // 2 :]) for story in subject.sample]
    return [end + start for (_, end), (start, _) in zip(halves, halves[1:] + halves[:1], strict=True)]


def added_bytes(text: str, decoded: str) -> int:
    """Bytes that a decoded text has more than the text."""
    return max(0, len(decoded.encode("utf-8", "replace")) - len(text.encode("utf-8", "replace")))
