"""What holds for any text, configuration or checkpoint that can be thought of, and for any bytes in place of one."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import Counter
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest
import yaml
from hypothesis import assume, given, settings, strategies as st
from hypothesis.extra import numpy as arrays_of

from gluon_lm.config import SECTIONS, Config, Setting, get, read_config, resolve
from gluon_lm.data import Vocabulary
from gluon_lm.data.encoding import Cache, Text, build_vocabulary, encode_text
from gluon_lm.data.windows import TrainingWindows
from gluon_lm.errors import CheckpointError, ConfigError, DataError
from gluon_lm.files import digest_of, read_arrays, write_arrays
from gluon_lm.tracking import MetricsFile
from gluon_lm.training.checkpoint import (
    Checkpoint,
    TrainingState,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from gluon_lm.training.run_folder import RunFolder

FEW = settings(max_examples=30)


def is_one_line(error: Exception) -> bool:
    return bool(str(error).strip()) and "\n" not in str(error)


# ---------------------------------------------------------------- batching


@FEW
@given(st.data())
def test_each_token_is_predicted_once_whatever_the_workers_devices_and_parts(data):
    workers, devices, parts, width = (data.draw(st.integers(1, 3), label) for label in ("W", "D", "parts", "width"))
    num_streams = workers * devices * parts * width
    ids = np.arange(1, 1 + data.draw(st.integers(num_streams, 300), "tokens"), dtype=np.int32)
    bptt = data.draw(st.integers(1, 40), "bptt")
    delta, random_start = data.draw(st.none() | st.integers(0, 9), "delta"), data.draw(st.booleans(), "random start")
    epoch = TrainingWindows(
        ids, num_streams, bptt, eos=0, seed=data.draw(st.integers(0, 99)), max_seq_len_delta=delta,
        random_start=random_start,
    ).epoch(data.draw(st.integers(0, 3), "epoch"))  # fmt: skip
    pairs = Counter()
    for window in map(epoch.window, range(len(epoch))):
        for start in range(0, num_streams, width):  # what a device of a worker takes at once
            columns = window.columns(start, start + width)
            real = slice(columns.num_targets)
            pairs.update(zip(columns.tokens_TN.reshape(-1)[real], columns.targets_TN.reshape(-1)[real]))
    predicted = Counter(target for _, target in pairs.elements())
    assert predicted == Counter(ids.tolist())
    assert all(token in (0, target - 1) for token, target in pairs)
    assert sum(token == 0 for token, _ in pairs) == num_streams  # each stream begins once


# ---------------------------------------------------------------- configuration


def values_of(field):
    """Values that a field may have."""
    kind = field.metadata["kind"]
    if kind.is_switch:
        return st.booleans()
    if kind.metavar.startswith("{"):
        return st.sampled_from(kind.metavar.strip("{}").split(","))
    candidates = [1, 2, 7, 0.25, 0.5, 1.5, (3, 8), "name", ("text",), None, *([-1] if field.name == "gpus" else [])]
    return st.sampled_from([value for value in candidates if obeys(kind, value)])


def obeys(kind, value) -> bool:
    try:
        kind.read(value)
    except (ValueError, TypeError, ArithmeticError):
        return False
    return True


FIELDS = {f.name: f for section in SECTIONS.values() for f in dataclasses.fields(section)}
LAYERS = st.fixed_dictionaries({}, optional={name: values_of(field) for name, field in FIELDS.items()})


def as_flags(values: dict) -> dict[str, Setting]:
    return {name: Setting(FIELDS[name].metadata["kind"].read(v), f"flag --{name}") for name, v in values.items()}


def as_yaml(values: dict) -> str:
    return yaml.safe_dump({name: list(v) if isinstance(v, tuple) else v for name, v in values.items()})


@FEW
@given(LAYERS, LAYERS, st.sampled_from(["lm", "mxnet", "demo", "awd", "mos"]))
def test_merging_layers_obeys_its_laws(flag_values, file_values, recipe):
    assume(flag_values.get("gpus") != -1 and file_values.get("gpus") != -1)  # another word for --no-cuda
    flags, file = as_flags(flag_values), as_yaml({"recipe": recipe, **file_values})
    merged = resolve(flags, file)
    alone = {
        "flags": resolve(flags, recipe=recipe),
        "file": resolve(None, file),
        "none": resolve(recipe=recipe),
    }
    for name in FIELDS:
        value, source = get(merged.config, name), merged.sources[name]
        if name in flags:
            assert value == flags[name].value and source == flags[name].source  # nothing is above a flag
        # Every value has been given by somebody, and its source is who gave it.
        if source == "config.yaml":
            assert name in file_values or name == "lr"  # a learning rate comes along with its optimiser
            assert value == get(alone["file"].config, name)
        elif source == f"recipe {recipe}":
            assert value == get(alone["none"].config, name)
        elif source == "default":
            assert value == FIELDS[name].default
    assert resolve(None, None, recipe) == alone["none"]
    assert resolve(flags, "", recipe) == alone["flags"]
    again = resolve(flags, merged.config.to_yaml(merged.sources, recipe), None)
    assert again.config == merged.config  # what was merged and printed merges to itself


NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8) | st.dates(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from([*FIELDS, "recipe", "nhid", "no-such-key"]) | st.text(max_size=5)
MARKS = st.text(st.sampled_from(list("&*!|>%@`{}[]:,#-?\"'<=~ \n\t\r0aé\x85\u2028\ufeff")), max_size=30)


@settings(max_examples=100)
@given(st.dictionaries(KEYS, NESTED, max_size=4).map(yaml.safe_dump) | MARKS | st.text(), st.integers(0, 200), MARKS)
def test_whatever_yaml_is_read_it_is_a_configuration_or_refused_on_lines(content, position, inserted):
    for text in (content, content[:position] + inserted + content[position:]):
        try:
            assert isinstance(read_config(text), Config)
        except ConfigError as error:
            assert error.problems and all("\n" not in problem and problem.strip() for problem in error.problems)


# ---------------------------------------------------------------- text


@settings(max_examples=60)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode) | MARKS.map(str.encode))
def test_any_bytes_are_a_text_as_python_reads_it_or_refused_on_one_line(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        path.write_bytes(content)
        try:
            with Cache(Path(folder, "cache")) as cache:
                vocabulary = build_vocabulary(cache, Text.of(path), "whitespace")
                ids, counts = encode_text(cache, Text.of(path), "whitespace", vocabulary)
                words = vocabulary.decode(ids)
        except DataError as error:
            assert is_one_line(error) and str(path) in str(error)
            with pytest.raises((UnicodeDecodeError, IndexError)):
                content.decode("utf-8-sig").split()[0]
        else:
            lines = content.decode("utf-8-sig").removesuffix("\n").split("\n")
            assert words == [word for line in lines for word in [*line.split(), "<eos>"]]
            assert (counts.num_tokens, counts.num_lines) == (len(words), len(lines))


@settings(max_examples=60)
@given(st.binary(max_size=30) | st.lists(st.sampled_from(["<unk>", "<eos>", "a", "b", "", "a b", "é\r"])).map(
    lambda words: "\n".join(words).encode()
))  # fmt: skip
def test_any_bytes_are_a_vocabulary_or_refused_on_one_line(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vocab.txt")
        path.write_bytes(content)
        try:
            vocabulary = Vocabulary.load(path)
        except DataError as error:
            assert is_one_line(error) and str(path) in str(error)
        else:
            assert len(set(vocabulary.words)) == len(vocabulary) and {"<unk>", "<eos>"} <= set(vocabulary.words)
            vocabulary.save(path)
            assert Vocabulary.load(path) == vocabulary


# ---------------------------------------------------------------- checkpoints

VOCABULARY = Vocabulary(("a", "<unk>", "<eos>"))
ARRAY_NAMES = st.text(st.characters(min_codepoint=33, exclude_categories=("C",), exclude_characters="\\"), min_size=1)
FLOATS = arrays_of.arrays(
    np.float32, arrays_of.array_shapes(max_dims=3, max_side=4), elements=st.floats(width=32, allow_nan=True)
)
NAMED_FLOATS = st.dictionaries(ARRAY_NAMES | st.just("file"), FLOATS, max_size=3)


@FEW
@given(st.dictionaries(ARRAY_NAMES | st.just("file"), arrays_of.arrays(
    arrays_of.scalar_dtypes(), arrays_of.array_shapes(min_dims=0, min_side=0, max_side=4)
), max_size=4))  # fmt: skip
def test_any_arrays_are_read_as_they_were_written(arrays):
    with tempfile.TemporaryDirectory() as folder:
        write_arrays(Path(folder, "arrays.npz"), arrays.items())
        found = dict(read_arrays(Path(folder, "arrays.npz")))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


STATES = st.builds(
    TrainingState,
    step=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
    window=st.integers(0, 2**31),
    lr=st.floats(0, 1e6),
    evaluated_step=st.integers(-1, 2**40),
    best_loss=st.none() | st.floats(0, 50),
    best_step=st.none() | st.integers(0, 2**40),
    evaluations_since_best=st.integers(0, 100),
    valid_losses=st.lists(st.floats(0, 50), max_size=3),
    averaging_since=st.none() | st.integers(0, 2**40),
)


def save(folder: str, checkpoint: Checkpoint) -> Path:
    run = RunFolder(Path(folder, "run"))
    run.checkpoints.mkdir(parents=True)
    return save_checkpoint(run, checkpoint, Config().to_yaml(), VOCABULARY, keep=1, is_best=True)


def content_of(checkpoint: Checkpoint) -> list:
    """All that a checkpoint holds, comparable to the bit."""
    named = (checkpoint.parameters, checkpoint.optimizer, checkpoint.unaveraged, checkpoint.residuals)
    arrays = [dict(a) for a in named] + [{str(i): a for i, a in enumerate(checkpoint.carried)}]
    bits = [{name: (a.shape, a.asnumpy().tobytes()) for name, a in by_name.items()} for by_name in arrays]
    return [*bits, checkpoint.training, checkpoint.compression, checkpoint.corpus, dict(checkpoint.text)]


def on_device(arrays):
    return {name: mx.nd.array(array, dtype=array.dtype) for name, array in arrays.items()}


@FEW
@given(NAMED_FLOATS, NAMED_FLOATS, NAMED_FLOATS, st.lists(FLOATS, max_size=3), STATES)
def test_any_checkpoint_is_read_as_it_was_written(parameters, optimizer, unaveraged, carried, training):
    checkpoint = Checkpoint(
        parameters=on_device(parameters),
        optimizer=on_device(optimizer),
        carried=[mx.nd.array(array) for array in carried],
        training=training,
        compression={"factors": [2.0**-3, 1.1], "steps": 7},
        corpus="0123",
        text={"name": "tales", "licence": "CC0"},
        unaveraged=on_device(unaveraged),
    )
    with tempfile.TemporaryDirectory() as folder:
        assert content_of(load_checkpoint(save(folder, checkpoint))) == content_of(checkpoint)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint, the content of its files, and what it holds."""
    arrays = {"weight": mx.nd.arange(6).reshape((2, 3)), "bias": mx.nd.ones((3,))}
    training = TrainingState(step=12, epoch=1, lr=0.5, best_loss=2.25, best_step=12, valid_losses=[2.5, 2.25])
    folder = tmp_path_factory.mktemp("saved")
    path = save(str(folder), Checkpoint(arrays, {"weight/0": mx.nd.zeros((2, 3))}, [mx.nd.ones((1, 2, 3))], training))
    return path, {file.name: file.read_bytes() for file in path.iterdir()}, content_of(load_checkpoint(path))


@settings(max_examples=150)
@given(st.data())
def test_a_corrupted_byte_anywhere_is_detected_or_harmless(saved, data):
    path, files, content = saved
    name = data.draw(st.sampled_from(sorted(files)), "file")
    at, bit = data.draw(st.integers(0, len(files[name]) - 1), "byte"), data.draw(st.integers(0, 7), "bit")
    damaged = bytearray(files[name])
    damaged[at] ^= 1 << bit
    (path / name).write_bytes(damaged)
    try:
        assert content_of(load_checkpoint(path)) == content
    except CheckpointError as error:
        assert is_one_line(error) and str(path) in str(error)
    finally:
        (path / name).write_bytes(files[name])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=8,
)


@FEW
@given(st.sampled_from(["format", "training", "compression", "loss_scale", "corpus", "text", "sha256", "digest"]), JSON)
def test_any_json_in_place_of_a_part_of_the_state_is_read_or_refused_on_one_line(saved, part, value):
    path, files, content = saved
    whole = json.loads(files["state.json"])
    state = whole | {part: value}
    for forged in (state, state | {"digest": digest_of(state)}):
        (path / "state.json").write_text(json.dumps(forged))
        try:
            found = content_of(load_checkpoint(path))
        except CheckpointError as error:
            assert is_one_line(error)
        else:
            assert forged is not state or found == content  # the digest fits only what was written
        finally:
            (path / "state.json").write_bytes(files["state.json"])


@FEW
@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_in_place_of_the_state_or_the_metrics_are_refused_on_one_line(saved, content):
    path, files, _ = saved
    with tempfile.TemporaryDirectory() as folder:
        (path / "state.json").write_bytes(content)
        metrics = Path(folder, "metrics.jsonl")
        metrics.write_bytes(b'{"event": "valid", "step": 1}\n' + content + b"\n")
        try:
            for read in (lambda: verify_checkpoint(path), lambda: MetricsFile(metrics, 5)):
                with pytest.raises(CheckpointError) as caught:
                    read()
                assert is_one_line(caught.value)
        finally:
            (path / "state.json").write_bytes(files["state.json"])
