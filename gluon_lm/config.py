"""What a run is: every knob, declared once, and how flags, YAML files and recipes become one frozen `Config`.

A field of a section below is the only place where a knob exists: its flag, YAML key, help, rule and default
are all read from there. Where values come from, highest first: flags, ``--config``, the recipe, the default.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import yaml

from gluon_lm.errors import ConfigError

DEFAULT_RECIPE = "lm"
KVSTORES = ("device", "local", "nccl", "dist_sync", "dist_device_sync", "dist_async")
COMPRESSIONS = ("none", "2bit", "fp16")
OPTIMIZER_LR = {"sgd": 20.0, "adam": 1e-3}  # where an optimiser is chosen and no learning rate
CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
REGULARISED_CELLS = {"awd-lstm": "lstm", "awd-gru": "gru", "awd-rnn": "rnn_tanh"}
MODELS = CELLS + tuple(REGULARISED_CELLS)
TAIL_FACTOR = 4  # by which the vectors of each group of rarer words are narrower (Grave et al. 2017)


# ---------------------------------------------------------------- kinds of value


def _key(name: str) -> str:
    return name.strip().lower().replace("_", "-")


@dataclass(frozen=True)
class Kind:
    """How a value is read and which rule it obeys.

    Parameters
    ----------
    read : callable
        Takes the string of a flag, a YAML value or an already read value, returns the value, and raises
        ``ValueError`` or ``TypeError`` where the rule is broken. ``read(read(x)) == read(x)``.
    rule : str
        The rule in words, as it follows "must be".
    metavar : str
        The value's place holder in ``--help``; empty for a switch.
    nargs : str, optional
        As in `argparse`: ``'+'`` for a flag with several values.
    """

    read: Callable[[Any], Any]
    rule: str
    metavar: str = ""
    nargs: str | None = None

    @property
    def is_switch(self) -> bool:
        """Whether its flag takes no value."""
        return not self.metavar


def integer(low: int = 1, high: int | None = None) -> Kind:
    """Whole numbers from `low` to `high`, both included."""

    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise TypeError
        number = int(value)
        if number < low or (high is not None and number > high):
            raise ValueError
        return number

    return Kind(read, f"a whole number from {low} to {high}" if high else f"a whole number, {low} or more", "N")


def real(low: float, below: float = math.inf, *, above: bool = False) -> Kind:
    """Finite numbers in [low, below), or in (low, below) where `above` is set."""

    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise TypeError
        number = float(value)
        if not math.isfinite(number) or number < low or (above and number == low) or number >= below:
            raise ValueError
        return number

    rule = f"a number above {low:g}" if above else f"a number, {low:g} or more"
    return Kind(read, rule if below == math.inf else f"{rule} and below {below:g}", "X")


def choice(*names: str) -> Kind:
    """One of `names`; capitals, ``-`` and ``_`` make no difference."""
    by_key = {_key(name): name for name in names}

    def read(value: Any) -> str:
        try:
            return by_key[_key(value)]
        except (KeyError, AttributeError):
            near = difflib.get_close_matches(_key(str(value)), by_key, n=1)
            raise ValueError(f"did you mean {by_key[near[0]]}?" if near else "") from None

    return Kind(read, f"one of {', '.join(names)}", "{" + ",".join(names) + "}")


def text(metavar: str) -> Kind:
    """A name or a path."""

    def read(value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError
        if not value.strip():
            raise ValueError
        return value

    return Kind(read, "a name or a path", metavar)


def texts(*counts: int, rule: str, metavar: str) -> Kind:
    """A tuple of names or paths, as many as one of `counts`."""
    one = text(metavar).read

    def read(value: Any) -> tuple[str, ...]:
        if not isinstance(value, (str, list, tuple)):
            raise TypeError
        items = tuple(one(item) for item in ([value] if isinstance(value, str) else value))
        if len(items) not in counts:
            raise ValueError
        return items

    return Kind(read, rule, metavar, "+")


def integers(low: int, rule: str, nargs: str | None = None) -> Kind:
    """A tuple of different whole numbers, `low` or more: ``0,1,2``, ``[0, 1, 2]`` or ``0``."""
    one = integer(low).read

    def read(value: Any) -> tuple[int, ...]:
        items = value if isinstance(value, (list, tuple)) else [value]
        numbers = tuple(one(part) for item in items for part in str(item).split(","))
        if len(set(numbers)) != len(numbers) or not numbers:
            raise ValueError
        return numbers

    return Kind(read, rule, "N" if nargs else "N,N", nargs)


def ascending(low: int, rule: str) -> Kind:
    """A tuple of whole numbers, `low` or more, each above the one before it: ``2000 20000`` or ``2000,20000``."""
    different = integers(low, rule, "+")

    def read(value: Any) -> tuple[int, ...]:
        numbers: tuple[int, ...] = different.read(value)
        if list(numbers) != sorted(numbers):
            raise ValueError
        return numbers

    return dataclasses.replace(different, read=read)


def optional(kind: Kind, *also: object) -> Kind:
    """`kind`, or None, written ``none`` (a flag), ``null`` (YAML) or as one of `also`."""
    nothing = {"none", "null", *map(str, also)}

    def read(value: Any) -> Any:
        single = value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value
        return None if single is None or str(single).lower() in nothing else kind.read(value)

    return dataclasses.replace(kind, read=read, rule=f"{kind.rule}, or none")


def switch() -> Kind:
    """On or off: ``--name`` and ``--no-name``, in YAML true and false."""

    def read(value: Any) -> bool:
        if not isinstance(value, bool):
            raise TypeError
        return value

    return Kind(read, "true or false")


def option(default: Any, kind: Kind, help: str, *aliases: str, keep: str = "") -> Any:
    """Declare a field of a section: its default, its `Kind`, its help and its other names (snake_case).

    `keep` is the YAML key under which OpenSeq2Seq has the same probability, as that of keeping and not of dropping.
    """
    return field(default=default, metadata={"kind": kind, "help": help, "aliases": aliases, "keep": keep})


def keep_probability(field_name: str) -> Kind:
    """Numbers in (0, 1], read as the probability ``1 - value`` that `field_name` holds."""

    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise TypeError
        keep = Decimal(str(value))
        if not 0 < keep <= 1 or float(1 - keep) == 1:
            raise ValueError
        return float(1 - keep)

    return Kind(read, f"a number above 0, at most 1 (it sets {field_name} to 1 - value)", "X")


# ---------------------------------------------------------------- the sections


@dataclass(frozen=True)
class Section:
    """Base of the dataclasses whose fields are made with `option`."""


@dataclass(frozen=True)
class DataConfig(Section):
    """The text and its vocabulary."""

    data: tuple[str, ...] = option(
        ("wikitext-2",),
        texts(
            1,
            3,
            rule="one corpus, folder or file, or three files (training, validation, test)",
            metavar="DATA",
        ),
        "corpus (wikitext-2, wikitext-103, ptb, sotu), or your own text: a folder, one file, or three files",
    )
    data_dir: str = option("./data", text("DIR"), "where the corpora lie and are downloaded to")
    tokenizer: str | None = option(
        None,
        optional(choice("whitespace", "words")),
        "how text becomes words (default: the corpus's own; whitespace for your text)",
    )
    min_freq: int | None = option(None, optional(integer()), "leave words seen fewer times in training out")
    max_vocab: int | None = option(
        None, optional(integer()), "largest vocabulary, <unk> and <eos> included; the most frequent words stay"
    )
    vocab: str | None = option(None, optional(text("FILE")), "a vocabulary file to use instead of the training words")


@dataclass(frozen=True)
class ModelConfig(Section):
    """The architecture and its dropouts."""

    model: str = option("lstm", choice(*MODELS), "type of recurrent network")
    embed_size: int = option(200, integer(), "size of the word embeddings", "emsize", "embed_dim")
    hidden_size: int = option(200, integer(), "hidden units in each layer", "nhid", "hidden_dim")
    num_layers: int = option(2, integer(), "number of recurrent layers", "nlayers")
    tied: bool = option(False, switch(), "share one matrix between the embedding and the output layer", "weight_tied")
    init: str = option(
        "uniform",
        choice("uniform", "xavier"),
        "first weights: uniform as PyTorch's example, xavier as MXNet's",
    )
    num_experts: int | None = option(None, optional(integer()), "softmaxes to mix", "n_experts")
    num_sampled: int | None = option(
        None,
        optional(integer()),
        "train with so many words, drawn anew for each window, in place of the whole vocabulary (sampled softmax)",
    )
    cutoffs: tuple[int, ...] | None = option(
        None,
        optional(ascending(1, "word ids in rising order, each a whole number, 1 or more")),
        "where each group of rarer words begins, whose vectors are four times narrower than those of the group before "
        "(adaptive softmax)",
    )
    last_hidden_size: int | None = option(
        None,
        optional(integer(), -1),
        "hidden units of the last layer (default: as many as the embedding where tied or mixed, else as the others)",
        "nhidlast",
    )
    dropout: float = option(
        0.2,
        real(0, 1),
        "dropout on the last layer's output, and in the two places below where they are not given",
        keep="encoder_last_output_keep_prob",
    )
    dropout_input: float | None = option(
        None, optional(real(0, 1)), "dropout on the embedded words", "dropouti", "dropout_i"
    )
    dropout_hidden: float | None = option(
        None,
        optional(real(0, 1)),
        "dropout between the layers",
        "dropouth",
        "dropout_h",
        keep="encoder_dp_output_keep_prob",
    )
    locked: bool | None = option(
        None,
        optional(switch()),
        "draw one dropout mask for all words of a window, not one a word (default: where --dropouti or --dropouth is "
        "given, and for awd models)",
    )
    dropout_embed: float = option(0.0, real(0, 1), "dropout of whole words at the input", "dropoute", "dropout_e")
    dropout_embed_elements: float = option(
        0.0,
        real(0, 1),
        "dropout of elements of the input words' vectors, alike wherever a word occurs",
        keep="encoder_emb_keep_prob",
    )
    dropout_inner_input: float = option(
        0.0,
        real(0, 1),
        "dropout on the input of every layer but the last, besides the above",
        keep="encoder_dp_input_keep_prob",
    )
    dropout_last_input: float = option(
        0.0,
        real(0, 1),
        "dropout on the input of the last layer, besides the above",
        keep="encoder_last_input_keep_prob",
    )
    dropout_candidate: float = option(
        0.0,
        real(0, 1),
        "dropout on an LSTM's candidate, tanh(j), at each word",
        keep="recurrent_keep_prob",
    )
    weight_drop: float = option(
        0.0,
        real(0, 1),
        "dropout on hidden-to-hidden weights",
        "wdrop",
        "weight_dropout",
        keep="recurrent_weight_keep_prob",
    )
    input_weight_drop: float = option(
        0.0, real(0, 1), "dropout on input-to-hidden weights", keep="input_weight_keep_prob"
    )
    layer_norm: bool = option(False, switch(), "normalise an LSTM's gates and cell (slower: word by word)")
    dropout_latent: float | None = option(
        None,
        optional(real(0, 1), -0.2),
        "locked dropout on the experts' vectors (default: as between the layers)",
        "dropoutl",
    )

    @property
    def cell(self) -> str:
        """The recurrent cell: one of `CELLS`."""
        return REGULARISED_CELLS.get(self.model, self.model)

    @property
    def layer_sizes(self) -> list[int]:
        """Width of each layer, first to last."""
        default = self.embed_size if self.tied or self.num_experts else self.hidden_size
        return [self.hidden_size] * (self.num_layers - 1) + [self.last_hidden_size or default]

    @property
    def head(self) -> str:
        """The output layer: a name in `gluon_lm.models.HEADS`."""
        if self.num_experts:
            return "mixture"
        if self.num_sampled:
            return "sampled"
        return "adaptive" if self.cutoffs else "softmax"

    @property
    def needs_frequency_order(self) -> bool:
        """Whether the output layer takes a word's id for its rank by frequency."""
        return self.head in ("sampled", "adaptive")

    @property
    def latent_dropout(self) -> float:
        """Probability of dropping an element of an expert's vector."""
        given = (rate for rate in (self.dropout_latent, self.dropout_hidden) if rate is not None)
        return next(given, self.dropout)

    def without_dropout(self) -> ModelConfig:
        """The same architecture with every dropout off."""
        off: dict[str, Any] = {f.name: 0.0 for f in dataclasses.fields(self) if "drop" in f.name}
        return dataclasses.replace(self, **off, locked=None)

    @property
    def has_locked_dropout(self) -> bool:
        """Whether a dropout mask is the same for all words of a window."""
        if self.locked is not None:
            return self.locked
        return self.model in REGULARISED_CELLS or not (self.dropout_input is None and self.dropout_hidden is None)

    @property
    def layer_dropouts(self) -> list[float]:
        """Probability of dropping an element of each layer's input, first to last, all the rates above taken together.

        Independent masks, one upon the other, drop as one mask that keeps with the product of their probabilities.
        """
        on_words = self.dropout if self.dropout_input is None else self.dropout_input
        between = self.dropout if self.dropout_hidden is None else self.dropout_hidden
        rates = []
        for i in range(self.num_layers):
            own = self.dropout_last_input if i == self.num_layers - 1 else self.dropout_inner_input
            before = between if i else on_words
            rates.append(max(before, own) if 0 in (before, own) else 1 - (1 - before) * (1 - own))
        return rates


@dataclass(frozen=True)
class OptimConfig(Section):
    """The optimiser, its learning rate and what is added to the loss."""

    optimizer: str = option("sgd", choice(*OPTIMIZER_LR), "update rule")
    lr: float = option(OPTIMIZER_LR["sgd"], real(0, above=True), "learning rate at the start (adam: 0.001)")
    lr_decay: float | None = option(
        None,
        optional(real(1, above=True)),
        "divide the learning rate by this when validation is not a new best; none: never (recipe lm: 4)",
        "decay",
    )
    clip_norm: float | None = option(
        0.25,
        optional(real(0, above=True)),
        "largest norm of the whole gradient; none: any",
        "clip",
        "grad_clip",
    )
    weight_decay: float = option(0.0, real(0), "weight decay", "wdecay", "wd")
    alpha: float = option(0.0, real(0), "weight of the activation regularisation")
    beta: float = option(0.0, real(0), "weight of the temporal activation regularisation")
    ntasgd: bool = option(False, switch(), "average the weights once validation stops improving (NT-ASGD)")
    asgd: bool = option(
        False, switch(), "average the weights from the first step on, and end when validation stops improving"
    )
    nonmono: int = option(
        5, integer(), "validation stops improving when its loss is above the lowest that is older than this many"
    )
    when: tuple[int, ...] | None = option(
        None,
        optional(integers(1, "different epochs, each a whole number, 1 or more", "+"), -1),
        "epochs after which the learning rate is divided by 10",
    )
    max_seq_len_delta: int | None = option(
        None, optional(integer(0)), "windows of random length around --bptt, at most this much longer"
    )
    random_start: bool = option(
        False, switch(), "cut the text into windows at another place in each epoch", "rand_start"
    )
    shuffle: bool = option(
        False, switch(), "windows in random order, each from the zero state, instead of one after the other"
    )
    small_batch_size: int | None = option(
        None, optional(integer(), -1), "streams worked on at once, their gradients added up over the batch"
    )


@dataclass(frozen=True)
class TrainingConfig(Section):
    """How long, in which portions, and what is noted on the way."""

    epochs: int = option(40, integer(), "passes over the training text", "epoch")
    max_steps: int | None = option(None, optional(integer()), "stop after this many steps")
    batch_size: int = option(20, integer(), "streams of text read side by side, over all devices together")
    bptt: int = option(35, integer(), "words in a window, through which gradients flow back")
    tf32: bool = option(
        True, switch(), "let GPUs of compute capability 8.0 and later round what float32 matrix products take to TF32"
    )
    amp: str = option(
        "none",
        choice("none", "float16", "bfloat16"),
        "mixed precision: matrix products in float16 (GPU), or the output layer's in bfloat16 (CPU with AVX512-BF16)",
    )
    seed: int = option(1111, integer(0, 2**31 - 1), "seed of every random draw")
    log_interval: int = option(200, integer(), "steps between two lines of the log")
    eval_every: int | None = option(None, optional(integer()), "steps between evaluations (default: each epoch)")
    eval_batch_size: int = option(10, integer(), "streams of the validation and test text during training")
    patience: int | None = option(None, optional(integer()), "stop after this many evaluations with no new best")
    checkpoint_every: int | None = option(
        None, optional(integer()), "steps between checkpoints (default: at each evaluation)"
    )
    keep_checkpoints: int = option(2, integer(), "newest checkpoints to keep; the best one always stays")
    tensorboard: bool = option(
        False, switch(), "write metrics and configuration for TensorBoard too, to RUN/tensorboard"
    )
    gen_word_len: int = option(0, integer(0), "words to generate when training is done")


@dataclass(frozen=True)
class DeviceConfig(Section):
    """Where it runs, and how gradients travel. Nothing given: the first usable GPU, else one CPU context."""

    gpus: tuple[int, ...] | None = option(
        None,
        optional(integers(-1, "GPU numbers such as 0 or 0,1,2,3, or -1 for the CPU")),
        "GPUs; -1: the CPU",
        "gpu",
    )
    cpus: int | None = option(None, optional(integer()), "run on this many CPU contexts")
    cuda: bool | None = option(None, optional(switch()), "use a GPU, or refuse to", "accel")
    single_gpu: bool = option(False, switch(), "use one GPU even where the recipe takes all")
    kvstore: str | None = option(
        None,
        optional(choice(*KVSTORES)),
        "how several devices add up their gradients: device, local or nccl (GPUs) in this process, dist_sync or "
        "dist_device_sync through parameter servers (python -m gluon_lm.launch starts them)",
    )
    horovod: bool = option(False, switch(), "train in several processes, one device each, started by horovodrun")
    gctype: str = option(
        "none", choice(*COMPRESSIONS), "compression of the gradients between devices (fp16: with --horovod)"
    )
    gcthreshold: float = option(0.5, real(0, above=True), "threshold of the 2-bit compression")

    @property
    def count(self) -> int | None:
        """Number of devices that the flags ask for; None where the machine decides."""
        if self.cpus is not None:
            return self.cpus
        if self.gpus is not None:
            return len(self.gpus)
        return 1 if self.single_gpu or self.cuda is False else None

    @property
    def has_workers(self) -> bool:
        """Whether this process is one of several that train together."""
        return self.horovod or (self.kvstore or "").startswith("dist")


@dataclass(frozen=True)
class Config:
    """Everything that decides the result of a run. A name is in one section only: YAML and flags are flat."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    devices: DeviceConfig = field(default_factory=DeviceConfig)

    def to_yaml(self, sources: Mapping[str, str] | None = None, recipe: str | None = None) -> str:
        """The configuration as flat YAML that `from_yaml` reads back equal.

        Parameters
        ----------
        sources : mapping, optional
            Where each value comes from, by field name; written behind the value as a comment.
        recipe : str, optional
            Name of the recipe that it started from.
        """
        sources = sources or {}
        lines: list[str] = []

        def add(name: str, value: Any) -> None:
            # PyYAML reads some line breaks of Unicode back as others unless they are escaped.
            readable = "".join(map(str, value if isinstance(value, tuple) else [value])).isprintable()

            def dump(data: Any, **how: Any) -> str:
                return str(yaml.safe_dump(data, allow_unicode=readable, width=math.inf, **how))

            if isinstance(value, tuple):
                line = f"{name}: {dump(list(value), default_flow_style=True)}"
            else:
                line = dump({name: value})
            lines.append(line.rstrip("\n") + (f"  # {show(sources[name])}" if name in sources else ""))

        if recipe is not None:
            add("recipe", recipe)
        for section in SECTIONS:
            lines.append(f"\n# {section}" if lines else f"# {section}")
            for name, value in vars(getattr(self, section)).items():
                add(name, value)
        return "\n".join(lines) + "\n"

    @classmethod
    def from_yaml(cls, source: str | Path) -> Config:
        """Read a YAML file (a `Path`) or YAML text (a `str`) over its recipe, if any, and the defaults.

        Raises
        ------
        ConfigError
            The file cannot be read, or holds keys or values that do not exist. Combinations are `validate`'s.
        """
        return resolve(config_file=source, default_recipe=None).config


SECTIONS: dict[str, type[Section]] = {
    "data": DataConfig,
    "model": ModelConfig,
    "optim": OptimConfig,
    "training": TrainingConfig,
    "devices": DeviceConfig,
}
_Section = TypeVar("_Section", bound=Section)


def flag_of(name: str) -> str:
    """The flag of a field or alias: ``hidden_size`` -> ``--hidden-size``."""
    return "--" + name.replace("_", "-")


@cache
def _fields() -> dict[str, dataclasses.Field[Any]]:
    """Every field of every section, by name."""
    return {f.name: f for cls in SECTIONS.values() for f in dataclasses.fields(cls)}


@cache
def _names() -> dict[str, str]:
    """Field name of every YAML key, in its hyphenated form."""
    return {_key(name): f.name for f in _fields().values() for name in (f.name, *f.metadata["aliases"])}


@cache
def _keep_names() -> dict[str, str]:
    """Field name of every YAML key that holds a probability of keeping, in its hyphenated form."""
    return {_key(f.metadata["keep"]): f.name for f in _fields().values() if f.metadata["keep"]}


def get(config: Config, name: str) -> Any:
    """The value of the field `name`, whichever section it is in."""
    return next(values[name] for values in (vars(getattr(config, s)) for s in SECTIONS) if name in values)


def show(value: Any) -> str:
    """A value as a user would write it, on one line, shortened where it is long."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, (list, tuple)) and all(isinstance(item, (str, int, float)) for item in value):
        shown = (" " if any(isinstance(item, str) for item in value) else ",").join(map(str, value))
    else:
        shown = value if isinstance(value, str) else reprlib.repr(value)
    shown = shown if shown.isprintable() and shown.strip() else repr(shown)
    return shown if len(shown) <= 80 else shown[:77] + "..."


# ---------------------------------------------------------------- layers of settings


@dataclass(frozen=True)
class Setting:
    """A value and where it comes from (``flag --nhid``, ``my.yaml``, ``recipe lm``)."""

    value: Any
    source: str


Layer = dict[str, Setting]


def read_value(
    declared: dataclasses.Field[Any], raw: Any, label: str, problems: list[str], kind: Kind | None = None
) -> Any:
    """Read one value by its field's rule or by `kind`; where it breaks it, add to `problems`, return the default."""
    own = kind is None
    kind = kind or declared.metadata["kind"]
    try:
        return kind.read(raw)
    except (ValueError, TypeError, OverflowError, InvalidOperation) as error:
        hint = str(error) if str(error).startswith("did you mean") else ""
        if own and not hint and declared.default is not None and not kind.is_switch:
            hint = f"for example {show(declared.default)}"
        line = f"{label} {show(raw)}".rstrip() + f": must be {kind.rule}"
        problems.append(f"{line}; {hint}" if hint else line)
        return declared.default


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean X?`` where one of `known` is close to `name`, else nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


class _FlatLoader(yaml.SafeLoader):
    """Knows no aliases of lists and mappings: a few lines of them stand for more than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias and not isinstance(node, yaml.ScalarNode):
            mark = node.start_mark if node else None
            raise yaml.composer.ComposerError(None, None, "an alias may stand for a single value only", mark)
        return node


def _read_yaml(source: str | Path, origin: str, problems: list[str]) -> tuple[Layer, str | None]:
    """The settings of a flat YAML file and the recipe that it names."""
    layer: Layer = {}
    recipe: str | None = None
    try:
        content = source.read_text(encoding="utf-8-sig") if isinstance(source, Path) else source
        loader = _FlatLoader(content)
        node = loader.get_single_node()
        if node is None:
            return layer, recipe
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{origin}: must be lines of the form name: value, for example hidden_size: 200")
        read = partial(loader.construct_object, deep=True)
        pairs = [(read(key), read(value), key.start_mark.line + 1) for key, value in node.value]
    except OSError as error:
        raise ConfigError(f"{origin}: cannot be read ({error.strerror}); name a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {origin}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        # PyYAML's constructors raise all of these for explicit tags that do not fit their value.
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        what = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{origin}{where}: is not YAML that can be read ({what}); write name: value lines") from None

    seen: dict[str, int] = {}
    for key, raw, line in pairs:
        where = f"{origin} line {line}:"
        keep = _keep_names().get(_key(key)) if isinstance(key, str) else None
        name = "recipe" if key == "recipe" else keep or _names().get(_key(key)) if isinstance(key, str) else None
        if name is None:
            known = [n.replace("-", "_") for n in (*_names(), *_keep_names())]
            hint = nearest(str(key).lower().replace("-", "_")[:80], known) or "; --print-config lists every key"
            problems.append(f"{where} unknown key {show(key)}{hint}")
        elif name in seen:
            problems.append(f"{where} {key}: given a second time, first in line {seen[name]}; keep one of them")
        elif name == "recipe":
            recipe = str(raw)
        else:
            kind = keep_probability(name) if keep else None
            layer[name] = Setting(read_value(_fields()[name], raw, f"{where} {key}:", problems, kind), origin)
        if name is not None:
            seen.setdefault(name, line)
    return layer, recipe


def config_folder() -> Path:
    """The folder of the recipes: in the package when installed, beside it in a checkout."""
    inside = Path(__file__).resolve().parent / "configs"
    return inside if inside.is_dir() else inside.parent.parent / "configs"


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in config_folder().glob("*.yaml"))


def _choose_recipe(flags: Layer, file: Layer) -> str:
    both = {**file, **flags}
    if "num_experts" in both and both["num_experts"].value is not None:
        return "mos"
    if "model" in both and both["model"].value in REGULARISED_CELLS:
        return "awd"
    return DEFAULT_RECIPE


def _replaced_by(layer: Layer) -> set[str]:
    """The fields that `layer` takes the place of in the layers below, because both together make no sense.

    So ``--cpus 2`` continues a run that was configured with GPUs, and ``--vocab FILE`` goes with any recipe.
    """
    values = {name: setting.value for name, setting in layer.items()}
    replaced: set[str] = set()
    if values.get("cpus"):
        replaced |= {"gpus", "cuda", "single_gpu"}
    if values.get("gpus"):
        replaced |= {"cpus", "cuda", "single_gpu"}
    if values.get("single_gpu"):
        replaced |= {"cpus", "gpus"}
    if values.get("cuda"):
        replaced |= {"cpus"}
    if values.get("cuda") is False:
        replaced |= {"gpus", "single_gpu"}
    if values.get("gctype") in ("none", "fp16"):
        replaced |= {"gcthreshold"}
    if values.get("horovod"):
        replaced |= {"kvstore"}
    if values.get("kvstore"):
        replaced |= {"horovod"}
    if values.get("vocab"):
        replaced |= {"min_freq", "max_vocab"}
    if values.get("min_freq") or values.get("max_vocab"):
        replaced |= {"vocab"}
    if values.get("optimizer") == "adam":
        replaced |= {"ntasgd", "asgd", "nonmono"}
    if values.get("ntasgd"):
        replaced |= {"asgd", "lr_decay"}
    if values.get("asgd"):
        replaced |= {"ntasgd", "lr_decay"}
    if values.get("shuffle"):
        replaced |= {"max_seq_len_delta"}
    if values.get("max_seq_len_delta") is not None:
        replaced |= {"shuffle"}
    return replaced


def _value(layer: Layer, name: str) -> Any:
    """A field's value in `layer`, or its default."""
    return layer[name].value if name in layer else _fields()[name].default


def _merge(layers: Iterable[Layer]) -> Layer:
    """Lay `layers`, lowest first, over each other."""
    merged: Layer = {}
    for layer in layers:
        gpus, cuda = layer.get("gpus"), layer.get("cuda")
        if gpus and gpus.value == (-1,) and not (cuda and cuda.value):
            layer = {**layer, "gpus": Setting(None, gpus.source), "cuda": Setting(False, gpus.source)}
        optimizer = layer.get("optimizer")
        if optimizer and "lr" not in layer and _value(merged, "optimizer") != optimizer.value:
            # A learning rate is good for one optimiser only.
            layer = {**layer, "lr": Setting(OPTIMIZER_LR[optimizer.value], optimizer.source)}
        for name in _replaced_by(layer):
            merged.pop(name, None)
        merged.update(layer)
        averaging = ("ntasgd", "asgd")
        is_off = not any(name in merged and merged[name].value for name in averaging)
        if is_off and not layer.keys().isdisjoint(averaging) and "nonmono" not in layer:
            merged.pop("nonmono", None)  # it began the averaging that this layer turns off
    return merged


@dataclass(frozen=True)
class Resolved:
    """A configuration, the source of each value by field name (and of ``recipe``), and the recipe."""

    config: Config
    sources: dict[str, str]
    recipe: str | None


def resolve(
    flags: Layer | None = None,
    config_file: str | Path | None = None,
    recipe: str | None = None,
    default_recipe: str | None = DEFAULT_RECIPE,
) -> Resolved:
    """Lay flags over the file over the recipe over the defaults.

    Parameters
    ----------
    flags : Layer, optional
        What was given on the command line.
    config_file : Path or str, optional
        A YAML file, or YAML text if it is a `str`.
    recipe : str, optional
        Name of a recipe; without it the file's, else the one that the model asks for, else `default_recipe`.
    default_recipe : str or None
        None: where nobody names a recipe, none is used.

    Raises
    ------
    ConfigError
        With every problem of the file and the recipe. Rules between fields are `validate`'s.
    """
    problems: list[str] = []
    flags = flags or {}
    file: Layer = {}
    file_recipe: str | None = None
    origin = str(config_file) if isinstance(config_file, Path) else "config.yaml"
    if config_file is not None:
        try:
            file, file_recipe = _read_yaml(config_file, origin, problems)
        except ConfigError as error:
            problems.extend(error.problems)

    if recipe is not None:
        recipe_source = "flag --recipe"
    elif file_recipe is not None:
        recipe, recipe_source = file_recipe, origin
    else:
        recipe, recipe_source = (_choose_recipe(flags, file) if default_recipe else None), "default"

    base: Layer = {}
    if recipe is not None and recipe not in recipe_names():
        hint = nearest(recipe, recipe_names())
        named = _named("recipe", recipe, {"recipe": recipe_source})
        problems.append(f"{named}: must be one of {', '.join(recipe_names())}{hint}")
    elif recipe is not None:
        base, _ = _read_yaml(config_folder() / f"{recipe}.yaml", f"recipe {recipe}", problems)

    # What a file repeats of its recipe, as a printed configuration does, is still the recipe's.
    file = {name: base[name] if base.get(name, s).value == s.value and name in base else s for name, s in file.items()}
    merged = _merge((base, file, flags))
    if problems:
        raise ConfigError(problems)
    sections: dict[str, Any] = {section: _make(cls, merged) for section, cls in SECTIONS.items()}
    sources = {name: merged[name].source if name in merged else "default" for name in _fields()}
    return Resolved(Config(**sections), {"recipe": recipe_source, **sources}, recipe)


def _make(section: type[_Section], values: Layer) -> _Section:
    return section(**{f.name: values[f.name].value for f in dataclasses.fields(section) if f.name in values})


def build(section: type[_Section], values: Layer) -> _Section:
    """One section from the settings that were given, the defaults elsewhere.

    Raises
    ------
    ConfigError
        With every problem of a combination, where `section` is `DeviceConfig`.
    """
    merged = _merge([values])
    made = _make(section, merged)
    if isinstance(made, DeviceConfig):
        sources = {name: setting.source for name, setting in merged.items()}
        problems = _device_problems(made, sources, made.count or 1)
        if problems:
            raise ConfigError(problems)
    return made


# ---------------------------------------------------------------- rules between fields


# The fields that the rules below read. Where one of these is wrong in itself, the rules blame the wrong flag.
LINKED = frozenset(DeviceConfig.__dataclass_fields__) | {
    "batch_size",
    "num_experts",
    "num_sampled",
    "amp",
    "cutoffs",
    "vocab",
    "min_freq",
    "max_vocab",
    "model",
    "num_layers",
    "dropout",
    "dropout_input",
    "dropout_hidden",
    "dropout_inner_input",
    "dropout_last_input",
    "optimizer",
    "lr_decay",
    "ntasgd",
    "asgd",
    "nonmono",
    "when",
    "epochs",
    "bptt",
    "shuffle",
    "max_seq_len_delta",
}


def device_count(config: Config) -> int | None:
    """Number of devices that the run asks for; None where it takes every GPU (the mixture)."""
    return config.devices.count if config.devices.count or config.model.num_experts else 1


def vocabulary_problems(config: Config, vocab_size: int, sources: Mapping[str, str] | None = None) -> list[str]:
    """What does not fit a vocabulary of that size, a line each."""
    model, problems = config.model, []

    def refuse(name: str, value: Any, fix: str) -> None:
        named = _named(name, value, sources or {})
        problems.append(f"{named}: must be below the number of words in the vocabulary, {vocab_size}; {fix}")

    if model.num_sampled is not None and model.num_sampled >= vocab_size:
        refuse("num_sampled", model.num_sampled, "lower it, or leave it out for the full softmax")
    if model.cutoffs is not None and model.cutoffs[-1] >= vocab_size:
        refuse("cutoffs", model.cutoffs, "lower the last one, or leave it out")
    return problems


def share_problems(config: Config, num_devices: int, sources: Mapping[str, str] | None = None) -> list[str]:
    """What cannot be shared out evenly over so many devices, a line each."""
    problems = []
    for name in ("batch_size", "small_batch_size"):
        size = get(config, name)
        if size is not None and size % num_devices:
            below = size // num_devices * num_devices
            fix = f"use {below} or {below + num_devices}" if below else f"use {num_devices}"
            named = _named(name, size, sources or {})
            problems.append(f"{named}: must be a multiple of the number of devices, {num_devices}; {fix}")
    return problems


def _device_problems(devices: DeviceConfig, sources: Mapping[str, str], count: int | None) -> list[str]:
    problems = []

    def named(name: str) -> str:
        return _named(name, getattr(devices, name), sources)

    def refuse_both(one: str, other: str) -> None:
        problems.append(f"{named(one)} with {named(other)}: one contradicts the other; leave one of them out")

    if devices.cpus is not None:
        for name in ("gpus", "cuda", "single_gpu"):
            if getattr(devices, name) not in (None, False):
                refuse_both(name, "cpus")
    if devices.gpus is not None:
        if -1 in devices.gpus:
            problems.append(f"{named('gpus')}: -1 means the CPU and goes with no GPU; leave -1 or the GPUs out")
        if devices.cuda is False:
            refuse_both("gpus", "cuda")
        if devices.single_gpu and len(devices.gpus) > 1:
            refuse_both("gpus", "single_gpu")
    if devices.single_gpu and devices.cuda is False:
        refuse_both("single_gpu", "cuda")

    if devices.kvstore == "dist_async":
        problems.append(
            f"{named('kvstore')}: workers would train on stale parameters, and no run could be repeated; use dist_sync"
        )
    if devices.horovod:
        if devices.kvstore is not None:
            refuse_both("horovod", "kvstore")
        if count is not None and count > 1:
            problems.append(
                f"{named('horovod')}: each process has one device, not {count}; name one, and start more processes, as "
                "in horovodrun -np 4"
            )
    elif devices.gctype == "fp16":
        problems.append(f"{named('gctype')}: only Horovod sends half precision; add --horovod, or use --gctype 2bit")
    if count == 1 and not devices.has_workers:
        reason = "one device exchanges no gradients; name several, as in --gpus 0,1 or --cpus 2, or leave it out"
        if devices.gctype == "2bit":
            problems.append(f"{named('gctype')}: nothing to compress, {reason}")
        if devices.kvstore is not None:
            problems.append(f"{named('kvstore')}: nothing to add up, {reason}")
    if devices.gctype == "2bit" and devices.kvstore in ("local", "nccl"):
        cannot = f"{devices.kvstore} cannot compress"
        problems.append(f"{named('gctype')} with {named('kvstore')}: {cannot}; use --kvstore device")
    if devices.kvstore == "nccl" and (devices.cpus is not None or devices.cuda is False):
        which = "cpus" if devices.cpus is not None else "cuda"
        problems.append(f"{named('kvstore')} with {named(which)}: NCCL joins GPUs only; use --kvstore device")
    if devices.gctype != "2bit" and _is_asked_for("gcthreshold", devices.gcthreshold, sources):
        problems.append(
            f"{named('gcthreshold')}: has no effect without 2-bit compression; add --gctype 2bit, or leave it out"
        )
    return problems


def _named(name: str, value: Any, sources: Mapping[str, str]) -> str:
    """A flag with its value, as the user gave it, and its source where that was no flag."""
    source = sources.get(name, "")
    is_flag = source.startswith("flag ")
    flag = source[len("flag ") :] if is_flag else flag_of(name)
    if isinstance(value, bool):
        shown = flag if value else flag_of(f"no_{name}")
    else:
        shown = f"{flag} {show(value)}"
    return shown if is_flag or source in ("", "default") else f"{shown} ({source})"


def validate(config: Config, sources: Mapping[str, str] | None = None) -> list[str]:
    """Every rule that `config` breaks, a line each; empty if it is sound.

    Parameters
    ----------
    sources : mapping, optional
        Where each value comes from, as in `Resolved`, to name it in the messages.
    """
    sources = sources or {}
    problems: list[str] = []
    for name, declared in _fields().items():
        read_value(declared, get(config, name), flag_of(name), problems)
    if problems:
        return problems

    count = device_count(config)
    problems += share_problems(config, count or 1, sources)
    if config.data.vocab is not None:
        for name in ("min_freq", "max_vocab"):
            if get(config, name) is not None:
                named = _named(name, get(config, name), sources)
                problems.append(f"{named} with --vocab: the file already names every word; leave one of them out")
    problems += _contradictions(config, sources) + _without_effect(config, sources)
    return problems + _device_problems(config.devices, sources, count)


def _contradictions(config: Config, sources: Mapping[str, str]) -> list[str]:
    """Knobs of model and optimiser that cannot both be meant."""
    problems = []

    def refuse(name: str, other: str, reason: str, fix: str = "leave one of them out") -> None:
        both = " with ".join(_named(n, get(config, n), sources) for n in (name, other))
        problems.append(f"{both}: {reason}; {fix}")

    optim = config.optim
    if optim.ntasgd and optim.asgd:
        refuse("ntasgd", "asgd", "averaging starts either when validation stops improving or at once")
    for averaging in ("ntasgd", "asgd"):
        if get(config, averaging):
            if optim.optimizer != "sgd":
                fix = "use --optimizer sgd, and a --lr for it"
                refuse(averaging, "optimizer", "the weights are averaged under SGD only", fix)
            if optim.lr_decay is not None:
                fix = f"use --lr-decay none, or {flag_of(f'no_{averaging}')}"
                refuse(averaging, "lr_decay", "averaging takes the place of a falling learning rate", fix)
    if optim.shuffle and optim.max_seq_len_delta is not None:
        refuse("shuffle", "max_seq_len_delta", "shuffled windows are all of one length")
    model = config.model
    if model.tied and not model.num_experts and model.last_hidden_size not in (None, model.embed_size):
        reason = f"a tied output layer needs the last layer as wide as the embedding, {model.embed_size}"
        refuse("last_hidden_size", "tied", reason, "leave one of them out, or mix softmaxes with --n-experts K")
    one_head = "each is an output layer of its own"
    for name, other in itertools.combinations(("num_experts", "num_sampled", "cutoffs"), 2):
        if get(config, name) is not None and get(config, other) is not None:
            refuse(name, other, one_head)
    if model.num_sampled is not None and config.training.amp == "bfloat16":
        reason = "bfloat16 is for the products of the whole output layer, of which a sample computes none"
        refuse("amp", "num_sampled", reason, "leave one of them out, or use --cutoffs")
    if model.cutoffs is not None:
        if model.tied:
            reason = "the rarer words have vectors that are narrower than the embedding's, so they cannot be the same"
            refuse("tied", "cutoffs", reason, "use --no-tied, or --num-sampled, which goes with --tied")
        width, num_tails = model.layer_sizes[-1], len(model.cutoffs)
        if width < TAIL_FACTOR**num_tails:
            named = _named("cutoffs", model.cutoffs, sources)
            problems.append(
                f"{named}: the last layer has {width} units, too few to be divided by {TAIL_FACTOR} {num_tails} times; "
                f"name fewer, or raise --nhid to {TAIL_FACTOR**num_tails} or more"
            )
    small, batch_size = optim.small_batch_size, config.training.batch_size
    if small is not None and batch_size % small:
        divisors = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
        fix = f"use {', '.join(map(str, divisors))}"
        refuse("small_batch_size", "batch_size", "the batch must be made of such parts", fix)
    if model.cell != "lstm":
        for name in ("dropout_candidate", "layer_norm"):
            if get(config, name):
                refuse(name, "model", "only an LSTM has it")
    return problems


def _without_effect(config: Config, sources: Mapping[str, str]) -> list[str]:
    """Knobs that a flag or the user's file sets, and that do nothing beside the others."""
    model, optim, training = config.model, config.optim, config.training
    idle: dict[str, str] = {}
    if not (optim.ntasgd or optim.asgd):
        idle["nonmono"] = "add --ntasgd"
    if model.num_layers == 1:
        idle["dropout_hidden"] = idle["dropout_inner_input"] = "there is one layer; raise --num-layers"
    if not any([model.dropout, *model.layer_dropouts]):
        idle["locked"] = "there is no dropout that it could lock; add --dropout P"
    if not model.num_experts:
        idle["dropout_latent"] = "there is one softmax; add --n-experts K"
    if training.bptt == 1:
        idle["beta"] = "a window of one word has no change over time; raise --bptt"
    if optim.when is not None and min(optim.when) >= training.epochs:
        idle["when"] = f"training ends after {training.epochs} epochs; name an earlier one"
    return [
        f"{_named(name, get(config, name), sources)}: has no effect here, {reason}, or leave it out"
        for name, reason in idle.items()
        if get(config, name) not in (None, False, 0) and _is_asked_for(name, get(config, name), sources)
    ]


def _is_asked_for(name: str, value: Any, sources: Mapping[str, str]) -> bool:
    """Whether a flag, or a file that differs from the default, sets a value; a recipe's or a run's nobody asked for."""
    source = sources.get(name, "")
    is_own = value != _fields()[name].default and source != "default" and not source.startswith(("recipe ", "run "))
    return source.startswith("flag ") or is_own
