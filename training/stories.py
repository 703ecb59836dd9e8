"""Stories as people read them: wrapped at words, whole or with "…", each under its heading. No torch."""

import re
import shutil
import textwrap
from dataclasses import dataclass

COLUMNS = 88  # of a line in a wide terminal
MARKDOWN = re.compile(r"[\\`*_<>\[\]#|~$&]|^[-+=]")  # what would not be shown as it is


@dataclass(frozen=True)
class Stories:
    """Stories by heading: quotes in a notebook and in Markdown, indented paragraphs where they are printed.

    >>> print(Stories({"Step 100": "Once upon a time, there was a"}))
    Step 100
    <BLANKLINE>
      Once upon a time, there was a …
    """

    texts: dict[str, str]
    longest: int | None = None  # characters of a story; what is longer is cut at a word

    def __str__(self) -> str:
        columns = min(COLUMNS, shutil.get_terminal_size().columns)
        wrap = textwrap.TextWrapper(columns, initial_indent="  ", subsequent_indent="  ", break_long_words=False).fill
        return "\n\n".join("\n\n".join([heading, *map(wrap, lines)]) for heading, lines in self.paragraphs().items())

    __repr__ = __str__

    def as_markdown(self) -> str:
        """A bold heading and a block quote for each story."""
        quotes = []
        for heading, lines in self.paragraphs().items():
            heading, *lines = (MARKDOWN.sub(r"\\\g<0>", line) for line in (heading, *lines))
            quotes.append(f"**{heading}**\n\n> " + "\n>\n> ".join(lines))
        return "\n\n".join(quotes)

    def _repr_markdown_(self) -> str:  # for notebooks
        return self.as_markdown()

    def paragraphs(self) -> dict[str, list[str]]:
        texts = {heading: shortened(text, self.longest) for heading, text in self.texts.items()}
        return {heading: [line.strip() for line in text.split("\n") if line.strip()] for heading, text in texts.items()}


def shortened(story: str, longest: int | None = None) -> str:
    """Cut a story at a word, if it is too long; add "…" if it does not end with the end of a sentence.

    >>> shortened("Tom had a cat. The cat sat."), shortened("Tom had a cat. The cat sat.", longest=12)
    ('Tom had a cat. The cat sat.', 'Tom had a …')
    """
    story = story.strip()
    if longest is not None and len(story) > longest:
        cut = re.match(rf"(?s).{{1,{longest}}}(?=\s)", story)
        return (cut[0] if cut else story[:longest]).rstrip() + " …"
    return story if re.search(r"""[.!?…]["'”’)]*$""", story) else f"{story} …".lstrip()


def one_line(heading: str, story: str) -> str:
    """A heading and the start of a story, in one line of the terminal."""
    return shortened(f"{heading}: {' '.join(story.split())}", shutil.get_terminal_size().columns - 3)
