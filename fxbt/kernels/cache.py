"""The cache on disk for what is measured or compiled once, in a folder that nobody else can write.

The folder is `FXBT_CACHE_DIR`, else `$XDG_CACHE_HOME/fxbt`, else `~/.cache/fxbt`. A library from there runs with this
user's rights. So, as ssh does with keys, a folder or file that another user owns or may write (or could replace through
a parent) is neither read nor written. A private folder, removed at exit, replaces it, and one message says so.

Processes share the folder: files are replaced as a whole, and for slow work one process does it while others wait
(`once`).
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

try:
    import fcntl
except ImportError:  # Windows: each process works on its own
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("fxbt")

T = TypeVar("T")

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
MOST_SYMLINKS = 40  # on the way to one file, as in Linux
POLL_SECONDS = 0.02


class Found(NamedTuple):
    """A file of the cache: its path and its content."""

    path: Path
    data: bytes


class Distrusted(OSError):
    """A place where another user may write, or no place at all; the text says which, and what to do."""


def find(name: str, most: int | None = None) -> Found | None:
    """Reads a file of the cache; None if there is none that only this user (or root) may write.

    Files of more than `most` bytes are not read either.
    """
    for folder in _folders():
        try:
            return Found(folder / name, read(folder / name, most))
        except FileNotFoundError:
            continue
        except OSError as error:  # whoever asks makes it again
            logger.info("%s is not used: %s", folder / name, error)
    return None


def write(name: str, data: bytes) -> Path:
    """Writes a file of the cache as a whole: a reader sees the old or the new one.

    Raises:
        OSError: the file cannot be written.
    """
    return write_to(place(), name, data)


def write_to(folder: Path, name: str, data: bytes) -> Path:
    """Writes a file of any folder as a whole.

    Raises:
        OSError: the file cannot be written.
    """
    path = folder / name
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")  # with mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
    return path


def names(prefix: str) -> list[str]:
    """The files of the cache whose names begin so, newest first."""
    found = [path for folder in _folders() for path in folder.glob(f"{prefix}*")]
    return [path.name for path in sorted(found, key=_written_at, reverse=True)]


def remove(name: str) -> None:
    """Removes a file of the cache, if it exists and may be removed."""
    for folder in _folders():
        with contextlib.suppress(OSError):
            os.unlink(folder / name)


def _written_at(path: Path) -> float:
    try:
        return os.lstat(path).st_mtime
    except OSError:  # another process removed it
        return 0.0


def place() -> Path:
    """The folder to write to: the user's cache, else a private one.

    Raises:
        OSError: there is neither.
    """
    try:
        folder = _shared(may_make=True)
        if not _is_writable(folder):
            raise Distrusted(f"{folder} cannot be written")
    except OSError as error:
        _say(
            f"the cache folder is not used: {error}. Compiled kernels and measurements are kept in a private folder "
            "until this process ends; set FXBT_CACHE_DIR to use another folder"
        )
        return _private()
    return folder


def once(name: str, known: Callable[[], T | None], make: Callable[[], T | None], seconds: float) -> T | None:
    """The result of `known`, or else of `make`, which only one process runs at a time: the others wait and find it.

    None if `make` returned None, or another process still works after so many `seconds`.
    """
    end = time.monotonic() + seconds
    while (found := known()) is None:
        with _lock(f"{name}.lock") as is_ours:
            if is_ours:
                found = known()  # another process may have written it before releasing the lock
                return make() if found is None else found
        if time.monotonic() >= end:
            return None
        time.sleep(POLL_SECONDS)
    return found


# Which folder


def _wanted() -> Path:
    """The folder that the user wants as cache, as an absolute path."""
    asked, xdg = os.environ.get("FXBT_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    try:
        if asked:
            return Path(asked).expanduser().absolute()
        if xdg and os.path.isabs(xdg):  # the XDG Base Directory Specification says to ignore relative paths
            return Path(xdg) / "fxbt"
        return Path.home().absolute() / ".cache" / "fxbt"
    except RuntimeError as error:  # a user id without a name, as in containers, and no HOME
        raise Distrusted(str(error)) from error


def _shared(may_make: bool = False) -> Path:
    """The user's cache folder, which other processes share.

    Raises:
        OSError: it does not exist, or another user may write to it.
    """
    folder = _wanted()
    if may_make and not folder.exists():
        _refuse(next(parent for parent in folder.parents if parent.exists()), to_make_in=True)
        _make(folder)
    _refuse(folder)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "it is not a folder", str(folder))
    return folder


def _make(folder: Path) -> None:
    """Creates a folder and its parents with mode 0700, whatever the umask."""
    if not folder.parent.exists():
        _make(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)


def _folders() -> Iterator[Path]:
    """The folders to read from."""
    with contextlib.suppress(OSError):  # `place` says why as soon as there is something to write
        yield _shared()
    if _made_private and _made_private[-1].is_dir():
        yield _made_private[-1]


_made_private: list[Path] = []  # by this process, or the one it was forked from


def _private() -> Path:
    """A folder for this process only."""
    if not (_made_private and _made_private[-1].is_dir()):
        _refuse(Path(tempfile.gettempdir()).absolute(), to_make_in=True)
        _made_private.append(Path(tempfile.mkdtemp(prefix="fxbt-")).absolute())
        atexit.register(_remove, _made_private[-1], os.getpid())
    return _made_private[-1]


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not a forked child, which ends earlier
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def _say(text: str) -> None:
    """Warns once per process."""
    logger.warning("fxbt: %s", text)


def _is_writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)


# Whom to trust


def read(path: Path, most: int | None = None, of_anyone: bool = False) -> bytes:
    """The bytes of a file that only this user or root may write; the opened file itself is checked.

    Args:
        most: the largest allowed number of bytes.
        of_anyone: whether others may also write it.

    Raises:
        OSError: there is no such file, or it is a symlink.
    """
    no_surprise = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, os.O_RDONLY | no_surprise), "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise Distrusted(f"{path} is not a regular file")
        if not of_anyone and (fault := _fault(path, facts)):
            raise Distrusted(fault)
        if most is not None and facts.st_size > most:
            raise Distrusted(f"{path} is too large ({facts.st_size} bytes)")
        return file.read() if most is None else file.read(most)


def _refuse(folder: Path, to_make_in: bool = False) -> None:
    """Raises `Distrusted` if another user could put a file into a folder, or replace the folder.

    Each folder and symlink on the way must belong to this user or root, and others must not be able to write there,
    except as in /tmp, where nobody can move what is not theirs. That exception also suffices for a folder `to_make_in`.
    As for ssh, everything above the home belongs to the system.
    """
    trusted = _above_home()
    *parents, last = _steps(folder)
    for step in parents:
        fault = _fault(step, os.lstat(step), may_be_sticky=True)
        if fault and step not in trusted:
            raise Distrusted(fault)
    if fault := _fault(last, os.lstat(last), may_be_sticky=to_make_in):
        raise Distrusted(fault)


def _fault(path: Path, facts: os.stat_result, may_be_sticky: bool = False) -> str | None:
    """Why another user may have written what is at a path; None if only this user and root may."""
    user = _user()
    if user is None or stat.S_ISLNK(facts.st_mode) and facts.st_uid in (user, 0):
        return None
    if facts.st_uid not in (user, 0):
        return f"{path} belongs to another user (uid {facts.st_uid}; this process has uid {user})"
    if not facts.st_mode & OTHERS_WRITE or may_be_sticky and facts.st_mode & stat.S_ISVTX:
        return None
    mode = stat.S_IMODE(facts.st_mode)
    return f"other users may write to {path}, of mode {mode:03o} (run `chmod go-w {path}` if its content is yours)"


def _user() -> int | None:
    """The user whose rights this process has; None on Windows, where owners and modes differ."""
    return os.geteuid() if hasattr(os, "geteuid") else None


def _above_home() -> set[Path]:
    try:
        home = Path.home().absolute()
    except RuntimeError:  # there is no home: nothing is above it
        return set()
    return {*home.parents, *Path(os.path.realpath(home)).parents}


def _steps(path: Path) -> Iterator[Path]:
    """Every folder and symlink on the system's way to a path, and its end."""
    here, ahead, followed = Path(path.anchor), list(reversed(path.parts[1:])), 0
    yield here
    while ahead:
        name = ahead.pop()
        here = here.parent if name == ".." else here / name
        yield here
        if not here.is_symlink():
            continue
        followed += 1
        if followed > MOST_SYMLINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = Path(os.readlink(here))
        ahead += reversed(target.parts[1:] if target.is_absolute() else target.parts)
        here = Path(target.anchor) if target.is_absolute() else here.parent


# Between processes


@contextlib.contextmanager
def _lock(name: str) -> Iterator[bool]:
    """Whether this process now has a lock; without locks, or a shared folder, each process has its own.

    The system releases the lock of a process that dies. The file goes with the lock; a leftover file means nothing.
    """
    path, handle = _open_lock(name)
    if handle is None:
        yield True
        return
    is_ours = False
    try:
        is_ours = _is_taken(handle, path)
        yield is_ours
    finally:
        if is_ours:
            with contextlib.suppress(OSError):  # somebody emptied the folder
                os.unlink(path)
            fcntl.flock(handle, fcntl.LOCK_UN)  # closing is not enough if a forked child holds it, too
        os.close(handle)


def _open_lock(name: str) -> tuple[Path, int | None]:
    path = Path(name)
    if fcntl is None:
        return path, None
    try:
        path = _shared(may_make=True) / name
        return path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        logger.debug("no lock is shared with other processes: %s", error)
        return path, None


def _is_taken(handle: int, path: Path) -> bool:
    """Takes a lock unless another process has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # it has
        return False
    except OSError as error:  # a network file system without locks
        logger.debug("no lock is shared with other processes: %s", error)
        return True
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:  # its holder released it, and removed the file, after it was opened here
        return False
