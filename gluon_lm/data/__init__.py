"""Text to token ids: corpora, vocabulary, download, encoding, and windows of truncated back-propagation."""

from __future__ import annotations

from .corpora import CORPORA, Corpus, CorpusSpec, load_corpus
from .encoding import Counts
from .vocabulary import Vocabulary

__all__ = ["CORPORA", "Corpus", "CorpusSpec", "Counts", "Vocabulary", "load_corpus"]
