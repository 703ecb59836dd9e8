"""Encoding speed of the tokenizers in tokenizers/, on one core, in batches.

    python benchmarks/tokenizer_speed.py --data ../stories.txt

MB/s of text: the median of the runs, and their quartiles.
"""

import os
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from script import Row, quartiles, report, run_script
from tqdm import tqdm

from data.dataset import read_stories
from tokenizer import Tokenizer, available_tokenizers, load_tokenizer

BATCH = 1000


@dataclass(frozen=True)
class Arguments:
    data: str = "storyworld"  # source of the stories: a file, a folder, or any other source that training accepts
    num_stories: int = 5000  # maximum number of training stories to encode
    num_runs: int = 5  # per tokenizer
    tokenizers: tuple[str, ...] = ()  # names; by default all in tokenizers/
    save: str | None = None  # write the raw results to benchmarks/results/SAVE.json


def main(arguments: Arguments):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    stories = list(islice(read_stories(arguments.data, split="train"), arguments.num_stories))
    megabytes = sum(len(story.encode("utf-8")) for story in stories) / 1e6
    results = {}
    for name in tqdm(arguments.tokenizers or available_tokenizers(), leave=False, disable=None):
        tokenizer = load_tokenizer(name)
        speeds = [megabytes / seconds_to_encode(tokenizer, stories) for _ in range(arguments.num_runs)]
        results[name] = {"megabytes_per_second": speeds, "bytes_per_token": tokenizer.bytes_per_token(stories)}
    text = f"{len(stories):,} stories of {arguments.data}, {megabytes:.1f} MB"
    report(tables, {"text": text, "results": results}, arguments.save)


def seconds_to_encode(tokenizer: Tokenizer, stories: list[str]) -> float:
    start = time.perf_counter()
    for i in range(0, len(stories), BATCH):
        tokenizer.encode_batch(stories[i : i + BATCH], bos=True, eos=True)
    return time.perf_counter() - start


def tables(raw: dict) -> dict[str, list[Row]]:
    rows = []
    for name, of in raw["results"].items():
        speed = quartiles("MB/s", of["megabytes_per_second"], ".1f")
        rows.append({"tokenizer": name} | speed | {"bytes per token": f"{of['bytes_per_token']:.3f}"})
    return {f"{raw['text']}, in batches of {BATCH}": rows}


if __name__ == "__main__":
    run_script(main, Arguments, __doc__)
