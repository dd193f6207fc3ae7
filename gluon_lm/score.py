"""``python -m gluon_lm.score RUN FILE``: log-probability and perplexity of each line and each word of a file."""

from __future__ import annotations

import codecs
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .cli import CommandParser, Section, as_command
from .config import DeviceConfig, choice, option, optional, pathname, switch
from .errors import ConfigError, DataError
from .files import open_output, output_file
from .logs import LOGGER, is_terminal, log_to_terminal
from .metrics import perplexity
from .progress import counted
from .runtime import prepare_process

if TYPE_CHECKING:
    from .scoring import LineScore


@dataclasses.dataclass(frozen=True)
class ScoreOptions(Section):
    """What is written."""

    format: str = option("tsv", choice("tsv", "jsonl"), "a table, or one JSON object per line, which has the words too")
    words: bool = option(False, switch(), "a row for each word after that of its line (tsv)")
    outf: str | None = option(None, optional(pathname("FILE")), "file to write (default: the terminal)")


@as_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = CommandParser(
        "score",
        "Log-probability (base e) and perplexity of each line of a file, each line on its own, including its end.",
        "python -m gluon_lm.score runs/latest candidates.txt --format jsonl",
    )
    parser.add_argument("run", metavar="RUN", help="run folder, checkpoint or exported folder")
    parser.add_argument("file", metavar="FILE", help="text, one candidate per line; - reads standard input")
    parser.add_section(ScoreOptions, "output")
    parser.add_device()
    parsed = parser.parse(argv)
    options = parsed.build(ScoreOptions)
    if options.words and options.format == "jsonl":
        raise ConfigError("--words with --format jsonl: JSON always has the words; leave --words out")
    out = None if options.outf is None else output_file("--outf", options.outf)
    lines = _read(parsed.arguments.file)
    log_to_terminal(parsed.verbosity, has_other_output=out is None)
    prepare_process()
    from .data.tokenizers import TOKENIZERS
    from .distributed.devices import resolve_single_device
    from .scoring import score_lines
    from .trained import load_predictor

    predictor = load_predictor(parsed.arguments.run, resolve_single_device(parsed.build(DeviceConfig)))
    is_shown = out is None and is_terminal(sys.stdout)
    scores = counted(
        score_lines(predictor, map(TOKENIZERS[predictor.tokenizer], lines)),
        len(lines),
        None if is_shown else "scoring",
        "line",
    )
    num_words = num_unknown = 0
    is_json = options.format == "jsonl"
    is_utf8 = out is not None or codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
    with open_output(out) as file:
        if not is_json:
            file.write("line\tposition\tlog_prob\tperplexity\ttokens\ttext\n")
        for number, score in enumerate(scores, 1):
            rows = [_json_row(number, score, is_utf8)] if is_json else _table_rows(number, score, options.words)
            file.write("".join(f"{row}\n" for row in rows))
            num_words += len(score.words) - 1  # without <eos>
            num_unknown += sum(score.is_unknown)
    if num_unknown:
        LOGGER.info("%d of %d words are not known to the model and scored as <unk>", num_unknown, num_words)
    return 0


def _read(name: str) -> list[str]:
    where = "standard input" if name == "-" else name
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        text_ = content.decode("utf-8-sig").replace("\r\n", "\n")
        lines = text_.removesuffix("\n").split("\n") if text_ else []
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror}); name a text file") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{where} line {line}: is not UTF-8 text; save it as UTF-8") from error
    if not lines:
        raise DataError(f"{where}: is empty; it must have at least one line")
    return lines


def _json_row(number: int, score: LineScore, is_utf8: bool) -> str:
    row = {"line": number, "tokens": len(score.words), **score.as_json()}
    return json.dumps(row, ensure_ascii=not is_utf8)  # JSON has escapes for letters that other encodings lack


def _table_rows(number: int, score: LineScore, with_words: bool) -> list[str]:
    text_ = " ".join(score.words[:-1])
    rows = [f"{number}\tall\t{score.log_prob:.6f}\t{score.perplexity:.4f}\t{len(score.words)}\t{text_}"]
    if with_words:
        rows += [
            f"{number}\t{place}\t{log_prob:.6f}\t{perplexity(-log_prob):.4f}\t1\t{word}"
            for place, (word, log_prob) in enumerate(zip(score.words, score.log_probs.tolist()), 1)
        ]
    return rows


if __name__ == "__main__":
    sys.exit(main())
