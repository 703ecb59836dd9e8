"""The look of all HTML pages: base.jinja, which the traces, diffs and comparisons fill.

A page loads nothing from elsewhere, follows the reader's light or dark mode and fits a phone.
"""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parents[1]), autoescape=True, undefined=StrictUndefined,
                        trim_blocks=True, lstrip_blocks=True)  # fmt: skip


def render(template: str, **values) -> str:
    """Fill a template, named by its path in the repository; texts are escaped."""
    return TEMPLATES.get_template(template).render(values)
