"""From text to ids: time and memory."""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from .harness import SEED, Row, Table, benchmark, in_own_process, note, peak_memory_mb

TYPES = 250_000
WORDS_A_LINE = 24  # and <eos>


def write_words(path: Path, num_tokens: int, num_types: int) -> None:
    """A text file in lines of Zipf-distributed words and <eos>, in which every kind of word occurs."""
    import numpy as np

    cumulative = np.cumsum(1.0 / np.arange(1, num_types + 1))
    words = np.array([f"word{i}" for i in range(num_types - 1)], dtype=object)  # and <eos>
    rng, lines_a_block = np.random.RandomState(SEED), 50_000
    with open(path, "w", encoding="ascii") as file:
        for start in range(0, num_tokens, lines_a_block * (WORDS_A_LINE + 1)):
            draws = rng.random_sample(lines_a_block * WORDS_A_LINE) * cumulative[-1]
            ids = np.searchsorted(cumulative, draws).clip(max=num_types - 2)
            if start == 0:
                ids[: len(words)] = rng.permutation(len(words))
            left = (num_tokens - start) // (WORDS_A_LINE + 1) * WORDS_A_LINE
            for line in words[ids[:left]].reshape(-1, WORDS_A_LINE).tolist():
                file.write(" ".join(line) + "\n")


def encode(folder: str) -> dict[str, float]:
    """Read a folder of text for the first time, in this process."""
    from gluon_lm.config import DataConfig
    from gluon_lm.data import load_corpus

    started = time.perf_counter()
    corpus = load_corpus(DataConfig(data=(folder,)))
    seconds = time.perf_counter() - started
    num_tokens = sum(len(ids) for ids in corpus.ids.values())
    return {
        "seconds": seconds,
        "tokens_per_second": num_tokens / seconds,
        "peak_memory_mb": peak_memory_mb(),
        "num_tokens": num_tokens,
        "num_types": len(corpus.vocabulary),
    }


@benchmark("encoding")
def run_encoding(options: argparse.Namespace) -> list[Table]:
    """Time and memory of making ids from text, vocabulary and hashes included."""
    num_tokens, num_types = (5_000, 100) if options.check else (options.tokens, TYPES)
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="gluon_lm-benchmark-") as folder:
        text = Path(folder) / "text"
        text.mkdir()
        note(f"writing {num_tokens:,} words")
        write_words(text / "train.txt", num_tokens, num_types)
        for name in ("valid", "test"):
            (text / f"{name}.txt").write_text("word1 word2\n", encoding="ascii")
        for n in range(options.rounds):
            cache = f"{folder}/cache-{n}"
            found.append(in_own_process(encode, str(text), environment={"GLUON_LM_CACHE": cache}))
            shutil.rmtree(cache)
            note(f"encoding {n + 1}/{options.rounds}: {found[-1]['seconds']:.1f} s")
    metrics = ("seconds", "tokens_per_second", "peak_memory_mb")
    row = Row("load_corpus, for the first time", {metric: [each[metric] for each in found] for metric in metrics})
    title = f"Encoding {found[0]['num_tokens']:,} words of {found[0]['num_types']:,} kinds"
    return [Table(title, [row])]
