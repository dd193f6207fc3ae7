"""``python -m gluon_lm.report RUN...``: runs as one HTML page that needs no network, and as plots."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .cli import CommandParser, Section, as_command
from .config import DeviceConfig, integer, option, optional, pathname
from .errors import CheckpointError, ConfigError
from .files import atomic_write, in_utf8, output_file
from .history import RunHistory, looks_like_a_run, run_folders
from .logs import LOGGER, RESULT, log_to_terminal
from .progress import counted
from .runtime import prepare_process
from .training.run_folder import find_run

if TYPE_CHECKING:
    from .reporting.page import GeneratedTexts


@dataclasses.dataclass(frozen=True)
class ReportOptions(Section):
    """What is written, and where."""

    output: str | None = option(
        None,
        optional(pathname("FILE")),
        "page to write, with the plots next to it (default: report.html, in the folder of a single run, else here)",
    )
    words: int = option(60, integer(0), "words of each text that the best checkpoints write; 0: none")
    samples: int = option(2, integer(1, 64), "texts of each run")
    seed: int = option(1111, integer(0, 2**31 - 1), "decides the texts")


@as_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = CommandParser(
        "report",
        "Write curves, results, configurations, texts and checkpoints of runs as one HTML page, and plots as PNG.",
        "python -m gluon_lm.report runs/ptb runs/ptb-tied --output report.html",
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="runs, or folders of runs (default: the newest run)")
    parser.add_section(ReportOptions, "report")
    parser.add_device("device (for the texts)")
    parsed = parser.parse(argv)
    options, device_config = parsed.build(ReportOptions), parsed.build(DeviceConfig)
    if not options.words:
        settings = parsed.of(ReportOptions, DeviceConfig)
        idle = [setting.flag for name, setting in settings.items() if name not in ("output", "words")]
        if idle:
            raise ConfigError(f"{', '.join(idle)}: has no effect with --words 0, which writes no texts; leave one out")
    log_to_terminal(parsed.verbosity)
    runs = _read_runs(parsed.arguments.runs)
    folders = [run.folder.path for run in runs]
    names = _names(folders)
    output = _output(options.output, folders)
    generated = _write_texts(runs, options, device_config) if options.words else []
    from .reporting.curves import panels_of
    from .reporting.page import render_page
    from .reporting.plots import can_plot, write_plots

    panels = panels_of(runs)
    page = render_page(runs, names, panels, generated)
    with atomic_write(output) as file:
        file.write(page.encode("utf-8", "backslashreplace"))
    LOGGER.log(RESULT, "%s", output)
    if not can_plot():
        LOGGER.warning("no plots as PNG: matplotlib is not installed; pip install 'gluon_lm[plot]'")
        return 0
    for path in counted(write_plots(panels, names, output.with_suffix("")), len(panels), "plotting", "plot"):
        LOGGER.info("%s", path)
    return 0


def _read_runs(names: Sequence[str]) -> list[RunHistory]:
    """The named runs, each once: named directly or by a link, or all readable ones of a folder that was named.

    Raises
    ------
    CheckpointError
        If a run that was named directly cannot be read, or if there is none.
    """
    runs = [] if names else [RunHistory(find_run(None)[0].path)]
    for name in names:
        folder = Path(name)
        inside = [] if not folder.is_dir() or looks_like_a_run(folder) else list(run_folders(folder))
        if not inside:
            runs.append(RunHistory(find_run(name)[0].path))
        for path in inside:
            try:
                runs.append(RunHistory(path))
            except CheckpointError as error:
                LOGGER.warning("left out: %s", error)
    if not runs:
        raise CheckpointError(f"{' '.join(names)}: has no readable run; fix those that are left out, or name others")
    return list({run.folder.path.resolve(): run for run in runs}.values())


def _names(folders: Sequence[Path]) -> list[str]:
    """The name of each run: the end of its path, as much of it as distinguishes it from the others."""
    parts = [folder.resolve().parts for folder in folders]
    count = 1
    while len({own[-count:] for own in parts}) < len(parts):
        count += 1
    return [in_utf8("/".join(own[-count:])) for own in parts]


def _output(name: str | None, folders: Sequence[Path]) -> Path:
    """The page's file.

    Raises
    ------
    ConfigError
        If it cannot be written, or does not end in .html.
    """
    if name is None:
        name = str(folders[0] / "report.html") if len(folders) == 1 else "report.html"
    path = output_file("--output", name)
    if path.suffix not in (".html", ".htm"):
        raise ConfigError(f"--output {name}: must end in .html; write --output {path.with_suffix('.html')}")
    return path


def _write_texts(
    runs: Sequence[RunHistory], options: ReportOptions, device_config: DeviceConfig
) -> list[GeneratedTexts]:
    prepare_process(own_layers=True)
    from .data.vocabulary import EOS
    from .distributed.devices import resolve_single_device
    from .generation.generator import generate
    from .reporting.page import GeneratedTexts
    from .trained import load_predictor

    device = resolve_single_device(device_config)
    generated = []
    for run in counted(runs, len(runs), "writing texts", "run"):
        try:
            predictor = load_predictor(run.folder.path, device)
        except CheckpointError as error:
            generated.append(GeneratedTexts([], f"No text: {error}"))
            continue
        steps = generate(predictor, options.words, num_samples=options.samples, seed=options.seed)
        texts = [" ".join("\n" if word == EOS else str(word) for word in words) for words in zip(*steps)]
        which = "newest" if run.best is None else "best"
        generated.append(
            GeneratedTexts(texts, f"Written by the {which} checkpoint, seed {options.seed}, temperature 1.")
        )
    return generated


if __name__ == "__main__":
    sys.exit(main())
