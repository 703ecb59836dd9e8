"""A generator of endless synthetic stories whose exact probabilities are known; no download.

A probabilistic program samples the opening (who the hero is), then a plot that allows this hero, then the plot's sentences in
order. Words are in lexicon.py, plots in plots.py, the template language in grammar.py, and sampling, parsing and entropy in
nodes.py. Every choice shows in the text, and different choices give different texts, so

    sample(random.Random(0)).log_prob == score(sample(random.Random(0)).text).log_prob

and the entropy of the choices is the entropy of the text: a lower bound on the loss of any model.
    nats per story      entropy(), exact; about code_length(sample) / len(sample)
    bits per byte       code_length(stories) / log(2) / their number of bytes, for the stories a model is evaluated on
There are two worlds: "storyworld", and "storyworld_small", which a small model learns in minutes: the same grammar with fewer
plots, words and turns of phrase. Each of its stories is also possible in the large one, with another probability.
`stories` splits training from validation by a checksum of the text. A model that learned the checksum would gain log(8/7) nats
per story in training and log(8) in validation; in practice none does.

    python -m data.storyworld --count 3 --seed 0         print stories and their information content in bits
    python -m data.storyworld --world storyworld_small   the same for the small world
    python -m data.storyworld --score my_stories.txt     score stories, separated by empty lines
"""

import functools
import math
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from zlib import crc32

from data.storyworld import lexicon
from data.storyworld.grammar import Limits, World
from data.storyworld.nodes import FAULT, SOMETHING, Choice, Entity, Reader, Reference, Table, bound, step
from data.storyworld.plots import OPENING, PHRASES, PLOTS

VALIDATION_SHARE = 8  # one story in 8 is for validation
WORLDS = {"storyworld": Limits(), "storyworld_small": Limits(plots=6, entities=5, words=3, choices=2)}


@dataclass(frozen=True)
class Story:
    """A text and its log-probability in nats."""

    text: str
    log_prob: float


@dataclass(frozen=True)
class Score:
    """Result of `score`: `log_prob` and `plot` of a valid story; for an invalid one log_prob is -inf, and the error is set.

    error      one line: the invalid sentence, and what is wrong with it
    sentence   the first invalid sentence
    index      its index, which is also the number of valid sentences
    fact       the kind of error: "who", "what", "where" or "why" (contradicts the story or the world), "end" (the story is
               incomplete), "grammar" (no sentence of this world matches)
    """

    log_prob: float
    plot: str | None = None
    error: str | None = None
    sentence: str | None = None
    index: int | None = None
    fact: str | None = None


@dataclass(frozen=True)
class Plot:
    name: str
    entity: Entity
    slots: list


@dataclass(frozen=True)
class Program:
    """The compiled world: a story is the slots of `opening`, then those of a plot from `cast` for the hero's kind."""

    world: World
    opening: list
    plots: list[Plot]
    cast: dict[Entity, list[Plot]]
    plot_index: int
    kind_index: int


def compile_slots(world: World, source: str, is_start: bool = False) -> list:
    """Compile each line that starts with "- " or "/ " (new paragraph) to a node; other lines continue the previous one."""
    lines = [line.strip() for line in source.strip().splitlines()]
    joined = re.split(r"\n(?=[-/] )", "\n".join(lines))
    slots = []
    for line in joined:
        if line[:2] not in ("- ", "/ "):
            raise ValueError(f"a line of a plot begins with '- ' or '/ ': {line[:60]!r}")
        before = "" if is_start and not slots else " " if line[0] == "-" else "\n"
        slots.append(world.compile(re.sub(r"\s*\|\|\s*", "|", line[2:].replace("\n", " ")), before))
    return slots


@functools.cache
def program(name: str = "storyworld") -> Program:
    """Compile a world on first use (well under a second)."""
    limits = WORLDS[name]
    tables = lexicon.build_tables(limits.entities)
    plots = {name: Entity("plot", name, {}) for name in list(PLOTS)[: limits.plots]}
    tables["plot"] = {None: Table(list(plots.values()))}
    morals = {name: PLOTS[name]["morals"].split("|")[: limits.choices] for name in plots}
    tables["moral"] = {plots[name]: Table([Entity("moral", text, {}) for text in morals[name]]) for name in plots}
    variables = {**lexicon.VARIABLES, "moral": ("moral", "plot")}
    world = World(tables, variables, {**lexicon.WORDS, **PHRASES}, lexicon.FACTS, lexicon.SHARED, limits)
    opening = compile_slots(world, OPENING, is_start=True)
    told = [Plot(name, plots[name], compile_slots(world, PLOTS[name]["text"])) for name in plots]
    cast = {
        kind: [plot for plot in told if {kind.name, *kind.tags} & set(PLOTS[plot.name]["cast"].split())]
        for kind in world.domain_table("kind").entities
    }
    return Program(world, opening, told, cast, world.variable("plot").index, world.variable("kind").index)


def tell(rng: random.Random, name: str = "storyworld") -> tuple[str, float, str]:
    """Sample a story: its text, log-probability and plot name."""
    p = program(name)
    env, words = list(p.world.empty_env()), []
    log_prob = 0.0
    for slot in p.opening:
        log_prob += slot.sample(rng.random, env, words)
    plots = p.cast[env[p.kind_index]]
    plot = plots[int(rng.random() * len(plots))]
    env[p.plot_index] = plot.entity
    log_prob -= math.log(len(plots))
    for slot in plot.slots:
        log_prob += slot.sample(rng.random, env, words)
    return "".join(words), log_prob, plot.name


def sample(rng: random.Random, name: str = "storyworld") -> Story:
    """Sample a story of a world, with its exact log-probability in nats."""
    text, log_prob, _ = tell(rng, name)
    return Story(text, log_prob)


def merged(states: list) -> list:
    """Merge states (position, env, log-probability) that share position and env."""
    if len(states) < 2:
        return states
    together = defaultdict(list)
    for position, env, log_prob in states:
        together[position, env].append(log_prob)
    return [(position, env, log_sum(costs)) for (position, env), costs in together.items()]


def log_sum(log_probs: list[float]) -> float:
    if len(log_probs) == 1:
        return log_probs[0]
    top = max(log_probs)
    return top + math.log(sum(math.exp(value - top) for value in log_probs))


def read(reader: Reader, p: Program, until: float = math.inf) -> tuple[list, list]:
    """Parse the text as a story of the world `p`: ([(plot name, states after its last slot)], [states after every slot]).

    States at position `until` or beyond are not extended.
    """

    def after(slot, states):
        return merged(step(slot, reader, [state for state in states if state[0] < until]))

    states, seen = [(0, p.world.empty_env(), 0.0)], []
    for slot in p.opening:
        states = after(slot, states)
        seen += states
    starts = defaultdict(list)
    for position, env, log_prob in states:
        plots = p.cast[env[p.kind_index]]
        for plot in plots:
            starts[plot.name].append((position, bound(env, p.plot_index, plot.entity), log_prob - math.log(len(plots))))
    ends = []
    for plot in p.plots:
        states = starts[plot.name]
        for slot in plot.slots:
            if not states:
                break
            states = after(slot, states)
            seen += states
        ends.append((plot.name, states))
    return ends, seen


def score(text: str, name: str = "storyworld") -> Score:
    """Compute the exact log-probability of a text in nats, summed over all parses, or find its first invalid sentence."""
    reader, p = Reader(text), program(name)
    ends, _ = read(reader, p)
    whole = [(name, log_prob) for name, states in ends for position, _, log_prob in states if position == len(text)]
    if whole:
        return Score(log_sum([log_prob for _, log_prob in whole]), plot=whole[0][0])
    reader.furthest = max([reader.furthest, *(position for _, states in ends for position, _, _ in states)])
    return diagnosis(text, reader.furthest, p)


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Start and end of each sentence, including a closing quotation mark."""
    return [found.span() for found in re.finditer(r"\S.*?(?:[.!?]\"?(?=\s|$)|$)", text, re.MULTILINE)]


def diagnosis(text: str, furthest: int, p: Program) -> Score:
    """Report the sentence where parsing failed, and the kind of error."""
    spans = sentence_spans(text) or [(0, len(text))]
    index = next((index for index, (_, end) in enumerate(spans) if end > furthest), len(spans) - 1)
    start, end = spans[index]
    sentence = text[start:end]
    if index == len(spans) - 1 and (furthest >= len(text) or not re.search(r"[.!?]\"?$", sentence)):
        fact, problem = "end", "the story stops before its end"
    else:
        _, seen = read(Reader(text, lenient_from=start), p, until=end)
        faults = [(log_prob, env[FAULT]) for position, env, log_prob in seen if position >= end and env[FAULT]]
        fact = max(faults, key=lambda fault: fault[0])[1] if faults else "grammar"
        problem = f"this is not {fact} it can be here" if faults else f"no sentence fits from {text[furthest:end][:40]!r} on"
    error = f"sentence {index + 1}, {sentence!r}: {problem}"
    return Score(-math.inf, error=error, sentence=sentence, index=index, fact=fact)


def code_length(texts: Iterable[str], name: str = "storyworld") -> float:
    """Negative log-likelihood of the stories under the world itself, in nats: the floor for any model.

    Raises ValueError for a text that is not of this world.
    """
    total = 0.0
    for text in texts:
        found = score(text, name)
        if found.error:
            raise ValueError(f"not a story of this world: {found.error}")
        total -= found.log_prob
    return total


@functools.cache
def entropy(name: str = "storyworld") -> float:
    """Compute the exact entropy in nats per story: the expected sum of the entropies of all choices.

    Propagates the distribution over environments slot by slot, marginalizing out values that no later choice depends on.
    """
    p = program(name)
    dist, nats = {p.world.empty_env(): 1.0}, 0.0
    for slot in p.opening:
        dist, more = carry(slot, dist)
        nats += more
    starts = defaultdict(lambda: defaultdict(float))
    for env, mass in dist.items():
        plots = p.cast[env[p.kind_index]]
        nats += mass * math.log(len(plots))
        for plot in plots:
            starts[plot.name][bound(env, p.plot_index, plot.entity)] += mass / len(plots)
    for plot in p.plots:
        dist = starts[plot.name]
        uses = [slot_uses(slot) for slot in plot.slots]
        for index, slot in enumerate(plot.slots):
            dist, more = carry(slot, forget(dist, set().union(*uses[index:])))
            nats += more
    return nats


def carry(slot, dist: dict) -> tuple[dict, float]:
    """slot.entropy(dist), computed once for all environments that agree in the variables the slot reads."""
    looked_at = sorted({index for pair in slot_uses(slot) for index in pair if index is not None})
    groups = defaultdict(list)
    for env, mass in dist.items():
        groups[tuple([env[index] for index in looked_at])].append((env, mass))
    result, nats = defaultdict(float), 0.0
    for group in groups.values():
        after, more = slot.entropy({group[0][0]: 1.0})
        nats += more * sum(mass for _, mass in group)
        start = group[0][0]
        outcomes = [([(i, end[i]) for i in looked_at if end[i] is not start[i]], share) for end, share in after.items()]
        for env, mass in group:
            for changes, share in outcomes:
                changed = list(env)
                for index, value in changes:
                    changed[index] = value
                result[tuple(changed)] += mass * share
    return result, nats


def slot_uses(node) -> set[tuple[int, int | None]]:
    """Variables that a slot reads: (variable, None) always, (variable, other) only while `other` is not drawn yet."""
    uses = set()
    if isinstance(node, Reference):
        uses = {(other, node.index) for other in [node.index, *node.variable.rivals]}
        uses |= set() if node.given is None else {(node.given, node.index)}
    elif isinstance(node, Choice):
        uses = {(guard.index, None) for guards in node.guards for guard in guards}
    for part in getattr(node, "parts", getattr(node, "alternatives", ())):
        uses |= slot_uses(part)
    return uses


def forget(dist: dict, uses: set) -> dict:
    """Merge environments that are equivalent for all later choices."""
    smaller, idle = defaultdict(float), {}
    for env, mass in dist.items():
        known = tuple([value is not None for value in env])
        if known not in idle:
            asked = {index for index, other in uses if other is None or not known[other]}
            idle[known] = [index for index, drawn in enumerate(known) if drawn and index not in asked]
        shorter = list(env)
        for index in idle[known]:
            shorter[index] = SOMETHING
        smaller[tuple(shorter)] += mass
    return smaller


def stories(split: str, count: int, name: str = "storyworld") -> Iterator[str]:
    """The first `count` stories of an endless stream, the same on every machine; split is "train" or "validation".

    A checksum of the text assigns each story to one split, so they are always disjoint.
    """
    if split not in ("train", "validation"):
        raise ValueError(f'split is "train" or "validation", not {split!r}')
    rng = random.Random(f"{name} {split}")
    while count > 0:
        text = tell(rng, name)[0]
        if (crc32(text.encode()) % VALIDATION_SHARE == 0) == (split == "validation"):
            count -= 1
            yield text


def main(
    count: int = 3, seed: int = 0, world: Literal["storyworld", "storyworld_small"] = "storyworld", score: Path | None = None,
    show_entropy: bool = False,
):
    """Print sampled stories with their information content in bits, or score the stories of a file.

    Args:
        count: number of stories
        seed: random seed
        world: which world
        score: a text file of stories, separated by empty lines, to score instead
        show_entropy: also compute the entropy of this world in bits per story; takes up to ten seconds
    """
    if score is not None:
        grade(score, world)
        return
    rng = random.Random(seed)
    for _ in range(count):
        story = sample(rng, world)
        bits = -story.log_prob / math.log(2)
        print(f"{story.text}\n[{bits:.1f} bits, {bits / len(story.text.encode()):.3f} bits per byte]\n")
    if show_entropy:
        print(f"The entropy of this world is {entropy(world) / math.log(2):.1f} bits per story.")


def grade(path: Path, world: str):
    """Score each story of a file, and print the results."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; --score takes a text file with stories separated by empty lines")
    texts = [part.strip() for part in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")) if part.strip()]
    found = [score(text, world) for text in texts]
    for number, one in enumerate(found, 1):
        print(f"story {number}: " + (one.error or f"{one.plot}, {-one.log_prob / math.log(2):.1f} bits"))
    print(f"{sum(one.error is None for one in found)} of {len(found)} are stories of this world.")
