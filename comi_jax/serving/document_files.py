"""A document in one file, written whole or not at all, verified and memory-mapped when it is read.

MAGIC | xxh3 of what follows | length of the header | header (JSON) | arrays, each at a multiple of ALIGN bytes
"""

import contextlib
import dataclasses
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import xxhash

from comi_jax.model import mig
from comi_jax.runs.checksums import DamageError
from comi_jax.serving.segments import Contents, DocumentError, Kept, Origin, Segment, Stored

MAGIC = b"comi_jax document 1\n"
DIGEST, ALIGN, CHUNK = 16, 64, 1 << 24  # bytes
BFLOAT16 = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}  # the dtype that NumPy does not know by name


def write(path: Path, document: Contents) -> str:
    """Write ``document``. Returns the file's checksum. Raises DocumentError if it cannot be written."""
    header, arrays, at = _layout(document)
    draft = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    digest = xxhash.xxh3_128()
    try:
        with draft.open("wb") as file:

            def put(content: Any) -> None:
                digest.update(content)
                file.write(content)

            file.write(MAGIC + bytes(DIGEST))
            put(len(header).to_bytes(8, "little"))
            put(header)
            for array, (first, end) in zip(arrays, at, strict=True):
                put(bytes(first - (file.tell() - len(MAGIC) - DIGEST)))
                content = np.ascontiguousarray(np.asarray(array)).reshape(-1).view(np.uint8)
                for start in range(0, end - first, CHUNK):
                    put(content[start : start + CHUNK].data)
            file.seek(len(MAGIC))
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        raise DocumentError(f"the document cannot be written to {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
    return digest.hexdigest()


def _layout(document: Contents) -> tuple[bytes, list[Any], list[tuple[int, int]]]:
    """The header, the arrays in order, and where each begins and ends, counted from behind the digest."""
    segments, arrays = document.segments, []
    for segment in segments:
        arrays += [segment.ids, *([] if segment.characters is None else [segment.characters])]
        arrays += jax.tree.leaves(segment.kept)
    values: dict[str, Any] = {
        "origin": dataclasses.asdict(document.origin),
        "characters": document.characters,
        "truncated": document.truncated,
        "offsets": [segment.characters is not None for segment in segments],
        "keys": [segment.kept.keys is not None for segment in segments],
        "int8": [segment.kept.states.scale is not None for segment in segments],
        "arrays": [[str(x.dtype), list(x.shape)] for x in arrays],
    }
    header = json.dumps(values).encode()
    at, place = [], 8 + len(header)
    for x in arrays:
        place += -(place + len(MAGIC) + DIGEST) % ALIGN
        at.append((place, place + x.nbytes))
        place += x.nbytes
    return header, arrays, at


def read(path: Path) -> tuple[Contents, str]:
    """The document in ``path``, memory-mapped, and the file's checksum. Raises DamageError if the file is not as it was
    written, and DocumentError if it is no document."""
    try:
        with path.open("rb") as file:
            magic, size = file.read(len(MAGIC)), os.fstat(file.fileno()).st_size
        if magic != MAGIC:
            raise DocumentError(f"{path} is not a document of comi_jax, or its first bytes are damaged")
        if size < len(MAGIC) + DIGEST + 8:
            raise DamageError(f"{path} is damaged: it ends after {size} bytes; encode its text again")
        content = np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise DocumentError(f"the document {path} cannot be read: {error.strerror or error}") from None
    expected, content = content[len(MAGIC) : len(MAGIC) + DIGEST].tobytes().hex(), content[len(MAGIC) + DIGEST :]
    digest = xxhash.xxh3_128()
    for start in range(0, len(content), CHUNK):
        digest.update(content[start : start + CHUNK].data)
    if digest.hexdigest() != expected:
        raise DamageError(f"{path} is damaged: its {size} bytes are not those that were written; encode its text again")
    end = 8 + int.from_bytes(content[:8].tobytes(), "little")
    values = json.loads(content[8:end].tobytes())
    arrays = _arrays(content, values["arrays"], end)
    segments = [_segment(arrays, *told) for told in zip(values["offsets"], values["keys"], values["int8"], strict=True)]
    return Contents(Origin(**values["origin"]), tuple(segments), values["characters"], values["truncated"]), expected


def _arrays(content: np.ndarray, described: list[Any], place: int) -> Iterator[np.ndarray]:
    for name, shape in described:
        dtype = BFLOAT16.get(name) or np.dtype(name)
        place += -(place + len(MAGIC) + DIGEST) % ALIGN
        end = place + dtype.itemsize * int(np.prod(shape))
        yield content[place:end].view(dtype).reshape(shape)
        place = end


def _segment(arrays: Iterator[np.ndarray], offsets: bool, keys: bool, int8: bool) -> Segment:
    """The next segment of ``arrays``, in the order of ``_layout``."""
    ids = np.asarray(next(arrays))
    characters = np.asarray(next(arrays)) if offsets else None
    states, *others = (Stored(0, 0 if int8 else None) for _ in range(3 if keys else 1))
    k, v = others or (None, None)
    shape = jax.tree.structure(Kept(states, k, v, mig.Norms(0, 0)))
    return Segment(ids, characters, jax.tree.unflatten(shape, [next(arrays) for _ in range(shape.num_leaves)]))
