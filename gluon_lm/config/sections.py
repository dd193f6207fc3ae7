"""Every knob, declared once: flag, YAML key, help, rule and default are all read from its field here."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import yaml

from ..errors import ConfigError
from .kinds import (
    ascending,
    choice,
    integer,
    integers,
    key_of,
    option,
    optional,
    pathname,
    pathnames,
    read_value,
    real,
    show,
    switch,
    text,
)

KVSTORES = ("device", "local", "nccl", "dist_sync", "dist_device_sync", "dist_async")
COMPRESSIONS = ("none", "2bit", "fp16")
OPTIMIZER_LR = {"sgd": 20.0, "adam": 1e-3}  # where an optimiser is chosen and no learning rate
OPTIMIZER_STATES = {"sgd": 0, "adam": 2}  # arrays per parameter, of the same size
TAIL_FACTOR = 4  # by which the vectors of each group of rarer words are narrower (Grave et al. 2017)


class Cell(NamedTuple):
    """What sets the recurrent cells apart: gates a unit has, and arrays of state a layer carries."""

    gates: int
    num_states: int


CELLS = {
    "lstm": Cell(gates=4, num_states=2),
    "gru": Cell(gates=3, num_states=1),
    "rnn_tanh": Cell(gates=1, num_states=1),
    "rnn_relu": Cell(gates=1, num_states=1),
}
REGULARISED_CELLS = {"awd-lstm": "lstm", "awd-gru": "gru", "awd-rnn": "rnn_tanh"}
MODELS = (*CELLS, *REGULARISED_CELLS)


@dataclass(frozen=True)
class Section:
    """Base of the dataclasses whose fields are made with `option`, which reads and checks the values given.

    Raises
    ------
    ConfigError
        With every value that breaks its rule.
    """

    def __post_init__(self) -> None:
        problems: list[str] = []
        for declared in dataclasses.fields(self):
            value = getattr(self, declared.name)
            if value is not declared.default:
                label = f"{type(self).__name__}.{declared.name}"
                object.__setattr__(self, declared.name, read_value(declared, value, label, problems))
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True)
class DataConfig(Section):
    """The text and its vocabulary."""

    data: tuple[str, ...] = option(
        ("wikitext-2",),
        pathnames(
            1,
            3,
            rule="one corpus, folder or file, or three files (training, validation, test)",
            metavar="DATA",
        ),
        "corpus (wikitext-2, wikitext-103, ptb, sotu), or your own text: a folder, one file, or three files",
    )
    data_dir: str = option("./data", pathname("DIR"), "where the corpora are, or are downloaded to")
    tokenizer: str | None = option(
        None,
        optional(choice("whitespace", "words")),
        "how text becomes words (default: the corpus's own; whitespace for your text)",
    )
    min_freq: int | None = option(None, optional(integer()), "leave out words that occur less often in training")
    max_vocab: int | None = option(
        None, optional(integer()), "largest vocabulary, <unk> and <eos> included; the most frequent words are kept"
    )
    vocab: str | None = option(None, optional(pathname("FILE")), "vocabulary file to use instead of the training words")


@dataclass(frozen=True)
class ModelConfig(Section):
    """The architecture and its dropouts."""

    model: str = option("lstm", choice(*MODELS), "type of recurrent network")
    embed_size: int = option(200, integer(), "size of the word embeddings", "emsize", "embed_dim", "emb_size")
    hidden_size: int = option(200, integer(), "hidden units in each layer", "nhid", "hidden_dim", "num_units")
    num_layers: int = option(2, integer(), "number of recurrent layers", "nlayers", "encoder_layers")
    tied: bool = option(False, switch(), "share one matrix between the embedding and the output layer", "weight_tied")
    init: str = option(
        "uniform",
        choice("uniform", "xavier"),
        "initial weights: uniform as in PyTorch's example, xavier as in MXNet's",
    )
    num_experts: int | None = option(None, optional(integer()), "softmaxes to mix", "n_experts")
    num_sampled: int | None = option(
        None,
        optional(integer()),
        "train with this many words, drawn for each window, instead of the whole vocabulary (sampled softmax)",
    )
    cutoffs: tuple[int, ...] | None = option(
        None,
        optional(ascending(1, "word ids in rising order, each a whole number, 1 or more")),
        "first word id of each group of rarer words, whose vectors are a quarter as wide as those of the group before "
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
        "dropout on the last layer's output; also the default of --dropout-input and --dropout-hidden",
        keep="encoder_last_output_keep_prob",
    )
    dropout_input: float | None = option(
        None, optional(real(0, 1)), "dropout on the embedded words (default: as --dropout)", "dropouti", "dropout_i"
    )
    dropout_hidden: float | None = option(
        None,
        optional(real(0, 1)),
        "dropout between the layers (default: as --dropout)",
        "dropouth",
        "dropout_h",
        keep="encoder_dp_output_keep_prob",
    )
    locked: bool | None = option(
        None,
        optional(switch()),
        "draw one dropout mask for all words of a window, not one per word (default: where --dropouti or --dropouth "
        "is given, and for awd models)",
    )
    dropout_embed: float = option(0.0, real(0, 1), "dropout of whole words at the input", "dropoute", "dropout_e")
    dropout_embed_elements: float = option(
        0.0,
        real(0, 1),
        "dropout of elements of the input word vectors, the same elements wherever a word occurs",
        keep="encoder_emb_keep_prob",
    )
    dropout_inner_input: float = option(
        0.0,
        real(0, 1),
        "dropout on the input of every layer but the last, in addition to the above",
        keep="encoder_dp_input_keep_prob",
    )
    dropout_last_input: float = option(
        0.0,
        real(0, 1),
        "dropout on the input of the last layer, in addition to the above",
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
        """The recurrent cell: a key of `CELLS`."""
        return REGULARISED_CELLS.get(self.model, self.model)

    @property
    def layer_sizes(self) -> list[int]:
        """Width of each layer, first to last."""
        default = self.embed_size if self.tied or self.num_experts else self.hidden_size
        return [self.hidden_size] * (self.num_layers - 1) + [self.last_hidden_size or default]

    @property
    def summary(self) -> str:
        """The architecture in a few words: ``lstm 200x200 tied``."""
        words = [self.model, "x".join(map(str, self.layer_sizes))]
        if self.tied:
            words.append("tied")
        if self.num_experts:
            words.append(f"mixture of {self.num_experts}")
        return " ".join(words)

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
        """Whether the output layer needs word ids in order of falling frequency."""
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
        """Probability of dropping an element of each layer's input, first to last, from all the rates above combined.

        Independent masks in succession act as one whose keep probability is the product of theirs.
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
    lr: float = option(
        None,
        real(0, above=True),
        "learning rate at the start (default: 20 for sgd, 0.001 for adam)",
        "learning_rate",
    )
    lr_decay: float | None = option(
        None,
        optional(real(1, above=True)),
        "divide the learning rate by this whenever validation brings no new best; none: never (default: none, but 4 in "
        "recipes lm and mxnet)",
        "decay",
    )
    clip_norm: float | None = option(
        0.25,
        optional(real(0, above=True)),
        "clip the norm of the whole gradient to this; none: do not clip",
        "clip",
        "grad_clip",
        "max_grad_norm",
    )
    weight_decay: float = option(0.0, real(0), "weight decay", "wdecay", "wd")
    alpha: float = option(0.0, real(0), "weight of the activation regularisation")
    beta: float = option(0.0, real(0), "weight of the temporal activation regularisation")
    ntasgd: bool = option(False, switch(), "average the weights once validation stops improving (NT-ASGD)")
    asgd: bool = option(
        False, switch(), "average the weights from the first step on, and end when validation stops improving"
    )
    nonmono: int = option(
        5,
        integer(),
        "averaging starts, or --asgd ends, when the validation loss is above the lowest of those more than N "
        "evaluations ago",
    )
    when: tuple[int, ...] | None = option(
        None,
        optional(integers(1, "different epochs, each a whole number, 1 or more", "+"), -1),
        "epochs after which the learning rate is divided by 10, until the weights are averaged",
    )
    max_seq_len_delta: int | None = option(
        None, optional(integer(0)), "windows of random length around --bptt, at most this much longer"
    )
    random_start: bool = option(
        False, switch(), "cut the text into windows at a different place in each epoch", "rand_start"
    )
    shuffle: bool = option(
        False, switch(), "windows in random order, each from the zero state, instead of in the order of the text"
    )
    small_batch_size: int | None = option(
        None, optional(integer(), -1), "streams processed at once, with gradients accumulated over the batch"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr is None:
            object.__setattr__(self, "lr", OPTIMIZER_LR[self.optimizer])


@dataclass(frozen=True)
class TrainingConfig(Section):
    """How long training takes, in batches of what size, and what is recorded."""

    epochs: int = option(40, integer(), "passes over the training text", "epoch", "num_epochs")
    max_steps: int | None = option(None, optional(integer()), "stop after this many steps")
    batch_size: int = option(20, integer(), "streams of text read side by side, over all devices together")
    bptt: int = option(35, integer(), "words in a window, through which gradients flow back")
    tf32: bool = option(
        True,
        switch(),
        "let GPUs of compute capability 8.0 or higher round the operands of float32 products to TF32",
    )
    amp: str = option(
        "none",
        choice("none", "float16", "bfloat16"),
        "mixed precision: matrix products in float16 (GPU), or the output layer's in bfloat16 (CPU with AVX512-BF16)",
    )
    seed: int = option(1111, integer(0, 2**31 - 1), "seed of every random draw", "random_seed")
    log_interval: int = option(200, integer(), "steps between log lines", "print_loss_steps")
    eval_every: int | None = option(
        None, optional(integer()), "steps between evaluations (default: each epoch)", "eval_steps"
    )
    eval_batch_size: int = option(10, integer(), "streams of the validation and test text during training")
    patience: int | None = option(None, optional(integer()), "stop after this many evaluations with no new best")
    checkpoint_every: int | None = option(
        None,
        optional(integer()),
        "steps between checkpoints (default: at each evaluation)",
        "save_checkpoint_steps",
    )
    keep_checkpoints: int = option(2, integer(), "newest checkpoints to keep; the best one always stays")
    tensorboard: bool = option(
        False, switch(), "write metrics and configuration for TensorBoard too, to RUN/tensorboard"
    )
    gen_word_len: int = option(0, integer(0), "words to generate when training is done")


@dataclass(frozen=True)
class DeviceConfig(Section):
    """Where it runs, and how gradients are exchanged. By default: the first usable GPU, else one CPU context."""

    gpus: tuple[int, ...] | None = option(
        None,
        optional(integers(-1, "GPU numbers such as 0 or 0,1,2,3, or -1 for the CPU")),
        "GPUs to use; -1: the CPU (default: the first usable one, else the CPU)",
        "gpu",
    )
    cpus: int | None = option(
        None, optional(integer()), "run on this many CPU contexts (default: one, where there is no GPU)"
    )
    cuda: bool | None = option(
        None,
        optional(switch()),
        "require a GPU; --no-cuda: use the CPU (default: a GPU where there is one)",
        "accel",
    )
    single_gpu: bool = option(False, switch(), "use one GPU even where the recipe takes all")
    kvstore: str | None = option(
        None,
        optional(choice(*KVSTORES)),
        "how several devices sum their gradients: device, local or nccl (GPUs) in this process, dist_sync or "
        "dist_device_sync through parameter servers, which python -m gluon_lm.launch starts (default: device, where "
        "there are several)",
    )
    horovod: bool = option(False, switch(), "train in several processes, one device each, started by horovodrun")
    gctype: str = option(
        "none", choice(*COMPRESSIONS), "compression of the gradients between devices (fp16: with --horovod)"
    )
    gcthreshold: float = option(0.5, real(0, above=True), "threshold of the 2-bit compression")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus == (-1,) and not self.cuda:
            object.__setattr__(self, "gpus", None)
            object.__setattr__(self, "cuda", False)

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
class RunOptions(Section):
    """What `train` does with its run folder and its configuration."""

    save: str | None = option(None, optional(pathname("RUN")), "run folder to write (default: under runs/)")
    resume: str | None = option(None, optional(pathname("RUN")), "continue this run from its newest checkpoint")
    init_from: str | None = option(
        None,
        optional(pathname("RUN")),
        "begin a new run with the weights, vocabulary and configuration of this one, on its text or on another",
    )
    continue_train: bool = option(False, switch(), "continue the run that --save names")
    overwrite: bool = option(False, switch(), "replace the run folder if it exists")
    config: str | None = option(
        None, optional(pathname("FILE")), "YAML file with any of the values below; flags take precedence"
    )
    recipe: str | None = option(
        None,
        optional(text("NAME")),
        "values to start from: lm, mxnet, demo, awd, mos or another file of configs/ (default: lm, or what the model "
        "calls for, awd or mos)",
    )
    print_config: bool = option(False, switch(), "print every value and where it comes from, and stop")
    dry_run: bool = option(False, switch(), "check everything and build the model, but do not train")


@dataclass(frozen=True)
class Config:
    """Everything that decides the result of a run. YAML and flags are flat: a name occurs in one section only."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    devices: DeviceConfig = field(default_factory=DeviceConfig)

    def to_yaml(self, sources: Mapping[str, str] | None = None, recipe: str | None = None) -> str:
        """The configuration as flat YAML that `read_config` reads back equal.

        Parameters
        ----------
        sources : mapping, optional
            Where each value comes from, by field name; written after the value as a comment.
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


def origins_in(text: str) -> dict[str, str]:
    """Where each value comes from, by field name, as `Config.to_yaml` wrote it after the value."""
    return dict(re.findall(r"^(\w+): .*  # (.+)$", text, re.MULTILINE))


SECTIONS: dict[str, type[Section]] = {
    "data": DataConfig,
    "model": ModelConfig,
    "optim": OptimConfig,
    "training": TrainingConfig,
    "devices": DeviceConfig,
}


def flag_of(name: str) -> str:
    """The flag of a field or alias: ``hidden_size`` -> ``--hidden-size``."""
    return "--" + name.replace("_", "-")


@cache
def fields_by_name() -> dict[str, dataclasses.Field[Any]]:
    """Every field of every section, by name."""
    return {f.name: f for cls in SECTIONS.values() for f in dataclasses.fields(cls)}


@cache
def names_by_key() -> dict[str, str]:
    """Field name of every YAML key, in its hyphenated form."""
    return {key_of(name): f.name for f in fields_by_name().values() for name in (f.name, *f.metadata["aliases"])}


@cache
def keep_names() -> dict[str, str]:
    """Field name of every YAML key that holds a probability of keeping, in its hyphenated form."""
    return {key_of(f.metadata["keep"]): f.name for f in fields_by_name().values() if f.metadata["keep"]}


def get(config: Config, name: str) -> Any:
    """The value of the field `name`, whichever section it is in."""
    return next(values[name] for values in (vars(getattr(config, s)) for s in SECTIONS) if name in values)
