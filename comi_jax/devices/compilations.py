"""Compiled programs: kept on disk, so that a command starts fast from its second call on, and dropped where there are
too many in a process.

They are in ``$XDG_CACHE_HOME/comi_jax`` (by default ~/.cache/comi_jax), or in the folder that COMI_CACHE names;
COMI_CACHE=off keeps nothing. The folder may be removed at any time.
"""

import gc
import hashlib
import os
import platform
from pathlib import Path

import jax

VARIABLE, OFF = "COMI_CACHE", "off"
LARGEST = 2 * 2**30  # bytes that JAX's cache may take; the programs used longest ago are removed first
WORTH_KEEPING = 0.2  # seconds of compilation
MAPPINGS = 20_000  # mappings of memory, about a third of what Linux gives a process (vm.max_map_count)


def folder() -> Path | None:
    """The folder of this user's compiled programs, created if needed; None if switched off or not writable."""
    named = os.environ.get(VARIABLE, "")
    if named == OFF:
        return None
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    path = Path(named).expanduser() if named else Path(home) / "comi_jax"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None  # it saves time only: without it, everything is compiled
    return path if os.access(path, os.W_OK) else None


def keep() -> None:
    """Have JAX keep its compiled programs in ``folder``. Does nothing if the user has configured JAX's own cache, or
    in a run of several processes, whose hosts may differ. Call it before the first compilation."""
    path = folder()
    if path is None or jax.config.values["jax_compilation_cache_dir"] or jax.process_count() > 1:
        return
    jax.config.update("jax_compilation_cache_dir", str(path / f"jax-{_processor()}"))
    jax.config.update("jax_compilation_cache_max_size", LARGEST)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)


def drop_if_many() -> None:
    """Drop all programs that this process has compiled once it has more than MAPPINGS mappings of memory: each program
    takes several, and the compiler ends the process where none is left. For loops over data whose every length is a
    program."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPPINGS:
        jax.clear_caches()
        gc.collect()


def _processor() -> str:
    """A name for this kind of processor. Programs for the CPU use the instructions of the one that compiled them, and
    a home folder may be shared by machines of several kinds."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
