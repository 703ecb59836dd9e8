"""The look of all plots: the style sheet plots.mplstyle, one legend outside the axes, and alt texts.

    @in_style
    def plot_it(...): ...        # draws with plots.mplstyle

    show_figure(plot_it(...))    # in a notebook, with an alt text
"""

import io
from base64 import b64encode
from functools import wraps

import numpy as np

STYLE = "metrics.plots"  # plots.mplstyle, as matplotlib finds it


def in_style(function):
    """Make a function draw in the style of plots.mplstyle.

    Matplotlib looks up colours such as "C1" when a figure is shown, which is after the function has returned: draw with
    `line_colour(1)`, or leave the colour to the axes.
    """

    @wraps(function)
    def styled(*args, **kwargs):
        import matplotlib.pyplot as plt

        with plt.style.context(STYLE):
            return function(*args, **kwargs)

    return styled


def line_colour(number: int) -> str:
    """The colour of a line by its number, in the style that is in use."""
    from matplotlib.colors import to_hex

    return to_hex(f"C{number}")


def add_legend(*all_axes, title: str | None = None):
    """Put one legend for some axes of a figure below it, in place of the one that is there."""
    figure = all_axes[0].figure
    for legend in list(figure.legends):
        legend.remove()
    entries = {label: handle for axes in all_axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if entries:
        letters = 72 * figure.get_figwidth() / 4.5  # in a line of 8 points
        columns = max(1, int(letters / (max(map(len, entries)) + 9)))
        columns = min(columns, len(entries))
        figure.legend(entries.values(), entries.keys(), title=title, loc="outside lower center", ncols=columns)


def alt_text(figure) -> str:
    """Describe a figure in words: its axes, and where each labelled line starts and ends."""
    from matplotlib.container import ErrorbarContainer
    from matplotlib.lines import Line2D

    labels_by_plot: dict[tuple[str, str], list[str]] = {}  # of the x axes that show the same
    for axes in figure.axes:
        lines = []
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            line = handle[0] if isinstance(handle, ErrorbarContainer) else handle
            ends = np.take(line.get_ydata(), [0, -1]) if isinstance(line, Line2D) and len(line.get_ydata()) else []
            ends = dict.fromkeys(f"{end:.3g}" for end in ends)
            lines.append(f"{label} from {' to '.join(ends)}" if len(ends) == 2 else label)
        title = f"{axes.get_title()}: " if axes.get_title() else ""
        labels_by_plot.setdefault((title + axes.get_ylabel(), "; ".join(lines)), []).append(axes.get_xlabel())
    return ". ".join(f"{what} by {', '.join(xs)}: {lines}" for (what, lines), xs in labels_by_plot.items())


def with_palette(png: io.BytesIO) -> bytes:
    """Reduce a picture to 128 colours, which makes its file a third as large."""
    from PIL import Image

    small = io.BytesIO()
    Image.open(png).convert("RGB").quantize(128).save(small, format="png", optimize=True)
    return small.getvalue()


def show_figure(figure, **options):
    """Display a figure in a notebook at its size in print; its alt text is also what viewers without pictures show.

    options: of IPython's display, such as display_id.
    """
    import matplotlib.pyplot as plt
    from IPython.display import display

    plt.close(figure)  # otherwise a notebook shows it a second time
    png, alt = io.BytesIO(), alt_text(figure)
    figure.savefig(png, format="png")
    width = round(96 * figure.get_figwidth())  # CSS pixels
    data = {"image/png": b64encode(with_palette(png)).decode(), "text/plain": alt}
    display(data, metadata={"image/png": {"alt": alt, "width": width}}, raw=True, **options)
