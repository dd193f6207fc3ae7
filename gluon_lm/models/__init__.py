"""Models: recurrent layers, heads, and the language model made of them."""

from .heads import HEADS, AdaptiveHead, Head, MixtureHead, SampledHead, SoftmaxHead, TrainingHead
from .language_model import Encoder, LanguageModel, State
from .recurrent import RecurrentLayer, UnrolledLSTMLayer

__all__ = [
    "HEADS",
    "AdaptiveHead",
    "Encoder",
    "Head",
    "LanguageModel",
    "MixtureHead",
    "RecurrentLayer",
    "SampledHead",
    "SoftmaxHead",
    "State",
    "TrainingHead",
    "UnrolledLSTMLayer",
]
