"""A report as one HTML page that loads nothing from the network. All text from users is escaped."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..config import SECTIONS, Config, get, recipe_names, resolve, show
from ..history import RunHistory, duration
from ..metrics import finite_or_none, perplexity
from .curves import COLOURS, DARK_COLOURS, Curve, Panel, brief, colour_of, dashes_of, linear_ticks, thinned, tick_label

_SIDE = 1000  # of a plot's coordinates, which are stretched to the available size
_EMPTY = "–"


@dataclass(frozen=True)
class GeneratedTexts:
    """Texts that a run's best checkpoint wrote.

    Attributes
    ----------
    texts : list of str
    how : str
        By which checkpoint, and with which seed; or why there are none.
    """

    texts: list[str]
    how: str


def render_page(
    runs: Sequence[RunHistory], names: Sequence[str], panels: Sequence[Panel], generated: Sequence[GeneratedTexts] = ()
) -> str:
    """The whole page.

    Parameters
    ----------
    runs : sequence of RunHistory
    names : sequence of str
        The name of each run, all different.
    panels : sequence of Panel
    generated : sequence of GeneratedTexts, optional
        One for each run.
    """
    title = f"Report on {names[0]}" if len(runs) == 1 else f"Report on {len(runs)} runs"
    sections = {
        "Results": _results(runs, names),
        "Curves": _curves(panels, names),
        "Texts": _texts(names, generated),
        "Configuration": _configuration(runs, names),
        "Checkpoints": _checkpoints(runs, names),
    }
    sections = {heading: content for heading, content in sections.items() if content}
    values = {
        "title": escape(title),
        "subtitle": escape(", ".join(dict.fromkeys(f"{run.corpus}: {run.config.model.summary}" for run in runs))),
        "colours": _colours(),
        "navigation": "".join(f'<a href="#{name.lower()}">{name}</a>' for name in sections),
        "sections": "\n".join(
            f'<section aria-labelledby="{name.lower()}">\n<h2 id="{name.lower()}">{name}</h2>\n{content}\n</section>'
            for name, content in sections.items()
        ),
        "footer": f"Made by gluon_lm {__version__} on {time.strftime('%Y-%m-%d %H:%M')}.",
    }
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found.group(1)], template)


def _colours() -> str:
    light = "".join(f" --run-{i}: {colour};" for i, colour in enumerate(COLOURS))
    dark = "".join(f" --run-{i}: {colour};" for i, colour in enumerate(DARK_COLOURS))
    return f":root {{{light} }}\n@media (prefers-color-scheme: dark) {{ :root {{{dark} }} }}"


def _colour(run: int) -> str:
    return f"var(--run-{colour_of(run)})"


def _stroke(run: int) -> str:
    dashes = " ".join(map(str, dashes_of(run)))
    return f'stroke="{_colour(run)}"' + (f' stroke-dasharray="{dashes}"' if dashes else "")


def _swatch(run: int) -> str:
    line = f'<line x1="0" y1="6" x2="36" y2="6" {_stroke(run)}/>'
    return f'<svg class="swatch" viewBox="0 0 36 12" aria-hidden="true">{line}</svg>'


# ---------------------------------------------------------------- tables


@dataclass(frozen=True)
class _Cell:
    """A table cell's content, as HTML; numbers are right-aligned."""

    html: str
    is_number: bool = False


def _text(value: Any) -> _Cell:
    return _Cell(_EMPTY if value is None else escape(str(value)))


def _number(value: float | None, form: str = ",", unit: str = "") -> _Cell:
    if value is None:
        return _Cell(_EMPTY, is_number=True)
    shown = brief(value, form) if isinstance(value, float) else f"{value:{form}}"
    return _Cell(escape(f"{shown}{unit}"), is_number=True)


def _size(num_bytes: int | None, unit: str = " MB") -> _Cell:
    scaled = 0.0 if num_bytes is None else num_bytes / 1e6
    return _number(None if num_bytes is None else scaled, ",.0f" if scaled >= 100 else ",.2f", unit)


def _table(caption: str | None, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[_Cell]]]) -> str:
    """A table with a heading, given as HTML, in each row; on a narrow screen each row becomes a list."""
    first = rows[0][1]
    numbers = [False, *(cell.is_number for cell in first)]
    heads = "".join(
        f'<th role="columnheader" scope="col"{_aligned(is_number)}>{escape(name)}</th>'
        for name, is_number in zip(columns, numbers)
    )
    body = []
    for heading, cells in rows:
        row = "".join(
            f'<td role="cell" data-label="{escape(name)}"{_aligned(cell.is_number)}><span>{cell.html}</span></td>'
            for name, cell in zip(columns[1:], cells)
        )
        body.append(f'<tr role="row"><th role="rowheader" scope="row">{heading}</th>{row}</tr>')
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    label = escape(caption or columns[0])
    return (
        f'<div class="sheet scroller" tabindex="0" role="region" aria-label="{label}"><table role="table">{told}'
        f'<thead role="rowgroup"><tr role="row">{heads}</tr></thead>\n<tbody role="rowgroup">\n'
        + "\n".join(body)
        + "\n</tbody></table></div>"
    )


def _aligned(is_number: bool) -> str:
    return ' class="number"' if is_number else ""


def _results(runs: Sequence[RunHistory], names: Sequence[str]) -> str:
    columns = (
        "Run",
        "State",
        "Model",
        "Corpus",
        "Vocabulary",
        "Parameters",
        "Steps",
        "Epochs",
        "Validation perplexity",
        "Test perplexity",
        "Tokens per second",
        "Training time",
        "Most memory",
    )
    summaries = [run.summary() for run in runs]
    evaluated = [run for run, summary in zip(runs, summaries) if summary["best_perplexity"] is not None]
    # The start of each stream of the text is harder to predict, so their number matters.
    are_alike = len({(run.corpus, run.vocab_size, run.config.training.eval_batch_size) for run in evaluated}) <= 1
    are_comparable = are_alike and len({run.text for run in evaluated if run.text is not None}) <= 1
    leads = {}
    for key in ("best_perplexity", "test_perplexity"):
        known = [summary[key] for summary in summaries if summary[key] is not None]
        leads[key] = min(known) if len(known) > 1 and are_comparable else None
    rows = []
    for run, name, summary in zip(runs, names, summaries):
        seconds, on_gpu = run.training_seconds, run.peak_memory("device_memory")
        cells = [
            _state(run),
            _text(run.config.model.summary),
            _text(run.corpus),
            _number(run.vocab_size),
            _number(run.num_parameters),
            _number(run.steps),
            _Cell(f"{run.epoch} of {run.config.training.epochs}", is_number=True),
            _perplexity(summary, "best_perplexity", leads),
            _perplexity(summary, "test_perplexity", leads),
            _number(run.tokens_per_second, ",.0f"),
            _Cell(_EMPTY if seconds is None else duration(seconds), is_number=True),
            _size(on_gpu, " MB on the GPU") if on_gpu else _size(run.peak_memory()),
        ]
        rows.append((escape(name), cells))
    note = "Perplexity is that of the best checkpoint; tokens per second are the median over the log."
    if not are_comparable:
        note += " Perplexities over different texts, vocabularies or --eval-batch-size are not comparable."
    return f'{_table(None, columns, rows)}\n<p class="quiet">{note}</p>'


def _state(run: RunHistory) -> _Cell:
    reason = f" ({run.reason})" if run.reason else ""
    return _Cell(f'<span class="state {run.state}">{run.state}</span>{escape(reason)}')


def _perplexity(summary: Mapping[str, Any], key: str, leads: Mapping[str, float | None]) -> _Cell:
    cell = _number(summary[key], ",.2f")
    is_lead = summary[key] is not None and summary[key] == leads[key]
    return dataclasses.replace(cell, html=f'<strong class="lead">{cell.html}</strong>') if is_lead else cell


def _checkpoints(runs: Sequence[RunHistory], names: Sequence[str]) -> str:
    tables = []
    for run, name in zip(runs, names):
        rows = []
        for saved in run.checkpoints:
            newest = run.checkpoints[-1]
            marks = ["best"] * (saved.step == newest.best_step) + ["latest"] * (saved is newest)
            cells = [
                _number(saved.epoch),
                _number(None if saved.loss is None else finite_or_none(perplexity(saved.loss)), ",.2f"),
                _size(saved.num_bytes),
                _text(", ".join(marks) or None),
            ]
            rows.append((f"step {saved.step:,}", cells))
        if rows:
            columns = ("Checkpoint", "Epochs done", "Validation perplexity", "Size", "Which is")
            tables.append(_table(name, columns, rows))
    return f'<div class="tables">{"".join(tables)}</div>' if tables else ""


def _configuration(runs: Sequence[RunHistory], names: Sequence[str]) -> str:
    fields = [field.name for section in SECTIONS.values() for field in dataclasses.fields(section)]
    configs: list[Config] = [run.config for run in runs]
    if len(runs) > 1:
        differing = [name for name in fields if len({show(get(config, name)) for config in configs}) > 1]
        caption, columns = "What differs between the runs", ("Setting", *names)
    else:
        named = resolve(config_file=runs[0].folder.config, default_recipe=None).recipe
        recipe = named if named in recipe_names() else None  # a run may come from a version with other recipes
        base = resolve(recipe=recipe, default_recipe=None).config
        configs = [base, *configs]
        differing = [name for name in fields if get(base, name) != get(configs[1], name)]
        ground = f"recipe {recipe}" if recipe else "the defaults"
        caption, columns = f"What differs from {ground}", ("Setting", ground, names[0])
    rows = [(escape(name), [_text(show(get(config, name))) for config in configs]) for name in differing]
    told = _table(caption, columns, rows) if rows else f"<p>{escape(caption)}: nothing.</p>"
    whole = "".join(
        f'<details class="sheet"><summary>All of {escape(name)}</summary>'
        f'<pre tabindex="0">{escape(run.folder.config.read_text(encoding="utf-8"))}</pre></details>'
        for run, name in zip(runs, names)
    )
    return told + whole


# ---------------------------------------------------------------- curves


def _curves(panels: Sequence[Panel], names: Sequence[str]) -> str:
    if not panels:
        return "<p>Nothing is logged yet.</p>"
    shown = sorted({curve.run for panel in panels for curve in panel.curves})
    boxes = "".join(
        f'<label><input type="checkbox" autocomplete="off" value="{run}" checked{"" if run in shown else " disabled"}>'
        f"{_swatch(run)}"
        f"<span>{escape(name)}</span></label>"
        for run, name in enumerate(names)
    )
    legend = f'<fieldset class="legend"><legend>Runs that are shown</legend>{boxes}</fieldset>'
    figures = "\n".join(_figure(panel, names) for panel in panels)
    return f'{legend}\n<p class="quiet">Everything over the steps of training.</p>\n<div class="charts">{figures}</div>'


def _figure(panel: Panel, names: Sequence[str]) -> str:
    marks, lines, dots = [], [], []
    for tick in panel.ticks():
        (height,) = panel.height(np.array([tick]))
        lines.append(f'<line class="grid" x1="0" x2="{_SIDE}" y1="{_y(height)}" y2="{_y(height)}"/>')
        marks.append(f'<span class="y tick" style="bottom: {100 * height:.2f}%">{tick_label(tick)}</span>')
    for tick in linear_ticks(0, panel.last_step):
        place = tick / panel.last_step
        marks.append(f'<span class="x tick" style="left: {100 * place:.2f}%">{tick_label(tick)}</span>')
    for curve in panel.curves:
        if curve.is_smoothed:
            path = _path(panel, curve.steps, curve.values)
            lines.append(f'<path class="raw" data-run="{curve.run}" stroke="{_colour(curve.run)}" d="{path}"/>')
        path = _path(panel, curve.steps, curve.smooth)
        lines.append(f'<path class="curve" data-run="{curve.run}" {_stroke(curve.run)} d="{path}"/>')
        if panel.best == "lowest" or len(curve.steps) == 1:
            at = int(curve.smooth.argmin())
            left, height = 100 * curve.steps[at] / panel.last_step, 100 * panel.height(curve.smooth)[at]
            style = f"left: {left:.2f}%; bottom: {height:.2f}%; background: {_colour(curve.run)}"
            dots.append(f'<span class="dot" data-run="{curve.run}" style="{style}"></span>')
    told = ". ".join(_describe(panel, curve, names[curve.run]) for curve in panel.curves)
    smoothing = "Bold: smoothed, faint: as logged. " if any(curve.is_smoothed for curve in panel.curves) else ""
    title = escape(panel.title)
    return (
        f'<figure class="sheet"><figcaption><h3>{title}</h3></figcaption>\n'
        f'<div class="plot" tabindex="0" role="group" aria-label="{title}: the arrow keys read values">\n'
        f'<svg viewBox="0 0 {_SIDE} {_SIDE}" preserveAspectRatio="none" role="img" '
        f'aria-label="{title} over steps. {escape(told)}.">\n' + "\n".join(lines) + "</svg>\n"
        f'<div aria-hidden="true">{"".join(marks)}{"".join(dots)}<div class="cursor" hidden></div></div></div>\n'
        f'<output class="reading">{smoothing}{escape(_remarkable(panel, names))}</output>\n'
        f'<script type="application/json">{_data(panel)}</script></figure>'
    )


def _y(height: float) -> str:
    return f"{_SIDE * (1 - height):.1f}"


def _path(panel: Panel, steps: np.ndarray, values: np.ndarray) -> str:
    steps, heights = thinned(steps, panel.height(values))
    points = [f"{_SIDE * step / panel.last_step:.1f} {_y(height)}" for step, height in zip(steps, heights)]
    return "M" + "L".join(points)


def _describe(panel: Panel, curve: Curve, name: str) -> str:
    """A curve in words."""
    first, last = (brief(value, panel.form) for value in (curve.values[0], curve.values[-1]))
    words = f"{name}: from {first} to {last} at step {curve.steps[-1]:,.0f}"
    if panel.best:
        at = curve.values.argmin() if panel.best == "lowest" else curve.values.argmax()
        words += f", {panel.best} {brief(curve.values[at], panel.form)} at step {curve.steps[at]:,.0f}"
    return words


def _remarkable(panel: Panel, names: Sequence[str]) -> str:
    """The text below a plot until a value is read off."""
    if panel.best != "lowest":
        told = [f"{names[curve.run]} {brief(curve.smooth[-1], panel.form)}" for curve in panel.curves]
        return "At the end: " + ", ".join(told)
    told = [
        f"{names[curve.run]} {brief(curve.smooth.min(), panel.form)} at step {curve.steps[curve.smooth.argmin()]:,.0f}"
        for curve in panel.curves
    ]
    return "Lowest: " + ", ".join(told)


def _data(panel: Panel) -> str:
    """The points of a panel as JSON, for reading off values; numbers only."""
    curves = []
    for curve in panel.curves:
        steps, values = thinned(curve.steps, curve.smooth)
        shown = [brief(value, panel.form) for value in values]
        curves.append({"run": curve.run, "steps": [int(step) for step in steps], "values": shown})
    return json.dumps({"last": panel.last_step, "curves": curves}, separators=(",", ":"))


# ---------------------------------------------------------------- texts


def _texts(names: Sequence[str], generated: Sequence[GeneratedTexts]) -> str:
    articles = []
    for name, written in zip(names, generated):
        quotes = "".join(f"<blockquote>{escape(text)}</blockquote>" for text in written.texts)
        head = f'<h3>{escape(name)}</h3><p class="quiet">{escape(written.how)}</p>'
        articles.append(f'<article class="sheet">{head}{quotes}</article>')
    return f'<div class="texts">{"".join(articles)}</div>' if articles else ""
