"""Writes that leave either the old artifact or the new one, never half of one."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from jaxrmils.artifacts.errors import ArtifactError

PathLike = str | os.PathLike[str]


def replace_file(path: PathLike, data: bytes) -> None:
    """Writes a file aside, then renames it over the target.

    Args:
      path: the target; missing parent folders are made.
      data: its whole content.

    Raises:
      ArtifactError: path is a folder.
      OSError: the disk is full, no permission; an older file at path is untouched.
    """
    target = Path(path).resolve()
    if target.is_dir():
        raise ArtifactError(f"{path} is a folder; the path of a file was expected")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = _sibling(target, "tmp")
    try:
        write_bytes(aside, data)
        aside.replace(target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def replace_directory(path: PathLike, files: Mapping[str, bytes]) -> None:
    """Writes a folder of files aside, then renames it to the target.

    A target that exists is renamed away once the new folder is complete, and removed at the end.
    After a crash between the two renames it is found beside the target as `.<name>.<random>.old`,
    which `interrupted_save` looks for.

    Args:
      path: the target; missing parent folders are made. All that an existing one holds is lost.
      files: content by file name.

    Raises:
      ArtifactError: path is a file.
      OSError: the disk is full, no permission; an older folder at path is untouched.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_dir():
        raise ArtifactError(f"{path} is a file; the path of a folder was expected")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = _sibling(target, "tmp")
    try:
        aside.mkdir()
        for name, data in files.items():
            write_bytes(aside / name, data)
        _swap(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a new file through to the disk: a rename after it never shows an empty file."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def interrupted_save(path: PathLike) -> Path | None:
    """The older artifact that a crash in `replace_directory` left beside its place, if any."""
    target = Path(path).resolve()
    if target.exists() or not target.parent.is_dir():
        return None
    prefix = f".{target.name}."
    found = (p for p in target.parent.iterdir() if p.name.startswith(prefix) and p.suffix == ".old")
    return next(found, None)


def _swap(new: Path, target: Path) -> None:
    """No rename replaces a folder that is not empty, so the old one steps aside first."""
    if not target.exists():
        new.rename(target)
        return
    old = _sibling(target, "old")
    try:
        target.rename(old)
        new.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sibling(target: Path, suffix: str) -> Path:
    """A new name in the same folder, hence on the same file system, where renames are atomic."""
    return target.parent / f".{target.name}.{secrets.token_hex(4)}.{suffix}"
