"""Rules between the fields of a configuration: contradictions, settings without effect, uneven shares."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

from .kinds import show
from .sections import TAIL_FACTOR, Config, DeviceConfig, fields_by_name, flag_of, get


def device_count(config: Config) -> int | None:
    """Number of devices that the run asks for; None where it takes every GPU (the mixture)."""
    return config.devices.count if config.devices.count or config.model.num_experts else 1


def vocabulary_problems(config: Config, vocab_size: int, sources: Mapping[str, str] | None = None) -> list[str]:
    """What does not fit a vocabulary of that size, a line each."""
    model, problems = config.model, []

    def refuse(name: str, value: Any, fix: str) -> None:
        named = named_setting(name, value, sources or {})
        problems.append(f"{named}: must be below the number of words in the vocabulary, {vocab_size}; {fix}")

    if model.num_sampled is not None and model.num_sampled >= vocab_size:
        refuse("num_sampled", model.num_sampled, "lower it, or leave it out for the full softmax")
    if model.cutoffs is not None and model.cutoffs[-1] >= vocab_size:
        refuse("cutoffs", model.cutoffs, "lower the last one, or leave it out")
    return problems


def share_problems(config: Config, num_devices: int, sources: Mapping[str, str] | None = None) -> list[str]:
    """What cannot be divided evenly among so many devices: at most one line, with the numbers that are possible."""
    batch_size, small = config.training.batch_size, config.optim.small_batch_size
    uneven = [name for name in ("small_batch_size", "batch_size") if (get(config, name) or 0) % num_devices]
    if not uneven:
        return []
    size = get(config, uneven[0])
    fix = f"make that {_nearest(num_devices, _divisors(math.gcd(batch_size, small or 0)))}"
    parts = _parts(batch_size, num_devices)
    if small is None:
        batches = range(num_devices, batch_size + 2 * num_devices, num_devices)
        fix += f", or in a new run use --batch-size {_nearest(batch_size, batches)}"
    elif parts:
        fix += f", or use --small-batch-size {_nearest(small, parts)}"
    named = named_setting(uneven[0], size, sources or {})
    return [f"{named}: must be a multiple of the number of devices, {num_devices}; {fix}"]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _parts(batch_size: int, num_devices: int) -> list[int]:
    """The sizes that the parts of a batch may have."""
    return [n for n in _divisors(batch_size) if n % num_devices == 0]


def _nearest(number: int, possible: Sequence[int]) -> str:
    """The possible numbers next to one that is not: the one below and the one above, as far as there are any."""
    below, above = [n for n in possible if n < number], [n for n in possible if n > number]
    return " or ".join(map(str, below[-1:] + above[:1]))


def device_problems(devices: DeviceConfig, sources: Mapping[str, str], count: int | None) -> list[str]:
    """What is wrong with devices of which so many are asked for (None: the machine decides), a line each."""
    problems = []

    def named(name: str) -> str:
        return named_setting(name, getattr(devices, name), sources)

    def refuse_both(one: str, other: str) -> None:
        problems.append(f"{named(one)} with {named(other)}: one contradicts the other; leave one of them out")

    if devices.cpus is not None:
        for name in ("gpus", "cuda", "single_gpu"):
            if getattr(devices, name) not in (None, False):
                refuse_both(name, "cpus")
    if devices.gpus is not None:
        if -1 in devices.gpus:
            problems.append(f"{named('gpus')}: -1 means the CPU and excludes GPUs; leave -1 or the GPUs out")
        if devices.cuda is False:
            refuse_both("gpus", "cuda")
        if devices.single_gpu and len(devices.gpus) > 1:
            refuse_both("gpus", "single_gpu")
    if devices.single_gpu and devices.cuda is False:
        refuse_both("single_gpu", "cuda")

    if devices.kvstore == "dist_async":
        problems.append(
            f"{named('kvstore')}: workers would train on stale parameters, and runs not be reproducible; use dist_sync"
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
        fix = "add --horovod, or use --gctype none" if devices.kvstore is None else "use --gctype none"
        problems.append(f"{named('gctype')}: only Horovod sends half precision; {fix}")
    if count == 1 and not devices.has_workers:
        reason = "one device exchanges no gradients; name several, as in --gpus 0,1 or --cpus 2, or use none"
        if devices.gctype == "2bit":
            problems.append(f"{named('gctype')}: nothing to compress, {reason}")
        if devices.kvstore is not None:
            problems.append(f"{named('kvstore')}: nothing to sum, {reason}")
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


def validate(config: Config, sources: Mapping[str, str] | None = None, fixed: Set[str] = frozenset()) -> list[str]:
    """Every rule between its fields that `config` breaks, a line each; empty if it is sound.

    Parameters
    ----------
    sources : mapping, optional
        Where each value comes from, as in `Resolved`, to name it in the messages.
    fixed : set of str
        Fields that a run must keep: what would change one of them is advised for a new run.
    """
    sources = sources or {}
    count = device_count(config)
    problems = share_problems(config, count or 1, sources)
    if config.data.vocab is not None:
        for name in ("min_freq", "max_vocab"):
            if get(config, name) is not None:
                named = named_setting(name, get(config, name), sources)
                problems.append(f"{named} with --vocab: the file already names every word; leave one of them out")
    problems += _contradictions(config, sources, fixed) + _without_effect(config, sources, fixed)
    return problems + device_problems(config.devices, sources, count)


def _ways_out(fixed: Set[str], *ways: tuple[str, str]) -> str:
    """Fixes, each with the field that it changes, in words. Without a flag that was given, a run is always in order."""
    now = [way for way, name in ways if name not in fixed] or ["leave it out"]
    later = [f"in a new run {way}" for way, name in ways if name in fixed]
    return ", or ".join(now + later)


def _contradictions(config: Config, sources: Mapping[str, str], fixed: Set[str]) -> list[str]:
    """Settings of model and optimiser that exclude each other."""
    problems = []

    def refuse(name: str, other: str, reason: str, fix: str = "leave one of them out") -> None:
        both = " with ".join(named_setting(n, get(config, n), sources) for n in (name, other))
        problems.append(f"{both}: {reason}; {fix}")

    optim = config.optim
    if optim.ntasgd and optim.asgd:
        refuse("ntasgd", "asgd", "averaging starts either when validation stops improving or at once")
    for averaging in ("ntasgd", "asgd"):
        if get(config, averaging):
            if optim.optimizer != "sgd":
                fix = _ways_out(fixed, ("use --optimizer sgd, and a --lr for it", "optimizer"))
                refuse(averaging, "optimizer", "the weights are averaged under SGD only", fix)
            if optim.lr_decay is not None:
                # A run that is finetuned, or resumed, cannot do without averaging from the first step on.
                fix = "use --lr-decay none" + (", or --no-ntasgd" if averaging == "ntasgd" else "")
                refuse(averaging, "lr_decay", "averaging takes the place of a falling learning rate", fix)
    if optim.asgd and optim.when is not None:
        reason = "the learning rate stays as it is while the weights are averaged"
        refuse("asgd", "when", reason, _ways_out(fixed, ("use --when none", "when"), ("use --no-asgd", "asgd")))
    if optim.shuffle and optim.max_seq_len_delta is not None:
        refuse("shuffle", "max_seq_len_delta", "shuffled windows all have the same length")
    model = config.model
    if model.tied and not model.num_experts and model.last_hidden_size not in (None, model.embed_size):
        reason = f"a tied output layer needs the last layer as wide as the embedding, {model.embed_size}"
        refuse("last_hidden_size", "tied", reason, "leave one of them out, or mix softmaxes with --n-experts K")
    one_head = "each is an output layer of its own"
    for name, other in itertools.combinations(("num_experts", "num_sampled", "cutoffs"), 2):
        if get(config, name) is not None and get(config, other) is not None:
            refuse(name, other, one_head)
    if model.num_sampled is not None and config.training.amp == "bfloat16":
        reason = "bfloat16 applies to the products of the full output layer, which training on a sample does without"
        fix = _ways_out(fixed, ("leave one of them out", "amp"), ("use --cutoffs", "cutoffs"))
        refuse("amp", "num_sampled", reason, fix)
    if model.cutoffs is not None:
        if model.tied:
            reason = "the output vectors of rarer words are narrower than their embeddings, so they cannot be shared"
            refuse("tied", "cutoffs", reason, "use --no-tied, or --num-sampled, which goes with --tied")
        width, num_tails = model.layer_sizes[-1], len(model.cutoffs)
        if width < TAIL_FACTOR**num_tails:
            named = named_setting("cutoffs", model.cutoffs, sources)
            flag = "--nhid" if model.last_hidden_size is None else "--nhidlast"
            problems.append(
                f"{named}: the last layer has {width} units, too few to be divided by {TAIL_FACTOR} {num_tails} times; "
                f"name fewer, or raise {flag} to {TAIL_FACTOR**num_tails} or more"
            )
    small, batch_size = optim.small_batch_size, config.training.batch_size
    if small is not None and batch_size % small:
        parts = _parts(batch_size, device_count(config) or 1) or _divisors(batch_size)
        fix = f"use {', '.join(map(str, parts))}"
        refuse("small_batch_size", "batch_size", "the batch must be a multiple of it", fix)
    if model.cell != "lstm":
        for name in ("dropout_candidate", "layer_norm"):
            if get(config, name):
                refuse(name, "model", "only an LSTM has it")
    return problems


def _without_effect(config: Config, sources: Mapping[str, str], fixed: Set[str]) -> list[str]:
    """Settings that a flag or the user's file makes and that have no effect, given the others."""
    model, optim, training = config.model, config.optim, config.training
    idle: dict[str, tuple[str, str, str]] = {}  # why, and what would give it an effect: the fix and its field
    if not (optim.ntasgd or optim.asgd):
        way = ("add --ntasgd", "ntasgd") if optim.optimizer == "sgd" else ("add --ntasgd --optimizer sgd", "optimizer")
        idle["nonmono"] = ("the weights are not averaged", *way)
    if model.num_layers == 1:
        alone = ("there is one layer", "raise --num-layers", "num_layers")
        idle["dropout_inner_input"] = alone
        if not (model.num_experts and model.dropout_latent is None):
            idle["dropout_hidden"] = alone
        (width,) = model.layer_sizes
        if width != model.hidden_size:
            said = f"the one layer has {width} units, as --nhidlast or else --emsize says"
            idle["hidden_size"] = (said, "raise --nlayers", "num_layers")
    if not any([model.dropout, *model.layer_dropouts]):
        idle["locked"] = ("there is no dropout that it could lock", "add --dropout P", "dropout")
    if not model.num_experts:
        idle["dropout_latent"] = ("there is one softmax", "add --n-experts K", "num_experts")
    if training.bptt == 1 and not optim.max_seq_len_delta:
        idle["beta"] = ("a window of one word has no change over time", "raise --bptt", "bptt")
    if optim.when is not None and min(optim.when) >= training.epochs:
        idle["when"] = (f"training ends after {training.epochs} epochs", "name an earlier one", "when")
    return [
        f"{named_setting(name, get(config, name), sources)}: has no effect here, {reason}; "
        + _ways_out(fixed, (way, changes), ("leave it out", ""))
        for name, (reason, way, changes) in idle.items()
        if get(config, name) not in (None, False, 0) and _is_asked_for(name, get(config, name), sources)
    ]


def _is_asked_for(name: str, value: Any, sources: Mapping[str, str]) -> bool:
    """Whether a flag sets a value, or a file to other than the default; those of a recipe or a run do not count."""
    source = sources.get(name, "")
    if flag_within(source):
        return True
    if source == "default" or source.startswith(("recipe ", "run ")):
        return False
    return bool(value != fields_by_name()[name].default)


def flag_within(source: str) -> str | None:
    """The flag of a source such as ``flag --nhid``, as it was spelled; None for another source."""
    return source.removeprefix("flag ") if source.startswith("flag ") else None


def named_setting(name: str, value: Any, sources: Mapping[str, str]) -> str:
    """A flag with its value, as the user gave it, and its source if that was not a flag."""
    source = sources.get(name, "")
    given = flag_within(source)
    flag = given or flag_of(name)
    if isinstance(value, bool):
        shown = flag if value else flag_of(f"no_{name}")
    else:
        shown = f"{flag} {show(value)}"
    return shown if given or source in ("", "default") else f"{shown} ({source})"
