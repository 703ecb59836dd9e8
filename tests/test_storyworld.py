"""The story world keeps its promises: exact probabilities, a known entropy, and a verdict on any text."""

import math
import os
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from data.sources import open_source
from data.storyworld import world as storyworld
from data.storyworld.grammar import World
from data.storyworld.nodes import Choice, Entity, Literal, Reader, Reference, Sequence, Table, Words

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def told():
    """2,000 stories, each with its score."""
    rng = random.Random(0)
    return [(story, storyworld.score(story.text)) for story in (storyworld.sample(rng) for _ in range(2_000))]


@pytest.fixture(scope="module")
def picnics(told):
    """Stories of one plot whose sentences are easy to break."""
    return [story.text for story, score in told if score.plot == "the picnic"]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def test_sample_and_score_agree(told):
    for story, score in told:
        assert score.error is None, score.error
        assert story.log_prob == pytest.approx(score.log_prob, abs=1e-9)


def test_the_entropy_is_the_mean_code_length():
    """Of the small world: the exact entropy of the large one takes a while."""
    rng = random.Random(0)
    lengths = [-storyworld.sample(rng, "storyworld_small").log_prob for _ in range(5_000)]
    standard_error = statistics.stdev(lengths) / math.sqrt(len(lengths))
    assert abs(statistics.mean(lengths) - storyworld.entropy("storyworld_small")) < 4 * standard_error


def test_the_small_world_is_a_small_part_of_the_large_one(told):
    rng = random.Random(0)
    small = [storyworld.sample(rng, "storyworld_small") for _ in range(300)]
    for story in small:
        assert storyworld.score(story.text, "storyworld_small").log_prob == pytest.approx(story.log_prob, abs=1e-9)
        assert storyworld.score(story.text).log_prob < story.log_prob
    large = [story for story, _ in told[:300]]
    small_words, large_words = (len({word for story in stories for word in words(story.text)}) for stories in (small, large))
    assert small_words < large_words / 2
    assert sum(storyworld.score(story.text, "storyworld_small").error is None for story, _ in told) < 10


def test_code_length_is_the_sum_over_stories(told):
    some = told[:20]
    assert storyworld.code_length([story.text for story, _ in some]) == pytest.approx(-sum(story.log_prob for story, _ in some))
    with pytest.raises(ValueError, match="sentence 1"):
        storyworld.code_length(["The cat sat on the mat."])


def test_stories_have_the_promised_shape(told):
    for story, _ in told:
        assert story.text.isascii()
        assert 60 <= len(story.text.split()) <= 250
        assert not re.search(r"  | \n|\n |[\[\]{}|@<>]|\.\.|\b[Aa] [aeioAEIO]|\b[Aa]n (?!hour)[^aeiou]", story.text), story.text
        assert re.fullmatch(r"[A-Z].*[.!?]\"?", story.text, re.DOTALL)


def test_the_world_is_rich(told):
    assert len({score.plot for _, score in told}) == len(storyworld.program().plots) >= 30
    assert len({word for story, _ in told for word in words(story.text)}) >= 1500
    assert len({story.text for story, _ in told}) > 0.999 * len(told)


def test_every_kind_of_hero_has_plots_and_every_plot_a_hero():
    cast = storyworld.program().cast
    assert all(len(plots) >= 10 for plots in cast.values())
    assert {plot.name for plots in cast.values() for plot in plots} == {plot.name for plot in storyworld.program().plots}


def test_training_and_validation_do_not_share_stories():
    validation = list(storyworld.stories("validation", 300))
    train = list(storyworld.stories("train", 3000))
    assert len(validation) == len(set(validation)) == 300
    assert not set(validation) & set(train)
    assert list(storyworld.stories("train", 10)) == train[:10]
    with pytest.raises(ValueError, match="'test'"):
        next(storyworld.stories("test", 1))


def test_every_process_tells_the_same_stories():
    code = "from data.storyworld import world as s; print(list(s.stories('train', 3)), s.score(next(s.stories('train', 1))))"
    outputs = set()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        outputs.add(done.stdout)
    assert len(outputs) == 1
    assert outputs.pop().startswith(str(list(storyworld.stories("train", 3))))


def broken(text: str, old: str, new: str) -> storyworld.Score:
    """The score of a story in which the last `old` became `new`."""
    at = text.rindex(old)
    score = storyworld.score(text[:at] + new + text[at + len(old) :])
    assert score.log_prob == -math.inf
    assert score.sentence in text[:at] + new + text[at + len(old) :]
    assert new in score.sentence, score
    assert repr(score.sentence) in score.error
    return score


def test_a_wrong_name_is_noticed(picnics):
    for text in picnics[:30]:
        hero = re.search(r"(?:named|called|was) ([A-Z]\w+)", text)[1]
        assert broken(text, f"{hero} ", "Rumpel ").fact in ("grammar", "who")
        known = "Walter" if hero != "Walter" else "Simon"
        assert broken(text, f"{hero} ", f"{known} ").fact == "who"


def test_a_wrong_thing_is_noticed(picnics):
    for text in picnics[:30]:
        kept = re.search(r"I will eat the ([\w ]+)\.|kept the ([\w ]+)\.", text)
        old = kept[0]
        new = old.replace(kept[1] or kept[2], "banana" if "banana" not in old else "mango")
        assert broken(text, old, new).fact == "what"


def test_a_wrong_place_is_noticed(picnics):
    for text in picnics[:30]:
        seen = re.search(r"they could see ([\w -]+)\.|They sat down ([\w -]+)\.", text)
        if seen:
            wrong = "under the tractor" if seen[2] else "the moon rocks"
            assert broken(text, seen[1] or seen[2], wrong).fact == "grammar"
            on_the_farm = "to the farm" in text or "on the farm" in text
            known, known_sight = ("behind a cactus", "the lizards") if on_the_farm else ("behind the tractor", "the windmill")
            assert broken(text, seen[1] or seen[2], known if seen[2] else known_sight).fact == "where"


def test_a_wrong_moral_is_noticed(told):
    morals = [(story.text, re.search(r"learned that (.+?)\.", story.text)) for story, score in told if score.plot == "the seed"]
    found = [(text, moral[1]) for text, moral in morals if moral]
    for text, moral in found[:10]:
        assert broken(text, moral, "two pairs of eyes see more than one").fact == "why"


def test_the_first_sentence_that_breaks_is_named(told):
    for story, _ in told[:50]:
        spans = storyworld.sentence_spans(story.text)
        for index in (0, len(spans) // 2, len(spans) - 1):
            start, end = spans[index]
            salad = "Spoon the quickly of blue seven."
            score = storyworld.score(story.text[:start] + salad + story.text[end:])
            assert (score.index, score.sentence, score.fact) == (index, salad, "grammar")


def test_a_story_that_stops_early_is_not_finished(told):
    for story, _ in told[:50]:
        spans = storyworld.sentence_spans(story.text)
        for text in (story.text[: spans[4][1]], story.text[: spans[6][0] + 4]):
            assert storyworld.score(text).fact == "end", text
        assert storyworld.score(story.text + " The end of all.").error
    assert storyworld.score("").fact == "end"


def test_the_three_walks_agree_with_a_count_by_hand():
    pets = [Entity("pet", name, {"it": it}) for name, it in (("cat", "she"), ("dog", "he"), ("cow", "she"))]
    toys = [Entity("toy", name, {}) for name in ("ball", "bone", "bell")]
    tables = {
        "pet": {None: Table(pets)},
        "toy": {pets[0]: Table(toys[:1]), pets[1]: Table(toys[1:]), pets[2]: Table(toys)},
    }
    world = World(tables, {"toy": ("toy", "pet")}, {"size": "3*big|odd"}, {"pet": "who", "toy": "what"}, set())
    node = world.compile("@Size.a {pet} and [@size.a {toy}|2*{pet2}]. [{Pet.it} ran|].")
    for text, probability in [
        ("A big dog and an odd bone. .", 3 / 4 * 1 / 3 * 1 / 3 * 1 / 4 * 1 / 2 * 1 / 2),
        ("An odd cow and cat. She ran.", 1 / 4 * 1 / 3 * 2 / 3 * 1 / 2 * 1 / 2),
    ]:
        [(end, _, log_prob)] = node.match(Reader(text), 0, world.empty_env())
        assert (end, log_prob) == (len(text), pytest.approx(math.log(probability)))
    assert not node.match(Reader("A big dog and a big ball. ."), 0, world.empty_env())
    assert not node.match(Reader("A big dog and dog. ."), 0, world.empty_env())
    size = -(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4))
    branch = -(1 / 3 * math.log(1 / 3) + 2 / 3 * math.log(2 / 3))
    toy = (0 + math.log(2) + math.log(3)) / 3
    by_hand = size + math.log(3) + branch + 1 / 3 * (size + toy) + 2 / 3 * math.log(2) + math.log(2)
    assert node.entropy({world.empty_env(): 1.0})[1] == pytest.approx(by_hand)


def test_mistakes_in_templates_are_named():
    world = storyworld.program().world
    with pytest.raises(ValueError, match="the same alternative twice"):
        world.compile("[big|small|big]")
    with pytest.raises(ValueError, match="no list of words is called 'wether'"):
        world.compile("a @wether day")
    with pytest.raises(ValueError, match="'elefant'"):
        world.compile("{elefant}")
    with pytest.raises(ValueError, match="not closed"):
        world.compile("[big")


def test_each_form_that_a_plot_asks_for_is_there():
    """Each form that a template asks for exists for all values the variable can have."""

    def visit(node):
        assert isinstance(node, (Literal, Words, Sequence, Choice, Reference))
        if isinstance(node, Reference):
            assert all(text for text in node.anything.by_text)
        for part in getattr(node, "parts", getattr(node, "alternatives", ())):
            visit(part)

    for plot in storyworld.program().plots:
        for slot in plot.slots:
            visit(slot)


def test_the_command_line(tmp_path, capsys):
    storyworld.main(count=2, seed=1)
    assert capsys.readouterr().out.count("bits per byte]") == 2
    file = tmp_path / "stories.txt"
    file.write_text("\n\n".join([*storyworld.stories("train", 2), "Hello there."]), encoding="utf-8")
    storyworld.main(score=file)
    out = capsys.readouterr().out
    assert "story 3: sentence 1" in out and "2 of 3 are stories of this world" in out
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        storyworld.main(score=tmp_path / "nowhere.txt")


def test_the_fingerprint_follows_the_stories_not_the_code(monkeypatch, tmp_path):
    def fingerprint():
        return open_source("storyworld:300").fingerprint(tmp_path)

    before, told = fingerprint(), storyworld.stories
    assert fingerprint() == before
    monkeypatch.setattr(storyworld, "stories", lambda *options: (story.replace("dog", "cat") for story in told(*options)))
    assert fingerprint() != before
