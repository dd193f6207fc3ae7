"""Models: recurrent layers, heads, and the language model made of them."""

from .heads import HEADS, Head, MixtureHead, SoftmaxHead
from .language_model import Encoder, LanguageModel, State
from .recurrent import CELLS, RecurrentLayer, UnrolledLSTMLayer

__all__ = [
    "CELLS",
    "HEADS",
    "Encoder",
    "Head",
    "LanguageModel",
    "MixtureHead",
    "RecurrentLayer",
    "SoftmaxHead",
    "State",
    "UnrolledLSTMLayer",
]
