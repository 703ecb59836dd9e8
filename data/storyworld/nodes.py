"""Nodes of compiled templates: sampling, parsing and entropy.

A variable is drawn at its first mention, uniformly from its table (given the variable it depends on), without the values of its
rivals. So all choices show in the text. Every node has `sample`, which draws a text; `match`, which finds all parses of a text;
`entropy`, which sums the entropies of the choices; and `first`, its set of first letters and whether it can be empty.
An environment `env` is a tuple of all variables' values, None if not drawn yet; env[FAULT] is the kind of error, if any.
"""

import math
from bisect import bisect
from collections import defaultdict

FAULT = 0
FAULT_COST = 1000.0  # nats; prefers the parse with the fewest faults


class Entity:
    """A value of a variable. `forms` are its words by name ("" is the default), `tags` are tested by guards."""

    __slots__ = ("domain", "forms", "name", "tags")

    def __init__(self, domain: str, name: str, forms: dict[str, str], tags=()):
        self.domain, self.name, self.forms, self.tags = domain, name, {"": name, **forms}, frozenset(tags)

    def __repr__(self):
        return f"<{self.domain} {self.name}>"

    def form(self, name: str, capital: bool) -> str:
        if name not in self.forms:
            raise ValueError(f"{self!r} has no form {name!r}. There are: {', '.join(self.forms)}")
        return capitalised(self.forms[name]) if capital else self.forms[name]


SOMETHING = Entity("", "something", {})  # a value that no later choice depends on


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def with_article(word: str) -> str:
    """Prepend the article, after any weight: apple -> an apple, 3*apple -> 3*an apple"""
    weight, star, rest = word.rpartition("*")
    if star:
        return f"{weight}*{with_article(rest)}"
    return f"{'an' if word[0] in 'aeiou' and not word.startswith(('uni', 'use')) else 'a'} {word}"


class Table:
    """Equally likely entities, with an index by their words."""

    def __init__(self, entities: list[Entity]):
        assert entities and len(set(entities)) == len(entities), entities
        self.entities, self.members = entities, frozenset(entities)
        self._by_words: dict[tuple[str, bool], Surfaces] = {}

    def by_words(self, form: str, capital: bool) -> "Surfaces":
        if (form, capital) not in self._by_words:
            self._by_words[form, capital] = Surfaces([(entity.form(form, capital), entity) for entity in self.entities])
        return self._by_words[form, capital]


class Surfaces:
    """Find which of many strings occur at a position: one dictionary lookup for each length."""

    def __init__(self, pairs: list[tuple[str, object]]):
        self.by_text = defaultdict(list)
        for text, value in pairs:
            self.by_text[text].append(value)
        self.by_text = dict(self.by_text)
        self.lengths = sorted({len(text) for text in self.by_text})

    def at(self, text: str, position: int) -> list[tuple[int, object]]:
        """[(end, value), ...]"""
        found = []
        for length in self.lengths:
            for value in self.by_text.get(text[position : position + length], ()):
                found.append((position + length, value))
        return found


class Variable:
    """A variable, drawn from tables[value of `given`] or tables[None]; never equal to its `rivals`."""

    def __init__(self, name: str, index: int, table: str, given: "Variable | None"):
        self.name, self.index, self.table, self.given = name, index, table, given
        self.rivals: list[int] = []


class Reader:
    """A text being parsed. From position `lenient_from` on, wrong facts are accepted and recorded in env[FAULT]."""

    def __init__(self, text: str, lenient_from: float = math.inf):
        self.text, self.lenient_from, self.furthest = text, lenient_from, 0

    def stuck(self, position: int) -> list:
        if position > self.furthest:
            self.furthest = position
        return []


class Literal:
    def __init__(self, text: str):
        self.text = text

    def first(self):
        return {self.text[0]}, False

    def sample(self, random, env, out):
        out.append(self.text)
        return 0.0

    def match(self, reader, position, env):
        if reader.text.startswith(self.text, position):
            return [(position + len(self.text), env, 0.0)]
        if position + len(self.text) > reader.furthest:
            for length, (here, there) in enumerate(zip(self.text, reader.text[position:] + "\0", strict=False)):
                if here != there:
                    return reader.stuck(position + length)
        return []

    def entropy(self, dist):
        return dist, 0.0


class Words:
    """A Choice between plain texts, with a fast lookup."""

    def __init__(self, texts: list[str], weights: list[int]):
        total = sum(weights)
        self.texts, self.costs = texts, [math.log(weight / total) for weight in weights]
        self.steps = [index for index, weight in enumerate(weights) for _ in range(weight)]
        self.surfaces = Surfaces([(text, cost) for text, cost in zip(texts, self.costs, strict=True)])
        self.nats = -sum(math.exp(cost) * cost for cost in self.costs)

    def first(self):
        return {text[0] for text in self.texts if text}, "" in self.texts

    def sample(self, random, env, out):
        index = self.steps[int(random() * len(self.steps))]
        out.append(self.texts[index])
        return self.costs[index]

    def match(self, reader, position, env):
        found = [(end, env, cost) for end, cost in self.surfaces.at(reader.text, position)]
        return found or reader.stuck(position)

    def entropy(self, dist):
        return dist, self.nats * sum(dist.values())


class Reference:
    """A form of a variable's value; draws the value if it has none yet."""

    def __init__(self, world, variable: Variable, table: str, form: str, capital: bool):
        self.world, self.variable, self.index, self.form, self.capital = world, variable, variable.index, form, capital
        self.table_name, self.tables = table, world.tables[table]
        self.given = variable.given.index if variable.given and None not in self.tables else None
        self.anything = world.domain_table(table).by_words(form, capital)
        self.fact = world.facts[world.domain_of(table)]

    def table(self, env) -> Table:
        key = None if self.given is None else env[self.given]
        if key not in self.tables:
            raise ValueError(f"the table {self.table_name!r} has nothing for {key!r}, which {self.variable.name!r} needs")
        return self.tables[key]

    def first(self):
        return {text[0] for text in self.anything.by_text}, False

    def taken(self, env, table) -> list:
        return [env[rival] for rival in self.variable.rivals if env[rival] in table.members]

    def sample(self, random, env, out):
        value, cost = env[self.index], 0.0
        if value is None:
            table = self.table(env)
            taken = self.taken(env, table)
            value = table.entities[int(random() * len(table.entities))]
            while value in taken:
                value = table.entities[int(random() * len(table.entities))]
            env[self.index] = value
            cost = -math.log(len(table.entities) - len(taken))
        text = value.forms[self.form]
        out.append(text[:1].upper() + text[1:] if self.capital else text)
        return cost

    def match(self, reader, position, env):
        value = env[self.index]
        if value is not None:
            text = value.forms[self.form]
            if self.capital:
                text = text[:1].upper() + text[1:]
            if reader.text.startswith(text, position):
                return [(position + len(text), env, 0.0)]
            found = []
        else:
            table = self.table(env)
            taken = self.taken(env, table)
            cost = -math.log(len(table.entities) - len(taken))
            found = [
                (end, bound(env, self.index, drawn), cost)
                for end, drawn in table.by_words(self.form, self.capital).at(reader.text, position)
                if drawn not in taken
            ]
        if not found and position >= reader.lenient_from:
            for end, drawn in self.anything.at(reader.text, position):
                found.append((end, faulty(env if value else bound(env, self.index, drawn), self.fact), -FAULT_COST))
        return found or reader.stuck(position)

    def entropy(self, dist):
        after, nats = defaultdict(float), 0.0
        for env, mass in dist.items():
            if env[self.index] is not None:
                after[env] += mass
                continue
            table = self.table(env)
            taken = self.taken(env, table)
            left = len(table.entities) - len(taken)
            nats += mass * math.log(left)
            for member, count in self.world.classes(table):
                share = (count - taken.count(member)) / left
                if share:
                    after[bound(env, self.index, member)] += mass * share
        return after, nats


def bound(env: tuple, index: int, value) -> tuple:
    return (*env[:index], value, *env[index + 1 :])


def faulty(env: tuple, fact: str) -> tuple:
    return env if env[FAULT] else bound(env, FAULT, fact)


class Sequence:
    def __init__(self, parts: list):
        self.parts = parts

    def first(self):
        letters = set()
        for part in self.parts:
            more, nullable = part.first()
            letters |= more
            if not nullable:
                return letters, False
        return letters, True

    def sample(self, random, env, out):
        cost = 0.0
        for part in self.parts:
            cost += part.sample(random, env, out)
        return cost

    def match(self, reader, position, env):
        states = [(position, env, 0.0)]
        for part in self.parts:
            states = step(part, reader, states)
            if not states:
                break
        return states

    def entropy(self, dist):
        total = 0.0
        for part in self.parts:
            dist, nats = part.entropy(dist)
            total += nats
        return dist, total


def step(node, reader, states: list) -> list:
    """Extend each state (position, env, log-probability) by all matches of `node`."""
    if len(states) == 1:
        position, env, cost = states[0]
        return [(end, after, cost + more) for end, after, more in node.match(reader, position, env)]
    return [(end, after, cost + more) for at, env, cost in states for end, after, more in node.match(reader, at, env)]


class Guard:
    """A condition: <variable.tag>, <variable> (is drawn), or either negated with !"""

    def __init__(self, variable: Variable, tag: str, negated: bool, fact: str):
        self.index, self.tag, self.negated, self.fact = variable.index, tag, negated, fact

    def holds(self, env) -> bool:
        value = env[self.index]
        return (value is not None and (not self.tag or self.tag in value.tags)) != self.negated


class Choice:
    def __init__(self, alternatives: list, weights: list[int], guards: list[list[Guard]]):
        self.alternatives, self.weights, self.guards = alternatives, weights, guards
        self.guarded = any(guards)
        self.cumulated = self.cumulate(weights)
        self.costs = [math.log(weight / sum(weights)) for weight in weights]
        self.letters, self.nullable, self.by_letter = set(), False, defaultdict(list)
        firsts = [alternative.first() for alternative in alternatives]
        for letters, nullable in firsts:
            self.letters |= letters
            self.nullable |= nullable
        for letter in [*self.letters, ""]:
            self.by_letter[letter] = [n for n, (letters, nullable) in enumerate(firsts) if nullable or letter in letters]

    @staticmethod
    def cumulate(weights: list[int]) -> list[int]:
        return [sum(weights[: index + 1]) for index in range(len(weights))]

    def first(self):
        return self.letters, self.nullable

    def allowed(self, env) -> list[int]:
        """The weights, 0 where a guard fails."""
        pairs = zip(self.weights, self.guards, strict=True)
        weights = [weight if all(guard.holds(env) for guard in guards) else 0 for weight, guards in pairs]
        assert any(weights), f"no alternative is left in {self.guards}"
        return weights

    def sample(self, random, env, out):
        if not self.guarded:
            index = bisect(self.cumulated, random() * self.cumulated[-1])
            return self.costs[index] + self.alternatives[index].sample(random, env, out)
        weights = self.allowed(env)
        index = bisect(self.cumulate(weights), random() * sum(weights))
        return math.log(weights[index] / sum(weights)) + self.alternatives[index].sample(random, env, out)

    def match(self, reader, position, env):
        candidates = self.by_letter.get(reader.text[position : position + 1], self.by_letter[""])
        if not candidates:
            return reader.stuck(position)
        weights = self.allowed(env) if self.guarded else None
        found = []
        for index in candidates:
            here = env
            if weights is None:
                cost = self.costs[index]
            elif weights[index]:
                cost = math.log(weights[index] / sum(weights))
            elif position >= reader.lenient_from:
                broken = next(guard for guard in self.guards[index] if not guard.holds(env))
                here, cost = faulty(env, broken.fact), -FAULT_COST
            else:
                continue
            for end, after, more in self.alternatives[index].match(reader, position, here):
                found.append((end, after, cost + more))
        return found or reader.stuck(position)

    def entropy(self, dist):
        groups = defaultdict(dict)
        for env, mass in dist.items():
            groups[tuple(self.allowed(env))][env] = mass
        result, nats = defaultdict(float), 0.0
        for weights, group in groups.items():
            for weight, alternative in zip(weights, self.alternatives, strict=True):
                if weight:
                    share = weight / sum(weights)
                    nats -= share * math.log(share) * sum(group.values())
                    after, more = alternative.entropy({env: mass * share for env, mass in group.items()})
                    nats += more
                    for env, mass in after.items():
                        result[env] += mass
        return result, nats
