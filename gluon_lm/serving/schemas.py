"""The contents of requests and answers, as the API's description shows them.

Annotations are read when the classes are made, in Python 3.9 as well, so they are neither postponed nor written ``|``.
"""

from typing import Any, Optional, Union

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..generation import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE
from .limits import Limits

_DARING = "Below 1 favours likely words, above 1 gives more variety."
_GREEDY = f"Below {LOWEST_TEMPERATURE:g}: the likeliest word each time."


class RequestModels:
    """The classes of requests, bounded by `limits`.

    Attributes
    ----------
    Generate, Form, Score : class
        JSON and form that ask for text, JSON that asks for scores.
    """

    def __init__(self, limits: Limits) -> None:
        def word_count(default: Any) -> Any:
            return Field(default, ge=1, le=limits.max_words, description="Length of a text.")

        class Knobs(BaseModel):
            prompt: Optional[str] = Field(
                None,
                max_length=limits.max_prompt,
                description="Words to continue; none: one is drawn at random.",
            )
            top_k: Optional[int] = Field(None, ge=1, description="Draw from the k likeliest words.")
            top_p: Optional[float] = Field(
                None, gt=0, le=1, description="Draw from the fewest likeliest words with this total probability."
            )
            seed: Optional[int] = Field(
                None, ge=0, le=2**31 - 1, description="Determines the text; none: one is drawn, and returned."
            )
            suppress_unk: bool = Field(False, description="Never write `<unk>`.")
            stop_at_eos: bool = Field(False, description="End a text at its first `<eos>`.")

        class GenerateRequest(Knobs):
            model_config = ConfigDict(extra="forbid", strict=True)

            words: int = word_count(min(100, limits.max_words))
            temperature: float = Field(1.0, ge=0, le=HIGHEST_TEMPERATURE, description=f"{_DARING} {_GREEDY}")
            n: int = Field(1, ge=1, le=limits.max_texts, description="Texts to write.")
            stream: bool = Field(False, description="Send each word once it is written, as server-sent events.")

        class FormRequest(Knobs):
            model_config = ConfigDict(extra="forbid")

            words: int = word_count(...)
            temperature: float = Field(1.0, ge=LOWEST_TEMPERATURE, le=HIGHEST_TEMPERATURE, description=_DARING)

        class ScoreRequest(BaseModel):
            """Give either `text`, whose lines are scored, or `lines`."""

            model_config = ConfigDict(
                extra="forbid",
                strict=True,
                json_schema_extra={"oneOf": [{"required": ["text"]}, {"required": ["lines"]}]},
            )

            text: str = Field("", min_length=1, max_length=limits.max_prompt)
            lines: list[str] = Field([], min_length=1, max_length=limits.max_prompt)

            @model_validator(mode="after")
            def check(self) -> Any:
                if len(self.model_fields_set) != 1:
                    raise ValueError("give one of text and lines")
                if sum(len(line) + 1 for line in self.lines) > limits.max_prompt:
                    raise ValueError(f"lines should have at most {limits.max_prompt} characters together")
                return self

        self.Generate, self.Form, self.Score = GenerateRequest, FormRequest, ScoreRequest


class Text(BaseModel):
    """A text that was written."""

    text: str = Field(description="As English is written: `<eos>` ends a line, punctuation is attached to its word.")
    words: list[str] = Field(description="As the model wrote them; without the prompt.")


class GenerateAnswer(BaseModel):
    """The texts that were asked for."""

    seed: int = Field(description="Gives the same texts again.")
    unknown: list[str] = Field(description="Words of the prompt that the model does not know and reads as `<unk>`.")
    texts: list[Text]


class WordScore(BaseModel):
    """The log-probability of a word, given those before it."""

    word: str
    log_prob: Optional[float] = Field(description="Base e; null if it is not finite.")
    unknown: bool = Field(description="The model does not know the word and scores it as `<unk>`.")


class LineAnswer(BaseModel):
    """The log-probability of a line; null for a number that is not finite."""

    log_prob: Optional[float]
    perplexity: Optional[float]
    words: list[WordScore] = Field(description="The line's words and `<eos>`.")


class ScoreAnswer(BaseModel):
    """The lines, in the order given."""

    lines: list[LineAnswer]


class ModelAnswer(BaseModel):
    """What is served, and with which limits."""

    version: str
    tokenizer: str
    vocab_size: int
    description: dict[str, Any]
    limits: dict[str, Union[int, float]]


class Health(BaseModel):
    """Whether the server works."""

    ok: bool


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str


class FieldProblem(BaseModel):
    """Where a request is wrong, and how."""

    loc: list[Any]
    msg: str
    type: str


class FieldProblems(BaseModel):
    """What is wrong with a request, field by field."""

    detail: list[FieldProblem]
