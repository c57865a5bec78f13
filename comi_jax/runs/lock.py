"""A lock on a run's folder: a file created atomically, with the host, process id and start time of its owner.

Whether an owner on this host is alive is read from /proc. An owner on another host touches its lock every BEAT seconds;
after PATIENCE seconds without a heartbeat it counts as dead, and if it wakes up later, it exits.
"""

import contextlib
import datetime
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from comi_jax.runs.checksums import CheckpointError
from comi_jax.runs.folder import Folder

BEAT, PATIENCE = 15.0, 90.0  # seconds


@contextlib.contextmanager
def held(folder: str | os.PathLike, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold the lock of ``folder``. The folder is created if needed, and removed again if it is left empty.

    Raises CheckpointError, naming host and process, while another process holds the lock. The lock of a dead process is
    taken over.
    """
    folder = Folder(folder)
    path, own = folder.lock, json.dumps(_owner(os.getpid()))
    ended = threading.Event()
    beats = threading.Thread(target=_keep_fresh, args=(path, json.loads(own), ended), daemon=True, name="lock")
    new = not folder.path.exists()
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        for _ in range(3):  # two processes may find the same stale lock
            if _create(path, own):
                break
            _remove_stale(path, say)
        else:
            raise CheckpointError(f"several processes are trying to take {path} at once; start only one of them")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from None
    beats.start()
    try:
        yield
    finally:
        ended.set()
        beats.join()
        release(folder)
        if new:
            with contextlib.suppress(OSError):  # not empty
                folder.path.rmdir()


def release(folder: str | os.PathLike) -> None:
    """Remove the lock of ``folder`` if this process holds it."""
    path = Folder(folder).lock
    if _read(path) == _owner(os.getpid()) | {"since": _read(path).get("since")}:
        path.unlink(missing_ok=True)


def _create(path: Path, text: str) -> bool:
    """Create the file with its text atomically: by a hard link, which is atomic on network file systems too. Returns
    whether it was created."""
    draft = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return False
    finally:
        draft.unlink()
    return True


def _keep_fresh(path: Path, own: dict, ended: threading.Event) -> None:
    """Touch the lock until ``ended``. Exits if another process has taken it over, as this one was silent too long."""
    while not ended.wait(BEAT):
        owner = _read(path)
        if owner and owner != own:
            print(
                f"error: {path} was taken over by process {owner['pid']} on {owner['host']} while this process was "
                "suspended; it exits",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            os._exit(1)
        with contextlib.suppress(OSError):  # the file system may be unavailable for a while
            os.utime(path)


def _beats(path: Path, patience: float) -> bool:
    """Whether the lock at ``path`` shows a heartbeat within ``patience`` seconds."""
    end, first = time.monotonic() + patience, None
    while time.monotonic() < end:
        try:
            with path.open("rb") as file:  # opening refreshes the attributes on network file systems
                touched = os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return False
        if first is not None and touched != first:
            return True
        first = touched
        time.sleep(min(1.0, patience / 10))
    return False


def _remove_stale(path: Path, say: Callable[[str], None]) -> None:
    """Remove the lock at ``path`` if its owner is dead. Raises CheckpointError otherwise."""
    owner = _read(path)
    if not owner:
        if not path.exists():  # released in the meantime
            return
        raise CheckpointError(f"{path} was not written by comi_jax; remove it if no training runs in that folder")
    if owner["host"] == socket.gethostname():
        alive = _start(owner["pid"]) == owner["start"]
    elif "beats" in owner:
        say(f"{path} belongs to process {owner['pid']} on {owner['host']}: waiting {PATIENCE:.0f} s for a heartbeat")
        alive = _beats(path, PATIENCE)
    else:
        alive = True  # unknown: older versions have no heartbeat
    if alive:
        raise CheckpointError(
            f"{path.parent} is in use by process {owner['pid']} on {owner['host']}, since {owner['since']}; wait for "
            f"it, choose another folder or, if that process is dead, remove {path}"
        )
    stale = path.with_name(f"{path.name}.stale.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(stale)
        if _read(stale) != owner:  # another process was faster, and this is its new lock
            with contextlib.suppress(FileExistsError):
                os.link(stale, path)
        stale.unlink()


def _read(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return values if isinstance(values, dict) and {"host", "pid", "start", "since"} <= set(values) else {}
    except (OSError, ValueError):
        return {}


def _owner(pid: int) -> dict[str, str | int | float | None]:
    """The identity of process ``pid`` of this host; ``start`` is None if it does not run."""
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": pid, "start": _start(pid), "since": now, "beats": BEAT}


def _start(pid: int) -> str | None:
    """The start time of process ``pid``, which tells it from a later process with the same id; None if it is dead."""
    try:
        # Fields are counted after the process name, which may hold spaces and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return None if fields[0] in "ZX" else f"{boot}/{fields[19]}"
    except FileNotFoundError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:  # a system without /proc
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"
