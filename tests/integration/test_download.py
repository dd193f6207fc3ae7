"""Downloads, from a real HTTP server on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from loopback import Server, send_head
from processes import environment

from gluon_lm import progress
from gluon_lm.config import DataConfig
from gluon_lm.data import CORPORA, load_corpus
from gluon_lm.data.corpora import PublishedCorpus, SpeechCorpus
from gluon_lm.data.download import (
    ParquetMirror,
    PlainMirror,
    PublishedFile,
    ZipMirror,
    download_files,
)
from gluon_lm.download import main
from gluon_lm.errors import DataError

CONTENT = {
    "tiny.train.txt": b"a b a\n \nc a\n" * 50,
    "tiny.valid.txt": b"a d\n",
    "tiny.test.txt": b"b\nb\n",
}
FILES = [PublishedFile(name, "sha256:" + hashlib.sha256(data).hexdigest()) for name, data in CONTENT.items()]


def cut(data: bytes):
    """A page of which half is sent before the connection ends."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        send_head(handler, len(data))
        handler.wfile.write(data[: len(data) // 2])
        handler.wfile.flush()
        handler.connection.close()

    return send


def zipped(content=CONTENT, folder: str = "tiny-1/") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(folder + name, data)
    return buffer.getvalue()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    started = Server()
    yield started
    started.close()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("GLUON_LM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "data" / "tiny"


def fetch(folder: Path, *mirrors) -> None:
    download_files("tiny-1", FILES, mirrors, folder)


def check_whole(folder: Path) -> None:
    """Exactly the published files, and nothing else."""
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == CONTENT


def refused(folder: Path, *mirrors) -> str:
    with pytest.raises(DataError) as caught:
        fetch(folder, *mirrors)
    assert not folder.exists() and not folder.parent.exists()  # nothing is left of the attempt
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- mirrors


def test_a_zip_archive(server, folder):
    server.pages["/tiny.zip"] = zipped()
    fetch(folder, ZipMirror(server.url + "/tiny.zip"))
    check_whole(folder)
    assert server.requests == ["/tiny.zip"]
    assert all(agent.startswith("gluon_lm/") for agent in server.user_agents)


def test_plain_files(server, folder):
    server.pages.update({f"/data/{name}": data for name, data in CONTENT.items()})
    fetch(folder, PlainMirror(server.url + "/data/"))
    check_whole(folder)
    assert sorted(server.requests) == sorted(f"/data/{name}" for name in CONTENT)


def test_a_download_shows_how_far_it_is(server, folder, monkeypatch, capsys):
    monkeypatch.setattr(progress, "PlainProgress", partial(progress.PlainProgress, interval_s=0.0))
    server.pages["/tiny.zip"] = zipped()
    fetch(folder, ZipMirror(server.url + "/tiny.zip"))
    size = f"{len(server.pages['/tiny.zip']):,}"
    assert f"tiny.zip: 100 % ({size} of {size} B)" in capsys.readouterr().err.splitlines()


def test_404_then_the_next_mirror(server, folder):
    server.pages["/good.zip"] = zipped()
    fetch(folder, ZipMirror(server.url + "/gone.zip"), ZipMirror(server.url + "/good.zip"))
    check_whole(folder)
    assert server.requests == ["/gone.zip", "/good.zip"]


@pytest.mark.parametrize(
    "page",
    [
        500,
        b"<html>Welcome to this network, please log in</html>",
        b"",
        zipped()[:-30],
        zipped({**CONTENT, "tiny.test.txt": b"other text\n"}),
        zipped({name: data for name, data in CONTENT.items() if name != "tiny.test.txt"}),
        cut(zipped()),
        lambda handler: handler.connection.close(),
    ],
    ids=["error", "page", "empty", "truncated", "other", "incomplete", "cut", "closed"],
)
def test_whatever_a_mirror_does_wrong_the_next_one_is_asked(server, folder, page):
    server.pages.update({"/bad.zip": page, "/good.zip": zipped()})
    fetch(folder, ZipMirror(server.url + "/bad.zip"), ZipMirror(server.url + "/good.zip"))
    check_whole(folder)
    assert server.requests == ["/bad.zip", "/good.zip"]


def test_a_cut_plain_file_is_not_kept(server, folder):
    server.pages.update({f"/{name}": data for name, data in CONTENT.items()})
    server.pages["/tiny.train.txt"] = cut(CONTENT["tiny.train.txt"])
    assert "could not be downloaded" in refused(folder, PlainMirror(server.url + "/"))


def test_when_all_fail_the_message_says_why_and_what_to_do(server, folder):
    server.pages["/other.zip"] = zipped({**CONTENT, "tiny.valid.txt": b"x\n"})
    with contextlib.closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))  # not listening: refuses every connection
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}/tiny.zip"
        message = refused(
            folder,
            ZipMirror(server.url + "/gone.zip"),
            ZipMirror(server.url + "/other.zip"),
            ZipMirror(nobody),
        )
    assert f"{server.url}/gone.zip (404" in message
    assert f"{server.url}/other.zip (tiny.valid.txt is not the published file" in message
    assert f"{nobody} (" in message and "refused" in message and "0x" not in message
    assert f"Put tiny.train.txt, tiny.valid.txt, tiny.test.txt into {folder}" in message
    assert "--data sotu" in message


def test_an_archive_whose_paths_climb_out(server, folder, tmp_path):
    server.pages["/evil.zip"] = zipped({**CONTENT, "evil.txt": b"!"}, folder="../../../")
    fetch(folder, ZipMirror(server.url + "/evil.zip"))
    check_whole(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


# ---------------------------------------------------------------- parquet


def test_parquet_is_skipped_with_a_word_without_pyarrow(server, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    mirror = ParquetMirror(server.url + "/", {name: (f"{name}.parquet",) for name in CONTENT}, {})
    assert "skipped, because it needs pyarrow" in refused(folder, mirror)
    assert server.requests == []


def parquet_mirror(server: Server, num_train_rows: int = 150) -> ParquetMirror:
    """Serves CONTENT as rows, blank lines as empty ones, the training text in two parts."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parts = {}
    for name, data in CONTENT.items():
        rows = [line if line.strip() else "" for line in data.decode().splitlines(keepends=True)]
        halves = [rows[:70], rows[70:]] if len(rows) > 70 else [rows]
        parts[name] = tuple(f"{name}-{number}.parquet" for number in range(len(halves)))
        for part, half in zip(parts[name], halves):
            buffer = io.BytesIO()
            parquet.write_table(pyarrow.table({"text": half}), buffer)
            server.pages[f"/{part}"] = buffer.getvalue()
    return ParquetMirror(server.url + "/", parts, {"tiny.train.txt": num_train_rows})


def test_parquet_rows_become_the_published_files(server, folder):
    fetch(folder, parquet_mirror(server))
    check_whole(folder)


def test_parquet_rows_are_counted(server, folder):
    mirror = parquet_mirror(server, num_train_rows=151)
    assert "tiny.train.txt has 150 rows instead of 151" in refused(folder, mirror)


# ---------------------------------------------------------------- what is there already


def put(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(CONTENT[name])


def registry(*mirrors) -> dict[str, PublishedCorpus]:
    files = dict(zip(("train", "valid", "test"), FILES))
    return {"tiny-1": PublishedCorpus("tiny-1", "CC0", folder="tiny", files=files, mirrors=mirrors)}


def load(folder: Path, *mirrors, name: str = "tiny-1"):
    config = DataConfig(data=(name,), data_dir=str(folder.parent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gluon_lm.data.corpora.CORPORA", registry(*mirrors))
        return load_corpus(config)


def test_files_in_place_need_no_network(server, folder):
    put(folder, *CONTENT)
    server.pages["/tiny.zip"] = zipped()
    assert len(load(folder, ZipMirror(server.url + "/tiny.zip")).train) == 50 * 8
    assert server.requests == []


def test_only_what_is_missing_is_fetched(server, folder):
    put(folder, "tiny.train.txt")
    before = (folder / "tiny.train.txt").stat().st_ino
    server.pages.update({f"/{name}": data for name, data in CONTENT.items()})
    assert len(load(folder, PlainMirror(server.url + "/")).train) == 50 * 8
    assert sorted(server.requests) == ["/tiny.test.txt", "/tiny.valid.txt"]
    assert (folder / "tiny.train.txt").stat().st_ino == before
    check_whole(folder)


def test_another_file_in_place_is_neither_used_nor_replaced(server, folder):
    put(folder, *CONTENT)
    (folder / "tiny.test.txt").write_bytes(b"mine\n")
    server.pages["/tiny.zip"] = zipped()
    with pytest.raises(DataError, match="tiny.test.txt: is not the file that tiny-1 was published with"):
        load(folder, ZipMirror(server.url + "/tiny.zip"))
    assert server.requests == [] and (folder / "tiny.test.txt").read_bytes() == b"mine\n"


def test_a_corpus_is_downloaded_to_the_path_that_names_it(server, tmp_path):
    server.pages["/tiny.zip"] = zipped()
    folder = tmp_path / "elsewhere" / "tiny-1"
    corpus = load(tmp_path / "data" / "tiny", ZipMirror(server.url + "/tiny.zip"), name=str(folder))
    assert corpus.name == "tiny-1" and len(corpus.test) == 4
    check_whole(folder)


def test_a_folder_that_cannot_be_written(server, tmp_path):
    server.pages["/tiny.zip"] = zipped()
    (tmp_path / "data").write_text("a file")
    with pytest.raises(DataError, match=r"tiny: cannot be written \(.*--data-dir"):
        fetch(tmp_path / "data" / "tiny", ZipMirror(server.url + "/tiny.zip"))


# ---------------------------------------------------------------- other processes

FETCHER = """
import errno, fcntl, sys
from pathlib import Path
from gluon_lm.data.download import PublishedFile, ZipMirror, download_files

def refuse(*_):
    raise OSError(errno.ENOLCK, "No locks available")

has_locks, folder, url, *files = sys.argv[1:]
if has_locks == "False":
    fcntl.flock = refuse
download_files("tiny-1", [PublishedFile(*file.split("=")) for file in files], [ZipMirror(url)], Path(folder))
"""


def start_fetch(folder: Path, url: str, has_locks: bool = True) -> subprocess.Popen:
    files = [f"{file.name}={file.hash}" for file in FILES]
    return subprocess.Popen(
        [sys.executable, "-c", FETCHER, str(has_locks), str(folder), url, *files],
        env=environment(),
    )


def slowly(data: bytes, started: threading.Event, go_on: threading.Event):
    """A page that stops half-way until it is told to go on."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        send_head(handler, len(data))
        handler.wfile.write(data[: len(data) // 2])
        handler.wfile.flush()
        started.set()
        go_on.wait(30)
        with contextlib.suppress(OSError):
            handler.wfile.write(data[len(data) // 2 :])

    return send


def test_a_download_that_is_killed_half_way_leaves_nothing_under_a_final_name(server, folder):
    started, go_on = threading.Event(), threading.Event()
    server.pages["/tiny.zip"] = slowly(zipped(), started, go_on)
    process = start_fetch(folder, server.url + "/tiny.zip")
    try:
        assert started.wait(30)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    finally:
        process.kill()
        go_on.set()
    assert not [path for path in folder.iterdir() if not path.name.startswith(".")]
    (remains,) = folder.glob(".download.new-*")
    os.utime(remains, (0, 0))  # it becomes too old to be that of a process that still works
    server.pages["/tiny.zip"] = zipped()
    fetch(folder, ZipMirror(server.url + "/tiny.zip"))
    check_whole(folder)


def test_two_processes_at_once_download_once(server, folder):
    started, go_on = threading.Event(), threading.Event()
    server.pages["/tiny.zip"] = slowly(zipped(), started, go_on)
    processes = [start_fetch(folder, server.url + "/tiny.zip")]
    try:
        assert started.wait(30)
        processes.append(start_fetch(folder, server.url + "/tiny.zip"))
        time.sleep(0.5)  # time for the second one to come to the lock; without it the test would only prove less
        go_on.set()
        assert [process.wait(30) for process in processes] == [0, 0]
    finally:
        go_on.set()
        for process in processes:
            process.kill()
    assert server.requests == ["/tiny.zip"]
    check_whole(folder)


def test_two_processes_at_once_leave_each_other_alone_where_there_are_no_locks(server, folder):
    started, go_on = threading.Event(), threading.Event()
    processes = []
    try:
        for _ in range(2):
            started.clear()
            server.pages["/tiny.zip"] = slowly(zipped(), started, go_on)
            processes.append(start_fetch(folder, server.url + "/tiny.zip", has_locks=False))
            assert started.wait(30)
        go_on.set()
        assert [process.wait(30) for process in processes] == [0, 0]
    finally:
        go_on.set()
        for process in processes:
            process.kill()
    check_whole(folder)


# ---------------------------------------------------------------- the command


@pytest.fixture
def tiny_is_registered(server, monkeypatch):
    server.pages["/tiny.zip"] = zipped()
    monkeypatch.setitem(CORPORA, "tiny-1", registry(ZipMirror(server.url + "/tiny.zip"))["tiny-1"])
    logger = logging.getLogger("gluon_lm")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def test_the_command_fetches_and_names_the_files(server, tiny_is_registered, tmp_path, capsys):
    assert main(["tiny-1", "--data-dir", str(tmp_path)]) == 0
    check_whole(tmp_path / "tiny")
    output = capsys.readouterr().out
    assert f"downloading tiny-1 from {server.url}/tiny.zip" in output
    assert f"train {tmp_path / 'tiny' / 'tiny.train.txt'}" in output
    assert main(["tiny-1", "--data_dir", str(tmp_path)]) == 0
    assert server.requests == ["/tiny.zip"]
    assert "downloading" not in capsys.readouterr().out


def test_the_command_says_of_which_corpora_the_folder_is_not_used(tiny_is_registered, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(SpeechCorpus, "texts", lambda self, folder, splits: {})
    assert main(["sotu", "tiny-1", "--data-dir", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "--data-dir" in line]
    assert lines == [f"sotu: does not use --data-dir {tmp_path}"]
    assert main(["sotu"]) == 0
    assert "--data-dir" not in capsys.readouterr().out


def test_the_command_refuses_what_it_does_not_know(tiny_is_registered, tmp_path, capsys):
    assert main(["tiny-1", "tiny-2", "wikitex-2", "--data-dir", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("error: tiny-2: must be a corpus") and lines[0].endswith("did you mean tiny-1?")
    assert "did you mean wikitext-2?" in lines[1]
    assert list(tmp_path.iterdir()) == []
    assert main([]) == 2
