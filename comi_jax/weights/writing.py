"""From devices to files: safetensors, in shards with an index, written one tensor at a time."""

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from comi_jax.weights.files import DTYPES
from comi_jax.weights.layout import Layout, Shape, Sources

SHARD_BYTES = 5_000_000_000  # per file at most, as on the Hugging Face hub


@dataclass(frozen=True)
class Writable:
    """A tensor to be written; ``make`` fetches it when it is needed."""

    name: str
    shape: Shape
    dtype: Any
    make: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def writables(sources: Sources, arrays: Mapping[str, Any], dtype: Any = None) -> Iterator[Writable]:
    """``arrays``, by flat path, as tensors with the names and layouts in ``sources``, in ``dtype`` (None: as is)."""
    for path, array in arrays.items():
        source = sources[path]
        kept = jnp.dtype(dtype or array.dtype)
        for layer, name in enumerate(source.names):
            make = functools.partial(_fetch, array, layer if source.stacked else None, source.layout, kept)
            yield Writable(name, source.layout.shape(source.layer), kept, make)


def _fetch(array: Any, layer: int | None, layout: Layout, dtype: Any) -> np.ndarray:
    one = np.asarray(array if layer is None else array[layer])
    return np.asarray(layout.to_theirs(one), dtype, order="C")


def save(folder: str | Path, tensors: Iterable[Writable], shard_bytes: int = SHARD_BYTES) -> int:
    """Write ``tensors`` to ``folder`` as model.safetensors, or as shards with an index, as on the Hugging Face hub. A
    shard has at most ``shard_bytes``, unless a single tensor has more. Returns the bytes of the tensors."""
    shards: list[list[Writable]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(other.bytes for other in shards[-1]) + tensor.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    count, weight_map = len(shards), {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
        save_file(Path(folder) / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.bytes for shard in shards for tensor in shard)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        path = Path(folder) / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def save_file(path: Path, tensors: Sequence[Writable]) -> None:
    """Write one safetensors file, one tensor at a time (safetensors' own writer needs all of them in memory). The file
    gets its name only when it is complete."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        kind = next(short for short, name in DTYPES.items() if name == tensor.dtype.name)
        end = start + tensor.bytes
        header[tensor.name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            array = tensor.make()
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise ValueError(f"{tensor.name} is {array.shape} {array.dtype}, not {tensor.shape} {tensor.dtype}")
            file.write(array.reshape(-1).view(np.uint8).data)
    part.replace(path)
