"""Checksums of a folder: xxh3 (128 bits) of every file, written beside them before the folder counts as complete."""

import concurrent.futures
import json
import os
from pathlib import Path

import xxhash

from comi_jax.errors import UserError

SUMS = "checksums.json"
FORMAT = 1
SEAL = {"checksums": FORMAT}  # Orbax keeps this in its own metadata: a folder that has it must have checksums
ORBAX = "_CHECKPOINT_METADATA"
# Written by Orbax after the checksums, and of no consequence for what is restored.
LATER = (ORBAX, "commit_success.txt", SUMS)
BLOCK = 1 << 20  # bytes; what is read stays in the processor's cache until it is hashed
THREADS = 2


class CheckpointError(UserError):
    """A folder that holds no usable run, or another one; the message says which and what to do."""


class DamageError(CheckpointError):
    """Files that are not what was written; the message says which."""


def checksum(path: Path) -> str:
    """xxh3 of a file's bytes."""
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
    """Whether ``folder`` has checksums (it has none if it was written before there were any); if it has, every file is
    read and compared.

    Raises DamageError with the files that are missing, of another size or of other content, and CheckpointError if a
    later version of this package wrote them.
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
                f"{folder} has checksums of format {values['format']}, and this version reads formats up to {FORMAT}; "
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
    """A short name for the content of a sealed folder; empty for one without checksums."""
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
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:  # reading and hashing both leave the interpreter
        return list(threads.map(checksum, paths))


def _is_sealed(folder: Path) -> bool:
    try:
        metadata = json.loads((folder / ORBAX).read_text(encoding="utf-8"))
        return SEAL.items() <= (metadata.get("custom_metadata") or {}).items()
    except FileNotFoundError:
        return False
    except (OSError, ValueError, AttributeError):
        return True
