"""Let a large language model judge the stories of small ones.

    python -m evaluation judge A B --model gpt-4o-mini --price_per_million 0.15 0.60       # with OPENAI_API_KEY
    python -m evaluation judge A B --model llama3.1 --base_url http://localhost:11434/v1   # a local server

All models continue the same prompts. The judge grades each story by the rubric of TinyStories, and picks the better one of each
two, in both orders and without knowing the models: only a verdict that is the same in both orders counts, the others are ties.
The cost is estimated before anything is asked. Answers are cached: the same command continues where it was stopped, and once
all are there it needs neither the server nor a key.
"""

import json
import sys
from collections import Counter
from pathlib import Path

from evaluation.judge.prompts import Prompt, read_prompts
from evaluation.judge.verdict import Judgement, Preference, cohens_kappa, questions
from evaluation.statistics import SIGNIFICANCE
from inference import generate, load_model
from runs.tables import FrameTable, plain


def write_stories(names: list[str], prompts: list[Prompt], rounds: int = 1, seed: int = 0, **options) -> dict[str, list[str]]:
    """Let each model complete each prompt: {name: completions}, where story n is of prompt n % len(prompts).

    rounds: stories per prompt.  options: of inference.stream.
    """
    stories = {}
    for name, (model, tokenizer) in {name: load_model(name) for name in names}.items():
        texts = [prompt.text for prompt in prompts]
        heads = [tokenizer.decode(tokenizer.encode(text, bos=True)) for text in texts]
        stories[name] = []
        for number in range(rounds):
            written = generate(model, tokenizer, texts, seed=seed + number * len(prompts), **options)
            stories[name] += [story.removeprefix(head) for story, head in zip(written, heads, strict=True)]
    return stories


def plan(calls: dict, missing: list, endpoint, prices: list[float] | None) -> str:
    """Summarize what will be asked, and its cost. prices: per million tokens read and written."""
    read, written, at_most = endpoint.estimate_tokens(missing)
    counts = Counter(type(asked).__name__ for asked in calls)
    again = sum(asked.again for asked in calls)
    lines = [
        f"{len(calls):,} calls: {counts['Grading']:,} grade a story, {counts['Pairing']:,} compare two; "
        f"{again:,} of them for a second time, to see whether the judge agrees with itself",
        f"{len(calls) - len(missing):,} are answered already, {len(missing):,} are to be asked: "
        f"about {read:,} tokens to read and {written:,} to write (at most {at_most:,})",
    ]
    if prices:
        price, limit = (read * prices[0] / 1e6 + tokens * prices[-1] / 1e6 for tokens in (written, at_most))
        each = f"{prices[0]:g} per million tokens read and {prices[-1]:g} written"
        lines.append(f"at {each}: about {price:,.4f}, and at most {limit:,.4f} before retries")
    return "\n".join(lines)


def report(judgement: Judgement) -> str:
    """Format a Judgement for the terminal."""
    heading = f"Grades from 1 to 10: the mean over {len(judgement.prompts)} prompts"
    parts = [f"{heading} (95% interval of each alone; none if all are equal)\n{plain(FrameTable(judgement.table()))}"]
    for first, second in judgement.pairs:
        preference = judgement.preference(first, second)
        if preference and preference.lost > preference.won:
            preference = judgement.preference(second, first)
        parts.append(format_preference(preference) if preference else f"{first} and {second}: no comparison was answered.")
    if reliability := reliability_of(judgement):
        parts.append("\n".join(["How reliable the judge is (means over prompts, 95% intervals)", *reliability]))
    return "\n\n".join(parts)


def format_preference(preference: Preference) -> str:
    first, second, decided = preference.first, preference.second, preference.won + preference.lost
    ties = f"{preference.tied} tie{'s' * (preference.tied != 1)}"
    if decided == 0:
        return f"{first} and {second} are not distinguishable: {ties} and no decided prompt."
    corrected = f", corrected for {preference.pairs} comparisons" * (preference.pairs > 1)
    numbers = f"{preference.won} of {decided} decided prompts: {preference.share:.0%}, p = {preference.p:.2g}{corrected}; {ties}."
    if preference.p > SIGNIFICANCE:
        return f"{first} and {second} are not distinguishable: {first} wins {numbers}"
    return f"{first} is preferred to {second} on {numbers}"


def reliability_of(judgement: Judgement) -> list[str]:
    """Report how often the judge agrees with itself, a line each: in both orders, and when asked twice."""

    def kappa(*ratings, **options) -> str:
        value = cohens_kappa(*ratings, **options)
        return "undefined, as all its answers are the same" if value != value else f"{value:.2f}"

    lines = []
    if len(judgement.names) > 1:
        lines += [
            f"the same verdict in both orders: {judgement.same_in_both_orders():.0%}",
            f"the story shown first is picked: {judgement.shown_first():.0%}; 50% if the order did not matter",
        ]
    numbers, verdicts, again = judgement.verdicts_twice().T
    if len(numbers):
        same = judgement.share_over_prompts(zip(numbers, verdicts == again, strict=True))
        lines.append(f"asked twice, the same verdict: {same:.0%}, Cohen's kappa {kappa(verdicts, again)}")
    numbers, grades, again = judgement.grades_twice()
    if len(numbers):
        same = judgement.share_over_prompts(zip(numbers, (grades == again).mean(axis=1), strict=True))
        lines.append(f"asked twice, the same grade: {same:.0%}, {abs(grades - again).mean():.2f} apart on average, "
                     f"Cohen's kappa with squared weights {kappa(grades.ravel(), again.ravel(), squared=True)}")  # fmt: skip
    return lines


def failures(failed: dict, asked: int) -> str:
    """Report how many calls failed, and why."""
    reasons = ", ".join(f"{count:,} x {reason}" for reason, count in Counter(failed.values()).most_common(5))
    return f"{len(failed):,} of {asked:,} calls failed and are not counted; the same command repeats them: {reasons}"


def save(path: Path, judgement: Judgement):
    """Write prompts, stories and answers as JSON."""
    answers = [{"kind": type(asked).__name__, **vars(asked), **answer} for asked, answer in judgement.answers.items()]
    prompts = [vars(prompt) for prompt in judgement.prompts]
    content = {"prompts": prompts, "stories": judgement.stories, "answers": answers}
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def confirm(question: str) -> bool:
    """Ask at the terminal. Raises ValueError if there is none."""
    if not sys.stdin.isatty():
        raise ValueError("there is no terminal to confirm the cost at: add --yes")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def main(arguments):
    """Run the command `judge`."""
    from evaluation.judge.endpoint import Call, Endpoint

    prompts = read_prompts(arguments.prompts)
    endpoint = Endpoint(
        arguments.model, arguments.base_url, timeout=arguments.timeout, retries=arguments.retries, parallel=arguments.parallel,
        temperature=arguments.judge_temperature, max_answer_tokens=arguments.max_answer_tokens,
    )  # fmt: skip
    if not any(endpoint.folder.glob("*.json")):  # nothing is cached: try the server before writing stories for a minute
        endpoint.check()
    options = {"temperature": arguments.temperature, "max_new_tokens": arguments.max_new_tokens}
    stories = write_stories(arguments.runs, prompts, arguments.stories_per_prompt, arguments.seed, **options)
    calls = {asked: Call(*call) for asked, call in questions(prompts, stories, arguments.repeat, arguments.seed).items()}
    missing = endpoint.missing(calls)
    print(plan(calls, missing, endpoint, arguments.price_per_million))
    if missing:
        endpoint.check()
        if not (arguments.yes or confirm(f"Ask {arguments.model} at {endpoint.base_url}?")):
            return
    answers, failed = endpoint.ask_all(calls)
    if missing:
        print(f"read {endpoint.tokens_read:,} tokens and wrote {endpoint.tokens_written:,}, as the server counts them")
    if failed:
        print(failures(failed, len(calls)))
    judgement = Judgement(prompts, stories, answers)
    if arguments.save:
        save(arguments.save, judgement)
    if not answers:
        raise ValueError(f"{arguments.model} gave no valid answer: try another model")
    print(f"\n{report(judgement)}")
