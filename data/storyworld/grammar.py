"""The template language of the story world, and its compiler, World.

The template language, by example:
    The [big|tiny] {kind}           one of the alternatives, all equally likely; `3*big` is three times as likely
    [very |]happy                   an empty alternative makes a word optional
    {hero.his}, {Hero}              a form of a variable's value; a capital letter capitalises it
    {kind~animal.a}                 if `kind` is not drawn yet, draw it from the table `animal`
    @weather, @Weather, @weather.a  a named list of alternatives; capitalised; with the article a or an
    [<kind.child>ran|<!pet>flew]    guards: allowed only if kind has the tag child; if pet is not drawn yet

Templates compile to the nodes of nodes.py.
"""

import re
from collections import defaultdict
from dataclasses import dataclass

from data.storyworld.nodes import Choice, Entity, Guard, Literal, Reference, Sequence, Table, Variable, Words, with_article


@dataclass(frozen=True)
class Limits:
    """How much of everything a world has: the first of it, which are the simplest. None is all."""

    plots: int | None = None
    entities: int | None = None  # of a table
    words: int | None = None  # alternatives of a choice between plain words
    choices: int | None = None  # alternatives of any other choice, besides those with a guard


class World:
    """Compiler of templates, with their tables of entities, named lists of words, and variables.

    tables      name -> {None or the entity it depends on: Table}
    variables   name -> (table name, name of the variable it depends on or None); unlisted variables, such as `food2`, draw from
                the table of their name without digits
    facts       domain -> the kind of error that a wrong value is: who, what, where, why
    shared      domains in which several variables may have the same value
    """

    def __init__(self, tables, variables, words: dict[str, str], facts: dict[str, str], shared: set[str],
                 limits: Limits = Limits()):  # fmt: skip
        self.tables, self.declared, self.words, self.facts, self.shared, self.limits = tables, variables, words, facts, shared, limits
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
            new.index = len(self.variables) + 1  # env[0] is for faults
            self.variables[name] = new
            domain = self.domain_of(table)
            for other in self.variables.values() if domain not in self.shared else ():
                if other is not new and self.domain_of(other.table) == domain:
                    other.rivals.append(new.index)
                    new.rivals.append(other.index)
        return self.variables[name]

    def empty_env(self) -> tuple:
        return (None,) * (len(self.variables) + 1)

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
        """Equivalence classes of a table's entities with respect to later choices, as (representative, size)."""
        if id(table) not in self._classes:
            groups = defaultdict(list)
            for entity in table.entities:
                keyed = tuple(self.outlook(parts[entity]) if entity in parts else None for parts in self.tables.values())
                groups[keyed, self.homes(entity), entity.tags & self.asked_tags].append(entity)
            self._classes[id(table)] = [(group[0], len(group)) for group in groups.values()]
        return self._classes[id(table)]

    def homes(self, entity: Entity) -> tuple[int, ...]:
        """Ids of the tables that contain an entity."""
        if entity not in self._homes:
            tables = (part for parts in self.tables.values() for part in parts.values())
            self._homes[entity] = tuple(sorted({id(part) for part in tables if entity in part.members}))
        return self._homes[entity]

    def outlook(self, table: Table) -> tuple:
        """A key that is equal for tables with equivalent choices.

        Only a table's length matters if no other table has its entities, no guard or table depends on them, and no rival draws
        from another table, as all variables of their domain depend on the same variable.
        """
        first = table.entities[0]
        givens = {variable.given for variable in self.variables.values() if self.domain_of(variable.table) == first.domain}
        keys = {key for parts in self.tables.values() for key in parts}
        alone = all(self.homes(one) == (id(table),) and one not in keys and not one.tags & self.asked_tags for one in table.entities)
        return ("length", len(table.entities)) if alone and len(givens) == 1 else ("table", id(table))

    def compile(self, source: str, before: str = "", capital: bool = False):
        """Compile a template to a node; `before` is prepended to each nonempty alternative."""
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
        plain = all(isinstance(part, Literal) or (isinstance(part, Sequence) and not part.parts) for part in alternatives)
        plain = plain and not any(guards)
        unguarded = [index for index in range(len(guards)) if not guards[index]]
        likeliest = sorted(unguarded, key=lambda index: -weights[index])[: self.limits.words if plain else self.limits.choices]
        remaining = [index for index in range(len(guards)) if guards[index] or index in likeliest]
        alternatives, weights, guards = ([items[index] for index in remaining] for items in (alternatives, weights, guards))
        if len(alternatives) == 1 and not guards[0]:
            return alternatives[0], at
        if plain:
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
