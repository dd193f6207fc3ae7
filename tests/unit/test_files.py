"""Files that take the place of others: what a killed process left behind goes, what is being written stays.

Folders whose files are sealed: what is not as it was written is named.
"""

from __future__ import annotations

import os
import stat
import time

import numpy as np
import pytest

from gluon_lm.files import (
    atomic_write,
    read_arrays,
    read_seal,
    replaced_folder,
    verify_files,
    write_arrays,
    write_seal,
)

A_WEEK_S = 7 * 24 * 3600


def make_old(path):
    os.utime(path, times=(time.time() - A_WEEK_S,) * 2, follow_symlinks=False)


@pytest.mark.parametrize("name", ["out.txt", "a[b]*.txt"])
def test_what_killed_processes_left_behind_long_ago_is_removed(tmp_path, name):
    target = tmp_path / name
    old_file, old_folder, old_link, fresh, other = (
        tmp_path / f".{stem}.new-{number}"
        for stem, number in ((name, "0a"), (name, "0b"), (name, "0c"), (name, "0d"), ("other", "0e"))
    )
    old_folder.mkdir()
    (old_folder / "parameters").write_text("half")
    old_link.symlink_to("nowhere")
    for path in (old_file, fresh, other):
        path.write_text("half")
    for path in (old_file, old_folder, old_link, other):
        make_old(path)
    with atomic_write(target) as file:
        file.write(b"whole")
    assert {path.name for path in tmp_path.iterdir()} == {target.name, fresh.name, other.name}
    assert target.read_bytes() == b"whole"


def test_a_folder_takes_the_place_of_another_and_of_what_was_left_behind(tmp_path):
    target, remains = tmp_path / "exported", tmp_path / ".exported.new-12345678"
    for folder, content in ((target, "old"), (remains, "half")):
        folder.mkdir()
        (folder / "model").write_text(content)
    make_old(remains)
    with replaced_folder(target) as fresh:
        (fresh / "model").write_text("new")
    assert (target / "model").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.fixture
def sealed(tmp_path):
    (tmp_path / "weights").write_bytes(b"\0\1")
    (tmp_path / "words").write_text("one two")
    content = {"name": "M\u00e4rchen \udce9", "counts": {10: 1, 9: 2}, "loss": float("inf")}
    return tmp_path, write_seal(tmp_path, "seal.json", content)


def test_a_seal_is_read_as_it_was_written(sealed):
    folder, seal = sealed
    assert (seal["name"], seal["counts"], seal["loss"]) == ("M\u00e4rchen \udce9", {"10": 1, "9": 2}, float("inf"))
    assert seal["sha256"].keys() == {"weights", "words"}
    assert read_seal(folder, "seal.json") == seal
    verify_files(folder, seal)


@pytest.mark.parametrize("harm", ["missing", "cut short", "other", "a folder"])
def test_a_file_that_is_not_as_it_was_sealed_is_named(sealed, harm):
    folder, seal = sealed
    file = folder / "words"
    if harm == "cut short":
        file.write_text("one tw")
    elif harm == "other":
        file.write_text("one 2wo")
    else:
        file.unlink()
    if harm == "a folder":
        file.mkdir()
    assert read_seal(folder, "seal.json") == seal
    with pytest.raises(ValueError, match="^words is not as it was written$"):
        verify_files(folder, seal)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"7", b"\xff", b"[" * 200_000, b'{"digest": "0", "sha256": {}}']
)
def test_a_seal_that_is_none_is_refused(sealed, content):
    folder, seal = sealed
    (folder / "seal.json").write_bytes(content)
    with pytest.raises(ValueError, match="^seal.json is not as it was written$"):
        read_seal(folder, "seal.json")


def test_a_seal_edited_by_hand_is_refused(sealed):
    folder, seal = sealed
    file = folder / "seal.json"
    file.write_text(file.read_text().replace("Infinity", "2.5"))
    with pytest.raises(ValueError, match="^seal.json is not as it was written$"):
        read_seal(folder, "seal.json")


def test_what_takes_the_place_of_another_has_its_permissions(tmp_path):
    file, folder = tmp_path / "config.yaml", tmp_path / "exported"
    file.write_text("old")
    folder.mkdir()
    modes = [(0o600, 0o700), (0o664, 0o2775), (0o444, 0o711), (0o644, 0o555)]
    for file_mode, folder_mode in modes:
        file.chmod(file_mode)
        folder.chmod(folder_mode)
        with atomic_write(file) as fresh:
            fresh.write(b"new")
        with replaced_folder(folder) as fresh_folder:
            (fresh_folder / "model").write_text("new")
        assert file.read_text() == (folder / "model").read_text() == "new"
        assert [stat.S_IMODE(path.stat().st_mode) for path in (file, folder)] == [file_mode, folder_mode | stat.S_IRWXU]


def test_short_memory_is_not_taken_for_a_damaged_file(tmp_path, monkeypatch):
    path = tmp_path / "arrays.npz"
    write_arrays(path, [("weights", np.zeros(1000, np.float32))])

    def fail(shape):
        def read_array(*arguments, **settings):
            error = MemoryError("Unable to allocate")
            error.shape, error.dtype = shape, np.dtype(np.float32)
            raise error

        return read_array

    monkeypatch.setattr(np.lib.format, "read_array", fail((1000,)))
    with pytest.raises(MemoryError):
        dict(read_arrays(path))
    monkeypatch.setattr(np.lib.format, "read_array", fail((10**12,)))  # as a damaged header may name it
    with pytest.raises(ValueError, match="Unable to allocate"):
        dict(read_arrays(path))
