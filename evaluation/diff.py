"""Compare two architectures: their configs, modules, weights and costs.

    python -m evaluation diff 1m gemma2_like                     # as text; presets and runs, by name
    python -m evaluation diff 1m gemma2_like --html diff.html    # as a page
    python -m evaluation diff 1m "Norm->MyAttn->+->Norm->MLP->+" --plugins my_blocks    # a layer string, at the size of 1m
    diff("1m", ModelConfig(num_layers=4))                        # in a notebook; also configs
"""

from config import ModelConfig
from evaluation.alignment import Side
from evaluation.diff_view import DiffView, as_page
from metrics.cost import config_of, cost_of, sizes_for
from runs.tables import show


def diff(
    left: str | ModelConfig, right: str | ModelConfig, T: int | None = None, plugins: tuple[str, ...] = ()
) -> DiffView:
    """Compare two architectures part by part.

    Parameters
    ----------
    left, right : str or ModelConfig
        A preset, a run in trained_models/, a config, or a layer string, which takes its sizes from the other.
    T : int, optional
        Tokens that the models read, for FLOPs and cache; by default the context of each.
    plugins : tuple of str, optional
        Modules whose blocks the layer strings name.

    Returns
    -------
    DiffView
        Differences of config, parts and totals; `print` shows them as text, a notebook as tables.

    Raises
    ------
    ValueError
        For a name that is neither a preset nor a run, or a model that cannot be built.

    Examples
    --------
    >>> diff("1m", "2m").config_rows[0]
    ('dim', '128', '192')
    """
    titles = [spec if isinstance(spec, str) else "a config" for spec in (left, right)]
    if titles[0] == titles[1]:
        titles = [f"{title} ({side})" for title, side in zip(titles, ("left", "right"), strict=True)]
    sides = zip(titles, (left, right), strict=True)
    options = {"plugins": plugins, "sizes": sizes_for((left, right))}
    return DiffView(*(Side(title, *config_of(spec, **options), cost_of(spec, T, **options)) for title, spec in sides))


def main(arguments):
    """Run the command `diff`."""
    compared = diff(arguments.left, arguments.right, plugins=arguments.plugins)
    if arguments.html is None:
        show(compared)
    else:
        arguments.html.write_text(as_page(compared), encoding="utf-8")
        print(f"the differences are in {arguments.html}")
