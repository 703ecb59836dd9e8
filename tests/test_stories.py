"""Promises of stories.py: a story reads like one in a notebook, on a web page and in a terminal."""

import pytest

from training.stories import Stories, one_line, shortened

STORY = "Tom had a cat. It was red.\n\n\nOne day the cat ran away. Tom was sad."
LINES = STORY.replace("\n\n\n", "\n").split("\n")


def test_markdown_quotes_each_story_under_its_heading():
    expected = f"**A**\n\n> {LINES[0]}\n>\n> {LINES[1]}\n\n**B**\n\n> The end."
    assert Stories({"A": STORY, "B": "The end."}).as_markdown() == expected


def test_markdown_shows_marks_as_they_are():
    assert Stories({"a_b": "- <b>*hi* $1$"}).as_markdown() == r"**a\_b**" + "\n\n" + r"> \- \<b\>\*hi\* \$1\$ …"


@pytest.mark.parametrize("columns, width", [(30, 30), (200, 88)])
def test_a_terminal_wraps_at_words(columns, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    long = f"{LINES[1]} " * 9
    printed = str(Stories({"A": long, "B": STORY}))
    assert max(map(len, printed.splitlines())) in range(width - 12, width + 1)
    assert " ".join(printed.split()) == " ".join(f"A {long} B {STORY}".split())


def test_what_is_cut_says_so():
    assert shortened("Tom had a") == "Tom had a …" and shortened('"Oh!"') == '"Oh!"' and shortened("") == "…"
    assert Stories({"A": STORY}, longest=12).as_markdown() == "**A**\n\n> Tom had a …"


def test_one_line_fits_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert one_line("step 50", STORY) == "step 50: Tom had a cat. It was red. …"
