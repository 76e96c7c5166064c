"""The cache on disk: whose files are read, where things go instead, and what several processes do with it."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from fxbt.kernels import autotune, cache, native, toolchain
from fxbt.kernels.autotune import Measurements, Tuner
from fxbt.kernels.turns import Contest

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owners here as on POSIX")
as_root = pytest.mark.skipif(getattr(os, "geteuid", int)() != 0, reason="only root gives files away")
STRANGER = 4711


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """A home of one's own; the cache is to be at ~/.cache/fxbt."""
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("HOME", str(folder))
    for name in ("FXBT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cache, "_made_private", [])
    cache._say.cache_clear()
    return folder


@pytest.fixture
def folder(home) -> Path:
    """The cache, with one file in it."""
    cache.write("data", b"ours")
    return home / ".cache" / "fxbt"


def data() -> bytes | None:
    found = cache.find("data")
    return found and found.data


def test_what_is_written_is_found(folder):
    assert cache.place() == folder
    assert cache.find("data") == (folder / "data", b"ours")
    assert cache.find("other") is None
    cache.write("data", b"newer")
    assert data() == b"newer"
    assert [path.name for path in folder.iterdir()] == ["data"]


# --- where it is ------------------------------------------------------------------------------------------------


def test_the_cache_follows_xdg(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.place() == tmp_path / "xdg" / "fxbt"


def test_a_relative_xdg_folder_is_ignored_as_its_specification_says(home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "xdg")
    assert cache.place() == home / ".cache" / "fxbt"


def test_what_is_asked_for_comes_first(tmp_path, home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("FXBT_CACHE_DIR", "~/elsewhere")
    assert cache.place() == home / "elsewhere"
    monkeypatch.setenv("FXBT_CACHE_DIR", "here/below")
    monkeypatch.chdir(tmp_path)
    assert cache.place() == tmp_path / "here" / "below"


def test_a_user_without_a_home_gets_a_private_folder(monkeypatch, caplog):
    def nowhere(*args: Any) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    is_private(caplog, "Could not determine home directory")


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_the_umask_opens_nothing(home, umask, caplog):
    before = os.umask(umask)
    try:
        path = cache.write("data", b"ours")
    finally:
        os.umask(before)
    modes = [place.stat().st_mode & 0o777 for place in (path, path.parent, path.parent.parent)]
    assert path.parent == home / ".cache" / "fxbt" and modes == [0o600, 0o700, 0o700]
    assert data() == b"ours" and not caplog.records


# --- who may write ----------------------------------------------------------------------------------------------


def is_private(caplog: pytest.LogCaptureFixture, *reasons: str) -> None:
    """Nothing is found in the user's cache, all goes to a folder of this process, and that is said once."""
    assert data() is None
    path = cache.write("data", b"private")
    assert path.parent.name.startswith("fxbt-") and path.parent.parent == Path(tempfile.gettempdir())
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert data() == b"private"
    assert cache.write("data", b"again").parent == path.parent
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert all(reason in message for reason in ("FXBT_CACHE_DIR", *reasons)), message


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o720, 0o702, 0o1777])
def test_a_folder_that_others_may_write_is_not_used(folder, mode, caplog):
    folder.chmod(mode)
    is_private(caplog, f"chmod go-w {folder}", f"mode {mode:03o}")
    assert (folder / "data").read_bytes() == b"ours"


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755, 0o500])
def test_one_that_others_may_read_is(folder, mode):
    folder.chmod(mode)
    assert data() == b"ours"
    folder.chmod(0o700)


@pytest.mark.parametrize("place", [".", ".cache"])
def test_nor_one_that_others_may_exchange(home, folder, place, caplog):
    (home / place).chmod(0o777)
    is_private(caplog, f"chmod go-w {home / place}")


@pytest.mark.parametrize("place", [".", ".cache"])
def test_a_sticky_parent_is_as_good_as_tmp(home, folder, place):
    (home / place).chmod(0o1777)
    assert data() == b"ours"
    assert cache.place() == folder


@pytest.mark.parametrize("place", [".", ".cache"])
def test_nothing_is_made_where_others_may_write(home, place, caplog):
    (home / ".cache").mkdir(mode=0o700)
    (home / place).chmod(0o777)
    is_private(caplog, f"chmod go-w {home / place}")
    assert not (home / ".cache" / "fxbt").exists()


def test_what_is_above_the_home_is_the_systems(tmp_path, folder, monkeypatch, caplog):
    tmp_path.chmod(0o777)
    assert data() == b"ours"
    monkeypatch.setenv("FXBT_CACHE_DIR", str(tmp_path / "elsewhere"))  # which is not below the home
    is_private(caplog, f"chmod go-w {tmp_path}")
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("mode", [0o666, 0o660, 0o602])
def test_a_file_that_others_may_write_is_not_read_but_replaced(folder, mode):
    (folder / "data").chmod(mode)
    assert data() is None
    cache.write("data", b"anew")
    assert data() == b"anew"


@as_root
@pytest.mark.parametrize("place", [".cache/fxbt", ".cache", "."])
def test_a_folder_of_another_user_is_not_used(home, folder, place, caplog):
    """As root sees the home of who ran sudo."""
    os.chown(home / place, STRANGER, -1)
    is_private(caplog, f"{home / place} belongs to another user (uid {STRANGER}; this process has uid 0)")
    assert (folder / "data").read_bytes() == b"ours"


@as_root
def test_a_file_of_another_user_is_not_read(folder):
    os.chown(folder / "data", STRANGER, -1)
    assert data() is None
    cache.write("data", b"anew")
    assert data() == b"anew"


def test_roots_files_are_trusted(folder, monkeypatch):
    """And others' are not, whoever this process is."""
    owner = os.geteuid()
    monkeypatch.setattr(cache, "_user", lambda: STRANGER)
    assert data() == (b"ours" if owner == 0 else None)
    monkeypatch.setattr(cache, "_user", lambda: None)  # Windows
    assert data() == b"ours"


def test_a_link_of_ones_own_to_a_folder_of_ones_own_is_followed(home, tmp_path):
    for name in ("real", "links"):
        (tmp_path / name).mkdir(mode=0o700)
    (tmp_path / "links" / "second").symlink_to("../real")
    (home / ".cache").symlink_to(tmp_path / "links" / "second")
    path = cache.write("data", b"ours")
    assert path.resolve() == tmp_path / "real" / "fxbt" / "data" and data() == b"ours"


@pytest.mark.parametrize("open_one", ["real", "links", "real/fxbt"])
def test_but_not_through_places_that_others_write(home, tmp_path, open_one, caplog):
    test_a_link_of_ones_own_to_a_folder_of_ones_own_is_followed(home, tmp_path)
    (tmp_path / open_one).chmod(0o777)
    is_private(caplog, f"chmod go-w {tmp_path / open_one}")


@as_root
def test_nor_is_a_link_of_another_user(home, tmp_path, caplog):
    """In a folder like /tmp, where anyone may put one."""
    home.chmod(0o1777)
    (tmp_path / "real").mkdir(mode=0o700)
    (home / ".cache").symlink_to(tmp_path / "real")
    os.chown(home / ".cache", STRANGER, -1, follow_symlinks=False)
    is_private(caplog, f"{home / '.cache'} belongs to another user")


def test_links_in_a_circle_are_no_cache(home, caplog):
    (home / ".cache").symlink_to(home / "other")
    (home / "other").symlink_to(home / ".cache")
    is_private(caplog)


def test_a_link_to_nothing_is_no_cache(home, caplog):
    (home / ".cache").symlink_to(home / "missing")
    is_private(caplog)


@pytest.mark.parametrize("name", [".cache", ".cache/fxbt"])
def test_a_file_in_the_folders_place_is_no_cache(home, name, caplog):
    (home / name).parent.mkdir(exist_ok=True)
    (home / name).write_text("a file")
    is_private(caplog)


def test_a_file_that_is_a_link_is_not_read(folder, tmp_path):
    (folder / "data").rename(tmp_path / "elsewhere")
    (folder / "data").symlink_to(tmp_path / "elsewhere")
    assert data() is None
    cache.write("data", b"anew")
    assert data() == b"anew" and (tmp_path / "elsewhere").read_bytes() == b"ours"


def test_neither_is_a_pipe_nor_a_folder(folder):
    os.mkfifo(folder / "pipe")
    (folder / "below").mkdir()
    assert cache.find("pipe") is None and cache.find("below") is None


# --- where nothing can be written -------------------------------------------------------------------------------


def test_a_cache_on_a_read_only_disk_is_read(folder, monkeypatch, caplog):
    monkeypatch.setattr(cache, "_is_writable", lambda folder: False)
    assert data() == b"ours"
    path = cache.write("more", b"private")
    assert path.parent != folder and cache.find("more") == (path, b"private")
    assert data() == b"ours"
    assert "cannot be written" in caplog.text


@as_root
def test_an_unwritable_home_is_no_cache(monkeypatch, caplog):
    """As this process sees it with another user's rights: root may write everywhere."""
    home = Path(tempfile.mkdtemp())  # pytest's are closed to others
    home.chmod(0o500)
    os.chown(home, STRANGER, -1)
    monkeypatch.setenv("HOME", str(home))
    os.seteuid(STRANGER)
    try:
        is_private(caplog, "Permission denied")
        made = cache.place()
    finally:
        os.seteuid(0)
        home.rmdir()
    assert made.stat().st_uid == STRANGER


def test_a_full_disk_leaves_what_was_there(folder, monkeypatch):
    def full(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        cache.write("data", b"newer")
    assert data() == b"ours" and [path.name for path in folder.iterdir()] == ["data"]


def test_a_place_for_private_folders_that_others_write_is_none(home, tmp_path, monkeypatch):
    home.chmod(0o777)
    (tmp_path / "temporary").mkdir()
    (tmp_path / "temporary").chmod(0o777)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    with pytest.raises(cache.Distrusted, match="temporary"):
        cache.place()
    assert data() is None and not list((tmp_path / "temporary").iterdir())


def script(text: str) -> list[str]:
    """A Python process with the cache alone, without torch."""
    load = f"""
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("cache", {cache.__file__!r})
cache = importlib.util.module_from_spec(spec)
sys.modules["cache"] = cache
spec.loader.exec_module(cache)
"""
    return [sys.executable, "-c", load + text]


PRIVATE = """
print(cache.write("data", b"private"))
sys.stdout.flush()
if os.fork() == 0:
    sys.exit()  # the folder is its parent's
os.wait()
assert cache.find("data").data == b"private"
"""


def test_a_private_folder_is_removed_when_its_process_ends(home):
    home.chmod(0o777)
    done = subprocess.run(script(PRIVATE), capture_output=True, text=True, check=True, timeout=120)
    path = Path(done.stdout.strip())
    assert path.name == "data" and path.parent.name.startswith("fxbt-") and not path.parent.exists()
    assert done.stderr.count("fxbt: the cache folder is not used") == 1  # where no logging is set up


# --- several processes ------------------------------------------------------------------------------------------


def once(known: Callable[[], Any], make: Callable[[], Any], seconds: float = 60.0) -> Any:
    return cache.once("work", known, make, seconds)


def test_what_is_known_is_not_made(folder):
    assert once(data, lambda: pytest.fail("it is known")) == b"ours"


def test_what_is_made_is_made_once_and_leaves_no_lock(home, folder):
    assert once(lambda: None, lambda: 1) == 1
    assert once(lambda: None, lambda: None) is None
    with pytest.raises(ZeroDivisionError):
        once(lambda: None, lambda: 1 // 0)
    assert once(lambda: None, lambda: 2) == 2
    assert [path.name for path in folder.iterdir()] == ["data"]


def test_who_does_not_wait_any_longer_goes_without(folder):
    with cache._lock("work.lock") as is_ours:
        assert is_ours
        assert once(lambda: None, lambda: pytest.fail("another one makes it"), seconds=0.0) is None
        answers = iter([None, None, b"made by the other"])
        assert once(lambda: next(answers), lambda: pytest.fail("another one makes it")) == b"made by the other"
    assert once(lambda: None, lambda: 1) == 1


def test_a_lock_file_that_a_crash_left_means_nothing(folder):
    (folder / "work.lock").write_text("")
    assert once(lambda: None, lambda: 1) == 1


def test_a_lock_whose_file_was_exchanged_is_not_held(folder):
    """Its owner let go and took the file between another's opening and locking: who comes then makes a new file."""
    path, handle = cache._open_lock("work.lock")
    assert handle is not None
    path.unlink()
    assert not cache._is_taken(handle, path)
    with cache._lock("work.lock") as is_ours:
        assert is_ours and not cache._is_taken(handle, path)
    os.close(handle)


@pytest.mark.parametrize("harm", [lambda folder: folder.chmod(0o777), lambda folder: (folder / "work.lock").mkdir()])
def test_without_a_folder_to_share_each_works_for_itself(folder, harm):
    harm(folder)
    with cache._lock("work.lock") as first, cache._lock("work.lock") as second:
        assert first and second
    assert once(lambda: None, lambda: 1) == 1


def test_without_locks_each_works_for_itself(folder, monkeypatch):
    monkeypatch.setattr(cache, "fcntl", None)  # Windows
    with cache._lock("work.lock") as first, cache._lock("work.lock") as second:
        assert first and second
    assert not (folder / "work.lock").exists()


def test_nor_are_there_any_where_the_file_system_has_none(folder, monkeypatch):
    def flock(handle: int, operation: int) -> None:
        if operation != cache.fcntl.LOCK_UN:
            raise OSError(95, "Operation not supported")

    monkeypatch.setattr(cache.fcntl, "flock", flock)
    assert once(lambda: None, lambda: 1) == 1


def test_a_child_that_was_forked_does_not_keep_a_lock(folder):
    read, write = os.pipe()
    with cache._lock("work.lock"):
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)  # until the parent closes its end
            os._exit(0)
    with cache._lock("work.lock") as is_ours:
        assert is_ours
    os.close(write)
    os.close(read)
    os.waitpid(child, 0)


def worker(folder: str, number: int, count: int) -> None:
    """Wants the library and two shapes as one of `count` workers; who makes one notes it, and waits until all ask."""
    os.environ.update(FXBT_CACHE_DIR=folder, FXBT_TUNE="1", CC="cc")
    notes = Path(folder).parent

    def make(what: str, result: Any) -> Any:
        (notes / f"made.{what}.{number}").touch()
        while len(list(notes.glob("asked.*"))) < count:
            time.sleep(0.01)
        return result

    toolchain.compiled = lambda *args: make("library", b"a library")
    native._flags = lambda: ("-O3",)
    autotune.measure = lambda contest, clock: steps_to(lambda: make(contest.key, SECOND_IS_FASTER))
    (notes / f"asked.{number}").touch()
    path, is_new = native._found_or_compiled()
    assert path.read_bytes() == b"a library" and is_new == (notes / f"made.library.{number}").exists()
    for key in ("a", "b"):
        assert chosen(contest(key), 120.0) == ("second", "second")


SECOND_IS_FASTER = {"plain": [2.0, 2.0], "second": [1.0, 1.0]}


def steps_to(result: Callable[[], Any]) -> Generator[None, None, Any]:
    """A measurement in one step."""
    yield
    return result()


def chosen(contest: Contest, seconds: float) -> tuple[str, ...]:
    """What a model's warmup chooses."""
    measurements = Measurements(seconds)
    with measurements.at_once():
        return Tuner(measurements).choose(contest)


def contest(key: str) -> Contest:
    return Contest(key, ("plain", "second"), (1, 4), (2,), lambda size: None, "plain")


def test_of_workers_that_start_together_one_compiles_and_measures_and_all_have_it(tmp_path):
    folder = tmp_path / "workers" / "cache"
    folder.mkdir(parents=True, mode=0o700)
    context = multiprocessing.get_context("fork")  # two more that import torch would take ten seconds
    workers = [context.Process(target=worker, args=(str(folder), number, 2)) for number in range(2)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(200)
    assert [process.exitcode for process in workers] == [0, 0]
    assert sorted(path.name.split(".")[1] for path in folder.parent.glob("made.*")) == ["a", "b", "library"]
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".sha256", ".so"]


HOLDER = """
with cache._lock("measuring.lock") as is_ours:
    print(is_ours, flush=True)
    time.sleep(600)
"""


def test_a_process_that_is_killed_gives_its_lock_back(folder, monkeypatch):
    monkeypatch.setenv("FXBT_TUNE", "1")
    monkeypatch.setattr(autotune, "measure", lambda contest, clock: steps_to(lambda: SECOND_IS_FASTER))
    with subprocess.Popen(script(HOLDER), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "True\n"
        assert chosen(contest("a"), 0.1) == ("plain", "plain")  # by rule meanwhile
        process.kill()
    assert (folder / "measuring.lock").exists()
    assert chosen(contest("a"), 60.0) == ("second", "second")
    assert sorted(path.name for path in folder.iterdir()) == ["data", autotune.file_name()]


def test_who_waited_too_long_for_the_compiler_runs_its_own(folder, monkeypatch):
    monkeypatch.setattr(toolchain, "compiled", lambda *args: b"a library")
    monkeypatch.setattr(toolchain, "COMPILE_SECONDS", 0.0)
    monkeypatch.setattr(native, "_flags", lambda: ("-O3",))
    monkeypatch.setenv("CC", "cc")
    with cache._lock("compiling.lock") as is_ours:
        assert is_ours
        path, is_new = native._found_or_compiled()
    assert is_new and path.parent == folder
