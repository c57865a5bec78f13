"""Checksums of a folder: the 128-bit xxh3 of every file, written before the folder counts as complete."""

import concurrent.futures
import json
import os
from pathlib import Path

import xxhash

from comi_jax.errors import UserError

SUMS = "checksums.json"
FORMAT = 1
SEAL = {"checksums": FORMAT}  # stored in Orbax's metadata: a folder that has it must have checksums
ORBAX = "_CHECKPOINT_METADATA"
# Written by Orbax after the checksums, and not needed to restore.
LATER = (ORBAX, "commit_success.txt", SUMS)
BLOCK = 1 << 20  # bytes; small enough to stay in the processor's cache between reading and hashing
THREADS = 2


class CheckpointError(UserError):
    """The folder holds no usable run, or a different one; the message says which and what to do."""


class DamageError(CheckpointError):
    """Files differ from what was written; the message names them."""


def checksum(path: Path) -> str:
    """The xxh3 of a file."""
    state, buffer = xxhash.xxh3_128(), memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(buffer[:count])
    return state.hexdigest()


def seal(folder: str | Path) -> None:
    """Write the checksums of all files below ``folder``."""
    folder = Path(folder)
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name not in LATER)
    sums = _checksums([folder / name for name in names])
    files = {name: [(folder / name).stat().st_size, value] for name, value in zip(names, sums, strict=True)}
    with (folder / SUMS).open("w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, "algorithm": "xxh3_128", "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def verify(folder: str | Path) -> bool:
    """Compare every file of ``folder`` with its checksum. False if it has no checksums, as an older version wrote it.

    Raises DamageError with the files that are missing or differ in size or content, and CheckpointError if a later
    version of this package wrote the checksums.
    """
    folder = Path(folder)
    if not (folder / SUMS).is_file():
        if _is_sealed(folder):
            raise DamageError(f"{folder} is damaged: {SUMS} is missing")
        return False
    try:
        values = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        if isinstance(values["format"], int) and values["format"] > FORMAT:
            raise CheckpointError(
                f"{folder} has checksums of format {values['format']}, but this version reads formats up to {FORMAT}; "
                "install the version that wrote it, or a later one"
            )
        files = {name: (size, value) for name, (size, value) in values["files"].items()}
        known = values["format"] == FORMAT and values["algorithm"] == "xxh3_128"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise DamageError(f"{folder} is damaged: {SUMS} cannot be read") from None
    if not known:
        raise DamageError(f"{folder} is damaged: {SUMS} cannot be read")
    wrong = [f"{name} {what}" for name, what in _compare(folder, files).items()]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise DamageError(f"{folder} is damaged: {', '.join(wrong[:3])}{more}")
    return True


def identity(folder: str | Path) -> str:
    """A hash of the content of a sealed folder; empty for a folder without checksums."""
    path = Path(folder) / SUMS
    return checksum(path) if path.is_file() else ""


def _compare(folder: Path, files: dict[str, tuple[int, str]]) -> dict[str, str]:
    wrong, whole = {}, []
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file():
            wrong[name] = "is missing"
        elif path.stat().st_size != size:
            wrong[name] = f"has {path.stat().st_size} bytes, not {size}"
        else:
            whole.append(name)
    try:
        sums = _checksums([folder / name for name in whole])
    except OSError as error:
        return wrong | {Path(str(error.filename)).name: f"cannot be read: {error.strerror}"}
    return wrong | {name: "has other content" for name, s in zip(whole, sums, strict=True) if s != files[name][1]}


def _checksums(paths: list[Path]) -> list[str]:
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:  # reading and hashing both release the GIL
        return list(threads.map(checksum, paths))


def _is_sealed(folder: Path) -> bool:
    try:
        metadata = json.loads((folder / ORBAX).read_text(encoding="utf-8"))
        return SEAL.items() <= (metadata.get("custom_metadata") or {}).items()
    except FileNotFoundError:
        return False
    except (OSError, ValueError, AttributeError):
        return True
