"""What is on the disk, whole or not there."""

import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from megazero.base.errors import UserError


def sync(path: Path) -> None:
    """Returns when a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def opened(path: Path, mode: str) -> BinaryIO:
    """As `open` without a buffer of text, but never through a link that a stranger left: what lies elsewhere is not
    ours to write. A new file ("xb") takes the place of what was there. Raises OSError."""
    if "x" in mode:
        path.unlink(missing_ok=True)
    return cast(BinaryIO, open(path, mode, opener=not_followed))


def not_followed(name: str, flags: int) -> int:
    """An opener of files that are no links, nor pipes, which would wait for ever."""
    handle = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "is not a regular file", name)
    return handle


def unwritable(error: OSError) -> str:
    """That a folder cannot be written to, why, and what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"cannot be written to ({error.strerror}); {'make room there, or ' if full else ''}name another folder"


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name when all of it is on the disk; until then what was there stays. Raises OSError."""
    draft = path.with_name(f"{path.name}.draft")
    with opened(draft, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    sync(path.parent)


def write_json(path: Path, content: Mapping[str, Any], indent: int | None = None) -> None:
    """The whole file or none of it."""
    with whole(path) as file:
        file.write((json.dumps(content, indent=indent) + "\n").encode())


@contextmanager
def draft_of(folder: Path, flag: str = "--output") -> Iterator[Path]:
    """A folder to write to, which takes the name `folder` when all went well and leaves nothing when not."""
    if os.path.lexists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise UserError(f"{flag} {folder}: is there already and not empty; name a new folder.")
    draft = folder.with_name(f"{folder.name}.draft-{secrets.token_hex(4)}")     # two hosts may have one process number
    try:
        draft.mkdir(parents=True)
        yield draft
        sync(draft)
        draft.rename(folder)                                    # an empty folder of that name gives way
        sync(folder.parent)
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be written ({error.strerror}).") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
