"""Let a large model judge the stories of small ones.

    python -m evaluation.judge A B --model gpt-4o-mini --price_per_million 0.15 0.60       # with OPENAI_API_KEY
    python -m evaluation.judge A B --model llama3.1 --base_url http://localhost:11434/v1   # a server of your own

All models go on from the same beginnings. The judge grades each story by the rubric of TinyStories, and says of each two which is
better, in both orders and without knowing whose they are: only a verdict that is the same in both orders counts, all others are
ties. What it costs is shown before. Answers are kept in the cache folder, so the same command goes on where it was stopped, and
when all is answered it needs neither server nor key.
"""

import argparse
import json
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

from evaluation.judge.prompts import Prompt, read_prompts
from inference import generate, load_model


def write_stories(names: list[str], prompts: list[Prompt], rounds: int = 1, seed: int = 0, **options) -> dict[str, list[str]]:
    """What each model writes behind each prompt, so many rounds: {name: completions}, story n being of prompt n % len(prompts).

    options: see inference.stream. Raises as runs.load_model and inference.stream do.
    """
    stories = {}
    for name, (model, tokenizer) in {name: load_model(name) for name in names}.items():
        texts = [prompt.text for prompt in prompts]
        heads = [tokenizer.decode(tokenizer.encode(text, bos=True)) for text in texts]
        stories[name] = []
        for number in range(rounds):
            told = generate(model, tokenizer, texts, seed=seed + number * len(prompts), **options)
            stories[name] += [story.removeprefix(head) for story, head in zip(told, heads, strict=True)]
    return stories


def plan(calls: dict, endpoint, prices: list[float] | None) -> str:
    """What is going to be asked and what that costs, in a few lines. prices: per million tokens read and written."""
    missing = endpoint.missing(calls)
    read, written, at_most = endpoint.expected_tokens(missing)
    counts = Counter(type(asked).__name__ for asked in calls)
    again = sum(asked.again for asked in calls)
    lines = [
        f"{len(calls):,} calls: {counts['Grading']:,} grade a story, {counts['Comparison']:,} compare two; "
        f"{again:,} of them for a second time, to see whether the judge agrees with itself",
        f"{len(calls) - len(missing):,} are answered already, {len(missing):,} are to be asked: "
        f"about {read:,} tokens to read and {written:,} to write (at most {at_most:,})",
    ]
    if prices:
        price, most = (read * prices[0] / 1e6 + tokens * prices[-1] / 1e6 for tokens in (written, at_most))
        each = f"{prices[0]:g} per million tokens read and {prices[-1]:g} written"
        lines.append(f"at {each}: about {price:,.4f}, and at most {most:,.4f} before retries")
    return "\n".join(lines)


def report(judgement) -> str:
    """What a judge_verdict.Judgement says, for the terminal."""
    from evaluation.judge.verdict import cohens_kappa, mean_of, share_of, squared

    parts = [
        f"Grades from 1 to 10: the mean over {len(judgement.prompts)} prompts (95% interval)\n"
        + judgement.table().to_string()
    ]
    for first, second in combinations(judgement.names, 2):
        preference = judgement.preference(first, second)
        if preference and preference.lost > preference.won:
            preference = judgement.preference(second, first)
        parts.append(sentence(preference) if preference else f"{first} and {second}: no comparison was answered.")
    trust = []
    if len(judgement.names) > 1:
        trust += [
            f"the same verdict in both orders: {judgement.same_in_both_orders():.0%}",
            f"the story shown first is taken: {judgement.shown_first():.0%}; 50% if the order did not matter",
        ]
    verdicts, again = judgement.verdicts_twice()
    if verdicts:
        same = share_of(sum(one == two for one, two in zip(verdicts, again, strict=True)), len(verdicts))
        trust.append(f"asked twice, the same verdict: {same:.0%}, Cohen's kappa {shown(cohens_kappa(verdicts, again))}")
    grades, again = judgement.grades_twice()
    if len(grades):
        same = mean_of((grades == again).mean(axis=1))
        kappa = cohens_kappa(grades.ravel(), again.ravel(), squared)
        trust.append(
            f"asked twice, the same grade: {same:.0%}, {abs(grades - again).mean():.2f} apart on average, "
            f"Cohen's kappa with squared weights {shown(kappa)}"
        )
    if trust:
        parts.append("\n".join(["How far the judge can be trusted (95% intervals)", *trust]))
    return "\n\n".join(parts)


def shown(kappa: float) -> str:
    return "undefined, as it always said the same" if kappa != kappa else f"{kappa:.2f}"


def sentence(preference) -> str:
    """A judge_verdict.Preference in words."""
    first, second, decided = preference.first, preference.second, preference.won + preference.lost
    if decided == 0:
        return f"{first} and {second} are not told apart: all {preference.tied} prompts are ties."
    ahead = f"{first} is preferred to {second} on {preference.won} of {decided} decided prompts: {preference.share:.0%}"
    rest = f"p = {preference.p:.2g}, {preference.tied} ties"
    return f"{ahead}, {rest}." if preference.p < 0.05 else f"{ahead}, {rest}. That may be chance."


def failures(failed: dict, asked: int) -> str:
    """How many calls gave nothing that can be used, and why."""
    reasons = ", ".join(f"{count:,} x {reason}" for reason, count in Counter(failed.values()).most_common(5))
    return f"{len(failed):,} of {asked:,} calls failed and count nowhere; the same command asks them again: {reasons}"


def save(path: Path, judgement):
    """Write prompts, stories and all answers as JSON."""
    answers = [{"kind": type(asked).__name__, **vars(asked), **answer} for asked, answer in judgement.answers.items()]
    prompts = [vars(prompt) for prompt in judgement.prompts]
    content = {"prompts": prompts, "stories": judgement.stories, "answers": answers}
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.judge", description="Let a large model judge the stories of small ones."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="one is graded, two or more are compared, too")
    parser.add_argument("--model", required=True, help="the name that the server knows the judge by")
    parser.add_argument("--base_url", help="an OpenAI-compatible server; by default $OPENAI_BASE_URL, or OpenAI's own")
    parser.add_argument("--prompts", default="beginnings", help="beginnings, words, or a file, one a line; default: %(default)s")
    parser.add_argument("--stories_per_prompt", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--max_new_tokens", type=int, help="of a story; by default until it ends or the context is full")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the models that write; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--repeat", type=float, default=0.2, help="the share of stories judged twice; default: %(default)s")
    parser.add_argument("--judge_temperature", type=float, help="by default the server's own")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for an answer; default: %(default)s")
    parser.add_argument("--retries", type=int, default=4, help="after a time-out or if the server is busy; default: %(default)s")
    parser.add_argument("--parallel", type=int, default=4, help="calls at a time; default: %(default)s")
    parser.add_argument("--max_answer_tokens", type=int, default=1000, help="of the judge's answer; default: %(default)s")
    parser.add_argument("--price_per_million", type=float, nargs="+", metavar="PRICE", help="or two: of tokens read, and written")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write stories and answers there, as JSON")
    parser.add_argument("--yes", action="store_true", help="ask without confirmation")
    arguments = parser.parse_args(words)
    if len(set(arguments.runs)) < len(arguments.runs):
        parser.error("a run is named twice: name different ones")
    for name in ("stories_per_prompt", "parallel", "max_answer_tokens", "timeout"):
        if not getattr(arguments, name) > 0:
            parser.error(f"--{name} {getattr(arguments, name)}: give a number above 0")
    if arguments.retries < 0:
        parser.error(f"--retries {arguments.retries}: give 0 or more")
    if not 0 <= arguments.repeat <= 1:
        parser.error(f"--repeat {arguments.repeat}: give a share from 0 to 1")
    prices = arguments.price_per_million or [0.0]
    if len(prices) > 2 or not min(prices) >= 0:
        parser.error("--price_per_million: give one price, or that of tokens read and that of tokens written")
    if arguments.save and not arguments.save.parent.is_dir():
        parser.error(f"--save {arguments.save}: there is no folder {arguments.save.parent}")
    return arguments


def confirmed(question: str) -> bool:
    """Asks at the terminal. Raises ValueError where there is none."""
    if not sys.stdin.isatty():
        raise ValueError("nobody is here to confirm what this costs: add --yes")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def main(words: list[str]):
    arguments = read_arguments(words)
    from evaluation.judge.endpoint import Call, Endpoint
    from evaluation.judge.verdict import Judgement, questions

    prompts = read_prompts(arguments.prompts)
    endpoint = Endpoint(
        arguments.model, arguments.base_url, timeout=arguments.timeout, retries=arguments.retries, parallel=arguments.parallel,
        temperature=arguments.judge_temperature, max_answer_tokens=arguments.max_answer_tokens,
    )  # fmt: skip
    if not endpoint.has_kept():
        endpoint.check()  # before the minute that the stories take
    options = {"temperature": arguments.temperature, "max_new_tokens": arguments.max_new_tokens}
    stories = write_stories(arguments.runs, prompts, arguments.stories_per_prompt, arguments.seed, **options)
    calls = {asked: Call(*call) for asked, call in questions(prompts, stories, arguments.repeat, arguments.seed).items()}
    print(plan(calls, endpoint, arguments.price_per_million))
    missing = len(endpoint.missing(calls))
    if missing:
        endpoint.check()
    if missing and not arguments.yes and not confirmed(f"Ask {arguments.model} at {endpoint.base_url}?"):
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
        raise ValueError(f"{arguments.model} gave no answer that can be used: try another model")
    print(f"\n{report(judgement)}")
