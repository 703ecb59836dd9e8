"""Encoding speed of the tokenizers in tokenizers/, on one core, in batches.

    python benchmarks/tokenizer_speed.py --data ../stories.txt

MB/s of text: the median of the runs ± half the range from the slowest to the fastest.
"""

import os
import sys
import time
from itertools import islice
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.dataset import read_stories
from tokenizer import available_tokenizers, load_tokenizer

BATCH = 1000


def main(data: str = "storyworld", num_stories: int = 5000, num_runs: int = 5, tokenizers: tuple[str, ...] = ()) -> None:
    """Print a table of MB/s and bytes per token.

    Args:
        data: Source of the stories: a file, a folder, or any other source that training accepts.
        num_stories: Maximum number of training stories to encode.
        num_runs: Number of runs per tokenizer.
        tokenizers: Names of tokenizers; by default all in tokenizers/.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    stories = list(islice(read_stories(data, split="train"), num_stories))
    megabytes = sum(len(story.encode("utf-8")) for story in stories) / 1e6
    print(f"{data}: {len(stories):,} stories, {megabytes:.1f} MB, batches of {BATCH}, {num_runs} runs\n")
    print("| tokenizer | MB/s | bytes per token |\n|---|---|---|")
    for name in tokenizers or available_tokenizers():
        tokenizer = load_tokenizer(name)
        speeds = []
        for _ in range(num_runs):
            start = time.perf_counter()
            for i in range(0, len(stories), BATCH):
                tokenizer.encode_batch(stories[i : i + BATCH], bos=True, eos=True)
            speeds.append(megabytes / (time.perf_counter() - start))
        spread = (max(speeds) - min(speeds)) / 2
        print(f"| {name} | {median(speeds):.1f} ± {spread:.1f} | {tokenizer.bytes_per_token(stories):.3f} |")


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
