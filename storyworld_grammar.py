"""Templates whose texts have a known probability: to write with, to read with, and to measure.

The template language, by example:
    The [big|tiny] {kind}           one of the alternatives, all equally likely; `3*big` is three times as likely
    [very |]happy                   an empty alternative makes a word optional
    {hero.his}, {Hero}              a form of the value of a variable; the capital letter asks for a capital letter
    {kind~animal.a}                 if `kind` is not known yet, draw it from the table `animal`
    @weather, @Weather, @weather.a  a named list of alternatives, capitalised, or with a or an before it
    [<kind.child>ran|<!pet>flew]    alternatives that hold only if kind has the tag child, if pet is not known yet

A variable is drawn where it first shows, uniformly from the table that belongs to the variable it depends on, never a value that
another variable of its domain has. So all choices are visible in the text. Three walks over the same tree: `sample` chooses,
`match` finds all ways to have chosen the text, `entropy` adds up how much there was to choose.
An environment `env` is a tuple with the values of all variables by index, None where not drawn yet; env[FAULT] is a kind of fact.
"""

import math
import re
from bisect import bisect
from collections import defaultdict

FAULT = 0
FAULT_COST = 1000.0  # nats; only to prefer the reading with the fewest faults


class Entity:
    """A thing of the world: `forms` are its words by name ("" for the plain one), `tags` what guards may ask for."""

    __slots__ = ("domain", "forms", "name", "tags")

    def __init__(self, domain: str, name: str, forms: dict[str, str], tags=()):
        self.domain, self.name, self.forms, self.tags = domain, name, {"": name, **forms}, frozenset(tags)

    def __repr__(self):
        return f"<{self.domain} {self.name}>"

    def form(self, name: str, capital: bool) -> str:
        if name not in self.forms:
            raise ValueError(f"{self!r} has no form {name!r}. There are: {', '.join(self.forms)}")
        return capitalised(self.forms[name]) if capital else self.forms[name]


SOMETHING = Entity("", "something", {})  # stands for a value that no later choice depends on


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def with_article(word: str) -> str:
    """apple -> an apple; a weight stays in front: 3*apple -> 3*an apple"""
    weight, star, rest = word.rpartition("*")
    if star:
        return f"{weight}*{with_article(rest)}"
    return f"{'an' if word[0] in 'aeiou' and not word.startswith(('uni', 'use')) else 'a'} {word}"


class Table:
    """Entities that are equally likely, and where to find them by their words."""

    def __init__(self, entities: list[Entity]):
        assert entities and len(set(entities)) == len(entities), entities
        self.entities, self.members = entities, frozenset(entities)
        self._by_words: dict[tuple[str, bool], Surfaces] = {}

    def by_words(self, form: str, capital: bool) -> "Surfaces":
        if (form, capital) not in self._by_words:
            self._by_words[form, capital] = Surfaces([(entity.form(form, capital), entity) for entity in self.entities])
        return self._by_words[form, capital]


class Surfaces:
    """Finds which of many strings start at a position: one dictionary look-up for each length that occurs."""

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
    """Drawn from tables[the value of `given`], or from tables[None]; never equal to a value of its `rivals`."""

    def __init__(self, name: str, index: int, table: str, given: "Variable | None"):
        self.name, self.index, self.table, self.given = name, index, table, given
        self.rivals: list[int] = []


class Reader:
    """A text being read. From position `lenient_from` on, wrong facts are let through and noted in env[FAULT]."""

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
    """Alternatives that are all plain text: a Choice with a quick look-up."""

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
    """A form of a variable's value, which is drawn here if it is not known yet."""

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
    """States (position, env, log probability so far) after reading `node` from each of the states."""
    if len(states) == 1:
        position, env, cost = states[0]
        return [(end, after, cost + more) for end, after, more in node.match(reader, position, env)]
    return [(end, after, cost + more) for at, env, cost in states for end, after, more in node.match(reader, at, env)]


class Guard:
    """<variable.tag>, <variable> (is known), and their opposites with !"""

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
        """The weights, 0 where a guard does not hold."""
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


class World:
    """Tables of entities, named lists of words, variables; compiles templates that use them.

    tables      name -> {None or the entity it depends on: Table}
    variables   name -> (name of its table, name of the variable it depends on or None); a variable that is not listed, such as
                `food2`, draws from the table of its name without the digits
    facts       domain -> the kind of fact that breaks with it: who, what, where, why
    shared      domains in which several variables may have the same value
    """

    def __init__(self, tables, variables, words: dict[str, str], facts: dict[str, str], shared: set[str]):
        self.tables, self.declared, self.words, self.facts, self.shared = tables, variables, words, facts, shared
        self.variables: dict[str, Variable] = {}
        self._domain_tables: dict[str, Table] = {}
        self._classes: dict[int, list] = {}
        self.asked_tags: set[str] = set()
        self._homes: dict[Entity, tuple[int, ...]] = {}
        self._named: dict[str, object] = {}

    def variable(self, name: str) -> Variable:
        if name not in self.variables:
            table, given = self.declared.get(name, (re.sub(r"\d+$", "", name), None))
            if table not in self.tables:
                raise ValueError(f"no variable is called {name!r}, and no table {table!r}")
            new = Variable(name, 0, table, self.variable(given) if given else None)
            new.index = len(self.variables) + FAULT + 1
            self.variables[name] = new
            domain = self.domain_of(table)
            for other in self.variables.values() if domain not in self.shared else ():
                if other is not new and self.domain_of(other.table) == domain:
                    other.rivals.append(new.index)
                    new.rivals.append(other.index)
        return self.variables[name]

    def empty_env(self) -> tuple:
        return (None,) * (len(self.variables) + FAULT + 1)

    def domain_of(self, table: str) -> str:
        return next(iter(self.tables[table].values())).entities[0].domain

    def domain_table(self, table: str) -> Table:
        """All entities of the domain of a table."""
        domain = self.domain_of(table)
        if domain not in self._domain_tables:
            several = [part for name, parts in self.tables.items() if self.domain_of(name) == domain for part in parts.values()]
            self._domain_tables[domain] = Table(list(dict.fromkeys(entity for part in several for entity in part.entities)))
        return self._domain_tables[domain]

    def classes(self, table: Table) -> list[tuple[Entity, int]]:
        """The members of a table that no later choice can tell apart, as (one of them, how many)."""
        if id(table) not in self._classes:
            groups = defaultdict(list)
            for entity in table.entities:
                keyed = tuple(self.outlook(parts[entity]) if entity in parts else None for parts in self.tables.values())
                groups[keyed, self.homes(entity), entity.tags & self.asked_tags].append(entity)
            self._classes[id(table)] = [(group[0], len(group)) for group in groups.values()]
        return self._classes[id(table)]

    def homes(self, entity: Entity) -> tuple[int, ...]:
        """The tables that an entity is in, by id."""
        if entity not in self._homes:
            tables = (part for parts in self.tables.values() for part in parts.values())
            self._homes[entity] = tuple(sorted({id(part) for part in tables if entity in part.members}))
        return self._homes[entity]

    def outlook(self, table: Table) -> tuple:
        """Equal for tables that lead to equal choices.

        All that counts in a table is its length if its members are in no other table, decide nothing, and meet no rival from
        another table because all variables of their domain depend on the same variable.
        """
        first = table.entities[0]
        givens = {variable.given for variable in self.variables.values() if self.domain_of(variable.table) == first.domain}
        keys = {key for parts in self.tables.values() for key in parts}
        alone = all(self.homes(one) == (id(table),) and one not in keys and not one.tags & self.asked_tags for one in table.entities)
        return ("length", len(table.entities)) if alone and len(givens) == 1 else ("table", id(table))

    def compile(self, source: str, before: str = "", capital: bool = False):
        """A node with sample, match and entropy; `before` is put before each alternative that is not empty."""
        node, end = self._alternatives(source, 0, before, capital)
        if end != len(source):
            raise ValueError(f"a bracket closes that was never opened, at {source[end:]!r} in {source!r}")
        return node

    def _alternatives(self, source: str, at: int, before: str, capital: bool):
        alternatives, weights, guards, spans = [], [], [], []
        while True:
            weight = re.compile(r"(\d+)\*").match(source, at)
            weights.append(int(weight[1]) if weight else 1)
            at = weight.end() if weight else at
            guards.append([])
            while found := re.compile(r"<(!?)(\w+)(?:\.(\w+))?>").match(source, at):
                variable = self.variable(found[2])
                fact = self.facts[self.domain_of(variable.table)]
                self.asked_tags.add(found[3] or "")
                guards[-1].append(Guard(variable, found[3] or "", bool(found[1]), fact))
                at = found.end()
            start = at
            parts, at = self._parts(source, at, before, capital)
            spans.append((source[start:at], *((guard.index, guard.tag, guard.negated) for guard in guards[-1])))
            alternatives.append(parts[0] if len(parts) == 1 else Sequence(parts))
            if source[at : at + 1] != "|":
                break
            at += 1
        if len(set(spans)) < len(spans):
            raise ValueError(f"the same alternative twice, in {source!r}")
        if len(alternatives) == 1 and not guards[0]:
            return alternatives[0], at
        plain = [isinstance(part, Literal) or (isinstance(part, Sequence) and not part.parts) for part in alternatives]
        if all(plain) and not any(guards):
            return Words([getattr(part, "text", "") for part in alternatives], weights), at
        return Choice(alternatives, weights, guards), at

    def _parts(self, source: str, at: int, before: str, capital: bool):
        parts, text = [], before if source[at : at + 1] not in ("", "|", "]") else ""
        while at < len(source) and source[at] not in "|]":
            if source[at] not in "[{@":
                text += source[at].upper() if capital else source[at]
                at, capital = at + 1, False
                continue
            if text:
                parts.append(Literal(text))
                text = ""
            if source[at] == "[":
                node, at = self._alternatives(source, at + 1, "", capital)
                if source[at : at + 1] != "]":
                    raise ValueError(f"a bracket is not closed in {source!r}")
                at += 1
            else:
                found = re.compile(r"\{(\w+)(?:~(\w+))?(?:\.(\w+))?\}|@(\w+?)(\.a\b|(?!\w))").match(source, at)
                if not found:
                    raise ValueError(f"cannot read {source[at : at + 30]!r} in {source!r}")
                node = self._reference(found, capital) if found[1] else self._list(found, capital)
                at = found.end()
            parts.append(node)
            capital = False
        return ([*parts, Literal(text)] if text else parts), at

    def _reference(self, found, capital: bool) -> Reference:
        variable = self.variable(found[1][0].lower() + found[1][1:])
        return Reference(self, variable, found[2] or variable.table, found[3] or "", capital or found[1][0].isupper())

    def _list(self, found, capital: bool):
        name = found[4][0].lower() + found[4][1:]
        capital = capital or found[4][0].isupper()
        key = (name, found[5], capital)
        if key not in self._named:
            if name not in self.words:
                raise ValueError(f"no list of words is called {name!r}. There are: {', '.join(self.words)}")
            source = self.words[name]
            if found[5]:
                source = "|".join(with_article(word) for word in source.split("|"))
            self._named[key] = self.compile(source, capital=capital)
        return self._named[key]
