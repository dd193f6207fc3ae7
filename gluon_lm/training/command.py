"""A resolved command line of `train`, and which settings of a run may change when it continues."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from ..config import Config, Settings, get, origins_in, resolve, show, validate
from ..data import Corpus, Vocabulary, load_corpus
from ..errors import ConfigError
from ..logs import Verbosity
from .run_folder import RunFolder

# What a run that begins with the model of another must take from it: the architecture, and how text becomes ids.
FIXED = frozenset(
    {
        *("tokenizer", "min_freq", "max_vocab", "vocab"),
        *("model", "embed_size", "hidden_size", "num_layers", "tied", "init"),
        *("num_experts", "last_hidden_size", "layer_norm", "cutoffs"),
    }
)
# What must stay when a run continues: in addition, what is trained, and on which windows in which order. The rest (the
# place of the text, devices, durations and intervals, regularisation) may change.
FIXED_ON_RESUME = FIXED | {
    *("num_sampled", "locked", "optimizer", "asgd"),
    *("max_seq_len_delta", "random_start", "shuffle", "batch_size", "bptt", "seed"),
}


@dataclass(frozen=True)
class TrainCommand:
    """A `train` command line, resolved.

    Attributes
    ----------
    config : Config
    sources : dict of str to str
        Where each value comes from, by field name; the recipe's source as ``recipe``.
    recipe : str or None
        Name of the recipe.
    save, resume, init_from : str or None
        The run folder to write, the run to continue, and the one to begin with, as the user named them. With one of
        the last two, `config` holds the command line alone, unchecked: `over` applies it to that run's configuration.
    overwrite, print_config, dry_run : bool
    verbosity : Verbosity
    settings : Settings
        The flags that were given.
    stem : str or None
        What the name of a new run begins with if `save` does not name it; the time follows.
    kept_origins : mapping of str to str
        For the values that are now those of the run being continued: where they came from when it began.
    """

    config: Config
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    recipe: str | None = None
    save: str | None = None
    resume: str | None = None
    init_from: str | None = None
    overwrite: bool = False
    print_config: bool = False
    dry_run: bool = False
    verbosity: Verbosity = Verbosity.NORMAL
    settings: Settings = dataclasses.field(default_factory=dict)
    stem: str | None = None
    kept_origins: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def base(self) -> str | None:
        """The run whose configuration the flags change."""
        return self.init_from if self.resume is None else self.resume

    def check_place(self) -> None:
        """Refuse a new run where it cannot be written, before anything is computed.

        Raises
        ------
        ConfigError
            As `RunFolder.check_free`.
        """
        own_name = Path("runs") / self.config.model.model
        run = RunFolder.stamped(self.stem or own_name) if self.save is None else RunFolder(self.save)
        run.check_free(self.overwrite)

    def load_corpus(self, vocabulary: Vocabulary | None) -> Corpus:
        """The text, read with the vocabulary of the run that it continues or begins with; None: no other run."""
        of_run = vocabulary is not None and "data" not in self.settings
        return load_corpus(self.config.data, vocabulary=vocabulary, of_run=of_run)

    def describe(self) -> str:
        """The output of ``--print-config``: YAML with the source of each value after it."""
        return self.config.to_yaml({**self.sources, **self.kept_origins}, self.recipe)

    def with_tokenizer(self, tokenizer: str, corpus: str) -> TrainCommand:
        """With the tokenizer that the corpus was read with, so that other text is later read in the same way."""
        if self.config.data.tokenizer == tokenizer:
            return self
        data = dataclasses.replace(self.config.data, tokenizer=tokenizer)
        config = dataclasses.replace(self.config, data=data)
        return dataclasses.replace(self, config=config, sources={**self.sources, "tokenizer": f"corpus {corpus}"})

    def with_lr(self, lr: float) -> TrainCommand:
        """With the learning rate that a checkpoint was written under."""
        config = dataclasses.replace(self.config, optim=dataclasses.replace(self.config.optim, lr=lr))
        kept_origins = {name: origin for name, origin in self.kept_origins.items() if name != "lr"}
        sources = {**self.sources, "lr": "checkpoint"}
        return dataclasses.replace(self, config=config, sources=sources, kept_origins=kept_origins)

    def over(self, config_file: Path, fixed: Set[str], is_same_run: bool = True) -> TrainCommand:
        """The same command line over another YAML file: the ``config.yaml`` of the run being continued.

        Parameters
        ----------
        config_file : Path
        fixed : set of str
            Fields that may not differ from the run's.
        is_same_run : bool
            Whether the run itself continues, so that its values keep their origins; for another, they are this run's.

        Raises
        ------
        ConfigError
            As `parse_train`, and for every fixed field that differs.
        """
        before = resolve(config_file=config_file, default_recipe=None).config
        was_locked = before.model.has_locked_dropout
        problems: list[str] = []
        settings: Settings = {}
        for name, setting in self.settings.items():
            value, old = setting.value, was_locked if name == "locked" else get(before, name)
            if value == old or name not in fixed:
                settings[name] = setting
                continue
            flag = setting.flag + ("" if isinstance(value, bool) else f" {show(value)}")
            was = f"{config_file.parent} was trained with {show(old)}"
            problems.append(f"{flag}: {was}; leave the flag out, or train a new run")
        resolved = resolve(settings, config_file, default_recipe=None, fixed=fixed)
        if "locked" in fixed and "locked" not in settings:  # whose default depends on rates that may change
            model = dataclasses.replace(resolved.config.model, locked=was_locked)
            if model.has_locked_dropout != resolved.config.model.has_locked_dropout:
                resolved = dataclasses.replace(resolved, config=dataclasses.replace(resolved.config, model=model))
        run = f"run {config_file.parent}"
        own = {setting.source for setting in settings.values()}
        sources = {name: source if source in own else run for name, source in resolved.sources.items()}
        problems += validate(resolved.config, sources, fixed)
        if problems:
            raise ConfigError(problems)
        origins = origins_in(config_file.read_text(encoding="utf-8")) if is_same_run else {}
        kept = {name: origins[name] for name, source in sources.items() if source == run and name in origins}
        if get(resolved.config, "locked") != get(before, "locked"):
            kept["locked"] = "as the run began"
        return dataclasses.replace(self, **{**vars(resolved), "sources": sources}, kept_origins=kept)
