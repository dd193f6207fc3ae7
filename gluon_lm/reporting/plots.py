"""The curves of a report as PNG files, drawn by matplotlib."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from ..files import atomic_write
from .curves import COLOURS, Panel, colour_of, dashes_of, tick_label

_INCHES, _DOTS_PER_INCH = (8.0, 4.5), 150


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def write_plots(panels: Sequence[Panel], names: Sequence[str], stem: Path) -> Iterator[Path]:
    """Write ``<stem>-<key>.png`` for each panel.

    Parameters
    ----------
    panels : sequence of Panel
    names : sequence of str
        Of the runs.
    stem : Path

    Yields
    ------
    Path
        Each file, once it is written.
    """
    # Not pyplot: it would choose a windowing backend, and keeps every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for panel in panels:
        figure = Figure(figsize=_INCHES, dpi=_DOTS_PER_INCH, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_yscale("log" if panel.is_log else "linear")
        axes.set_ylim(*panel.range)  # before anything is drawn: when it chooses a range itself, matplotlib may overflow
        axes.set_xlim(0, panel.last_step)
        for curve in panel.curves:
            colour = COLOURS[colour_of(curve.run)]
            style = (0, dashes_of(curve.run) or None)
            if curve.is_smoothed:
                axes.plot(curve.steps, curve.values, color=colour, alpha=0.25, linewidth=0.8)
            marker = "o" if len(curve.steps) == 1 else None
            # A name that begins with _ would be left out of the legend, and $ would begin a formula.
            label = " " * names[curve.run].startswith("_") + names[curve.run].replace("$", r"\$")
            axes.plot(curve.steps, curve.smooth, color=colour, linestyle=style, label=label, marker=marker)
        for axis, ticks in ((axes.xaxis, None), (axes.yaxis, panel.ticks())):
            if ticks is not None:
                axis.set_major_locator(FixedLocator(ticks))
                axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _: tick_label(value)))
        axes.set_title(panel.title, loc="left", fontweight="bold")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        path = stem.with_name(f"{stem.name}-{panel.key}.png")
        with atomic_write(path) as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)  # for each letter of a run's name
            figure.savefig(file, format="png")
        yield path
