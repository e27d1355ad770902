"""Atomic writes: the old artifact or the new one, never half of one."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrmils.artifacts import ArtifactError, files
from jaxrmils.artifacts.files import interrupted_save, replace_directory, replace_file


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def failing_writer(monkeypatch, after, error):
    """Makes the write number `after` stop half way."""
    write, count = files.write_bytes, []

    def fail(path, data):
        count.append(path)
        if len(count) > after:
            path.write_bytes(data[: len(data) // 2])
            raise error
        write(path, data)

    monkeypatch.setattr(files, "write_bytes", fail)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_file_survives_a_write_that_fails(tmp_path, monkeypatch, error):
    target = tmp_path / "plan.json"
    replace_file(target, b"old")
    failing_writer(monkeypatch, 0, error)
    with pytest.raises(type(error)):
        replace_file(target, b"new content")
    assert contents(tmp_path) == {"plan.json": b"old"}


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_folder_survives_a_write_that_fails(tmp_path, monkeypatch, after, error):
    old = {"a": b"1", "b": b"2"}
    replace_directory(tmp_path / "model", old)
    failing_writer(monkeypatch, after, error)
    with pytest.raises(type(error)):
        replace_directory(tmp_path / "model", {"a": b"3333", "b": b"4444", "c": b"5555"})
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert contents(tmp_path / "model") == old


@pytest.mark.parametrize("failing", [0, 1])
def test_a_folder_survives_a_rename_that_fails(tmp_path, monkeypatch, failing):
    replace_directory(tmp_path / "model", {"a": b"1"})
    rename, count = Path.rename, []

    def fail(self, target):
        count.append(self)
        if len(count) == failing + 1:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        replace_directory(tmp_path / "model", {"a": b"2"})
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert contents(tmp_path / "model") == {"a": b"1"}


CRASHING_SAVE = """
import os, sys
from pathlib import Path

from jaxrmils.artifacts.files import replace_directory

rename = Path.rename

def crash(self, destination):
    if self.suffix == ".tmp":
        os._exit(7)
    return rename(self, destination)

Path.rename = crash
replace_directory(sys.argv[1], {"a": b"2"})
"""


def test_a_crash_between_the_renames_leaves_the_old_folder_to_be_found(tmp_path):
    target = tmp_path / "model"
    replace_directory(target, {"a": b"1"})
    assert interrupted_save(target) is None
    # A process that ends without any clean-up.
    crashed = subprocess.run([sys.executable, "-c", CRASHING_SAVE, str(target)], check=False)
    assert crashed.returncode == 7
    assert not target.exists()
    old = interrupted_save(target)
    assert contents(old) == {"a": b"1"}


def test_replacing_leaves_nothing_of_the_old_folder(tmp_path):
    replace_directory(tmp_path / "x" / "model", {"a": b"1", "b": b"2"})
    replace_directory(tmp_path / "x" / "model", {"a": b"3"})
    assert contents(tmp_path / "x" / "model") == {"a": b"3"}
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["model"]


def test_links_stay_links(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    replace_directory(tmp_path / "link", {"a": b"1"})
    (tmp_path / "file").symlink_to(tmp_path / "real" / "a")
    replace_file(tmp_path / "file", b"2")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").is_symlink()
    assert contents(tmp_path / "real") == {"a": b"2"}


def test_permissions_are_the_usual_ones(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a").write_bytes(b"")
    replace_directory(tmp_path / "model", {"a": b""})

    def mode(path):
        return stat.S_IMODE(path.stat().st_mode)

    assert mode(tmp_path / "model") == mode(tmp_path / "plain")
    assert mode(tmp_path / "model" / "a") == mode(tmp_path / "plain" / "a")


def test_files_and_folders_do_not_replace_each_other(tmp_path):
    replace_file(tmp_path / "file", b"1")
    with pytest.raises(ArtifactError, match="is a file; the path of a folder"):
        replace_directory(tmp_path / "file", {"a": b"1"})
    with pytest.raises(ArtifactError, match="is a folder; the path of a file"):
        replace_file(tmp_path, b"1")
    assert contents(tmp_path) == {"file": b"1"}
