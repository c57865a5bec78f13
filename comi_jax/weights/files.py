"""Files of weights: checked as a whole, then streamed one layer at a time into (sharded) device arrays, and written
in shards.

One of our parameters is a stack over layers and stored as it is applied; a file has one tensor a layer, projections as
[out, in]. A Source says which tensors of a file make up a parameter. Reading fills a buffer on the device layer by
layer, so that nothing but the result and one tensor is ever held, and every process reads only the blocks that its own
devices keep.
"""

import contextlib
import functools
import json
import math
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open

from comi_jax.params import Placement, as_stored

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SHARD_BYTES = 5_000_000_000  # of a written file, as the hub has it
PIECE_BYTES = 64_000_000  # of a tensor that is read at a time
THREADS = min(4, os.cpu_count() or 1)  # that read and transpose
TRANSPOSED = 64  # rows of a tensor that are transposed at a time

Shape = tuple[int, ...]
Index = tuple[slice, ...]


class WeightsError(ValueError):
    """Weights that do not fit the model or cannot be read; the message lists every one of them."""


# --- one parameter in a file's terms ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How one layer of a parameter lies in a file: as it is, flat, or as a matrix [out, in] of which our first
    ``inputs`` axes are the input."""

    inputs: int = 0
    flat: bool = False

    def copy(self, tensor: np.ndarray, into: np.ndarray) -> None:
        """Write ``tensor``, or some rows of it, into a block of ours, which need not be contiguous."""
        if not self.inputs:
            into[...] = tensor.reshape(into.shape)
            return
        width = math.prod(into.shape[self.inputs + 1 :])  # rows to a step along our axis
        for first in range(0, into.shape[self.inputs], max(1, TRANSPOSED // width)):  # a few rows stay in the caches
            part = into[(slice(None),) * self.inputs + (slice(first, first + max(1, TRANSPOSED // width)),)]
            rows = tensor[first * width : first * width + part.shape[self.inputs] * width]
            part[...] = rows.T.reshape(part.shape)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        if self.inputs:
            return array.reshape(math.prod(array.shape[: self.inputs]), -1).T
        return array.reshape(-1) if self.flat else array

    def shape(self, ours: Shape) -> Shape:
        """The shape of the tensor in the file."""
        if self.inputs:
            return math.prod(ours[self.inputs :]), math.prod(ours[: self.inputs])
        return (math.prod(ours),) if self.flat else ours

    @property
    def row_axis(self) -> int:
        """The axis of ours that goes along the rows of the tensor."""
        return self.inputs

    def block(self, bounds: Sequence[tuple[int, int]], ours: Shape) -> Index:
        """The block of the tensor that holds our block ``bounds``, of a parameter of shape ``ours``."""
        if self.inputs:
            groups = (range(self.inputs, len(ours)), range(self.inputs))
        else:
            groups = (range(len(ours)),) if self.flat else tuple(range(axis, axis + 1) for axis in range(len(ours)))
        return tuple(self._merged(bounds, ours, group) for group in groups)

    @staticmethod
    def _merged(bounds: Sequence[tuple[int, int]], ours: Shape, axes: range) -> slice:
        """Axes that are merged into one can be split along the first of them alone."""
        if any(bounds[axis] != (0, ours[axis]) for axis in axes[1:]):
            raise ValueError(f"a parameter of shape {ours} split as {bounds} is not a block of its tensor")
        rest = math.prod(ours[axis] for axis in axes[1:])
        return slice(bounds[axes[0]][0] * rest, bounds[axes[0]][1] * rest)

    @staticmethod
    def rows(block: Index, first: int, count: int) -> Index:
        """``count`` rows of a block, from its ``first`` on."""
        return (slice(block[0].start + first, block[0].start + first + count), *block[1:]) if block else ()


@dataclass(frozen=True)
class Source:
    """Where a parameter of ``shape`` stands in a file: one tensor, or one a layer, of the same layout."""

    names: tuple[str, ...]
    shape: Shape
    layout: Layout
    stacked: bool

    @property
    def layer(self) -> Shape:
        return self.shape[1:] if self.stacked else self.shape

    def expected(self) -> dict[str, Shape]:
        """The tensors it needs, with their shapes."""
        return dict.fromkeys(self.names, self.layout.shape(self.layer))


Sources = Mapping[str, Source]  # by the flat path of our parameter


# --- files ------------------------------------------------------------------------------------------------------------


class Tensors:
    """The tensors of a file, of an index over several files, or of a folder with either; read one at a time.

    Files are safetensors, or ``.bin`` as torch.save writes them (which needs torch; read as plain tensors only, so that
    no code in them can run). Raises WeightsError for what cannot be read, here or in ``read``.
    """

    def __init__(self, path: str | Path):
        self.path = _entry_point(Path(path))
        listed = _read_index(self.path) if self.path.suffix == ".json" else None
        names = [self.path.name] if listed is None else sorted(set(listed.values()))
        self._files = {name: _open(self.path.parent / name) for name in names}
        held = [(key, name) for name, file in self._files.items() for key in file.shapes]
        where = dict(held)
        if len(where) < len(held):
            twice = sorted({key for key, name in held if where[key] != name})
            raise WeightsError(f"{self.path}: several files hold {_some(twice)}")
        if listed is not None and where != listed:
            wrong = sorted(set(where.items()) ^ set(listed.items()))
            raise WeightsError(f"{self.path} does not list what its files hold: {_some(wrong)}")
        self._where = where
        self.shapes: dict[str, Shape] = {key: self._files[name].shapes[key] for key, name in held}
        self.dtypes: dict[str, str] = {key: self._files[name].dtypes[key] for key, name in held}

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """Tensor ``name``, or a block of it, in its own dtype (bfloat16 through ml_dtypes)."""
        return self._files[self._where[name]].read(name, index)

    def sizes(self) -> dict[str, int]:
        """Bytes of every tensor."""
        return {name: math.prod(shape) * jnp.dtype(self.dtypes[name]).itemsize for name, shape in self.shapes.items()}


def _some(things: list[Any]) -> str:
    return f"{', '.join(map(str, things[:10]))}{f' and {len(things) - 10} more' if len(things) > 10 else ''}"


def _entry_point(path: Path) -> Path:
    """The file to start from: ``path`` itself, or what a folder has."""
    if not path.is_dir():
        return path
    found = [
        path / f"{stem}{ending}{index}"
        for stem, ending in (("model", ".safetensors"), ("pytorch_model", ".bin"))
        for index in (".index.json", "")
    ]
    there = [file for file in found if file.is_file()]
    if not there:
        raise WeightsError(f"{path} has none of {', '.join(file.name for file in found)}")
    return there[0]


def _read_index(path: Path) -> dict[str, str]:
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        plain = all(isinstance(name, str) and Path(name).name == name for name in listed.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is not an index of weight files: {error!r}") from None
    if not plain:
        raise WeightsError(f"{path} names files outside its own folder")
    missing = sorted({name for name in listed.values() if not (path.parent / name).is_file()})
    if missing:
        raise WeightsError(f"{path} names files that are not there: {_some(missing)}")
    return listed


def _open(path: Path) -> "_SafeFile | _TorchFile":
    return _TorchFile(path) if path.suffix in (".bin", ".pt", ".pth") else _SafeFile(path)


class _SafeFile:
    """A safetensors file. It is mapped for each read anew: pages that stay mapped would count as memory held."""

    def __init__(self, path: Path):
        self.path, self.shapes, self.dtypes = path, {}, {}
        with self._mapped() as file:
            for name in file.keys():
                view = file.get_slice(name)
                self.shapes[name] = tuple(view.get_shape())
                self.dtypes[name] = DTYPES.get(view.get_dtype(), view.get_dtype())
        _check_dtypes(path, self.dtypes)

    def read(self, name: str, index: Index) -> np.ndarray:
        with self._mapped() as file:
            return file.get_slice(name)[index] if index else file.get_tensor(name)

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, framework="np") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{self.path} cannot be read as safetensors: {error}") from None


class _TorchFile:
    """A file of torch.save, mapped, with nothing but tensors in it."""

    def __init__(self, path: Path):
        try:
            import torch  # of use to those who read .bin files alone
        except ImportError:
            raise WeightsError(
                f"{path} is a PyTorch file and torch is not installed: pip install torch, or convert it to safetensors"
            ) from None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a file may be refused, before it is
                held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise WeightsError(f"{path} cannot be read as a PyTorch file of plain tensors: {reason[0]}") from None
        if not isinstance(held, dict) or not all(isinstance(x, torch.Tensor) for x in held.values()):
            raise WeightsError(f"{path} does not hold a flat dictionary of tensors")
        self._held, self._bits = held, torch.int16
        self.shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
        self.dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in held.items()}
        _check_dtypes(path, self.dtypes)

    def read(self, name: str, index: Index) -> np.ndarray:
        tensor = self._held[name][index]
        if self.dtypes[name] == "bfloat16":
            return tensor.view(self._bits).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


def _check_dtypes(path: Path, dtypes: Mapping[str, str]) -> None:
    other = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in DTYPES.values()]
    if other:
        raise WeightsError(f"{path} holds tensors that are not {', '.join(DTYPES.values())}: {_some(other)}")


def check(sources: Sources, optional: Mapping[str, Shape], have: Tensors) -> None:
    """Raise WeightsError listing every tensor of ``have`` that is missing, unexpected, not of the shape expected, or of
    another dtype than the same tensor of another layer. Those in ``optional`` may be there."""
    shapes = have.shapes
    want = {name: shape for source in sources.values() for name, shape in source.expected().items()}
    known = {**optional, **want}
    problems = [f"missing {name} {shape}" for name, shape in want.items() if name not in shapes]
    problems += [f"unexpected {name} {shape}" for name, shape in shapes.items() if name not in known]
    problems += [
        f"{name} has shape {shape}, expected {known[name]}"
        for name, shape in shapes.items()
        if name in known and shape != known[name]
    ]
    for source in sources.values():
        found = sorted({have.dtypes[name] for name in source.names if name in shapes})
        if len(found) > 1:
            problems.append(f"{source.names[0]} and the same of other layers have several dtypes: {found}")
    if problems:
        listed = "\n  ".join(problems)
        raise WeightsError(f"{have.path} does not fit the model, {len(problems)} problem(s):\n  {listed}")


# --- from files to devices --------------------------------------------------------------------------------------------


def load(tensors: Tensors, sources: Sources, place: Placement = as_stored) -> dict[str, jax.Array]:
    """The parameters of ``sources``, by flat path, from ``tensors`` that ``check`` has accepted.

    ``place(path)`` gives the dtype of the array (None: the file's) and its sharding (None: the first device). Raises
    WeightsError listing every tensor with infinities or NaN, as it is or in the dtype it is cast to.
    """
    arrays, bad = {}, []
    for path, source in sources.items():
        dtype, sharding = place(path)
        arrays[path], found = _load_one(tensors, source, dtype, sharding)
        bad += [name for name in found if name not in bad]
    if bad:
        raise WeightsError(f"{tensors.path}: infinities or NaN in {len(bad)} tensor(s):\n  " + "\n  ".join(bad))
    return arrays


def _load_one(tensors: Tensors, source: Source, dtype: Any, sharding: Sharding | None) -> tuple[jax.Array, list[str]]:
    """A parameter, and which of its tensors are not finite (on the devices of this process)."""
    dtype = jnp.dtype(dtype or tensors.dtypes[source.names[0]])
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shards: dict[str, list[jax.Array]] = {}
    bad: set[str] = set()
    for device, index in sharding.addressable_devices_indices_map(source.shape).items():
        if str(index) in shards:  # a replica
            shards[str(index)].append(jax.device_put(shards[str(index)][0], device))
        else:
            shard, found = _read_shard(tensors, source, dtype, index)
            # On CPU the array takes the memory as it is; elsewhere it is freed before the next shard is read.
            shards[str(index)] = [jax.block_until_ready(jax.device_put(shard, device))]
            bad |= found
    held = [shard for replicas in shards.values() for shard in replicas]
    return jax.make_array_from_single_device_arrays(source.shape, sharding, held), sorted(bad, key=source.names.index)


def _read_shard(tensors: Tensors, source: Source, dtype: Any, index: Index) -> tuple[np.ndarray, set[str]]:
    """The block ``index`` of a parameter, and the names of its tensors that are not finite. Each tensor is read in
    pieces of rows, several at a time."""
    bounds = [piece.indices(size)[:2] for piece, size in zip(index, source.shape, strict=True)]
    shard = _aligned(tuple(stop - start for start, stop in bounds), dtype)
    own_layers = range(*bounds[0]) if source.stacked else range(1)
    own = bounds[1:] if source.stacked else bounds
    layout, local = source.layout, tuple(stop - start for start, stop in own)
    block, axis = layout.block(own, source.layer), layout.row_axis
    unit = layout.shape(local)[0] // local[axis] if local else 1  # rows of the tensor to a step along that axis
    row_bytes = math.prod(layout.shape(local)[1:]) * dtype.itemsize
    step = max(1, PIECE_BYTES // (row_bytes * unit))
    pieces = [(i, name, first) for i, name in enumerate(source.names[layer] for layer in own_layers)
              for first in range(0, local[axis] if local else 1, step)]  # fmt: skip

    def fill(piece: tuple[int, str, int]) -> bool:
        layer, name, first = piece
        into = shard[layer] if source.stacked else shard
        if not local:
            into[...] = tensors.read(name)
            return is_finite(into)
        into = into[(slice(None),) * axis + (slice(first, first + step),)]
        read = tensors.read(name, layout.rows(block, first * unit, into.shape[axis] * unit))
        layout.copy(read, into)
        return is_finite(read) and (read.dtype == dtype or is_finite(into))

    with ThreadPoolExecutor(THREADS) as pool:
        flags = list(pool.map(fill, pieces))
    return shard, {name for (_, name, _), flag in zip(pieces, flags, strict=True) if not flag}


def _aligned(shape: Shape, dtype: Any) -> np.ndarray:
    """An empty array that JAX takes over without a copy on CPU: it begins at a multiple of 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    first = -raw.ctypes.data % 64
    return raw[first : first + size].view(dtype).reshape(shape)


def is_finite(array: np.ndarray) -> bool:
    """Whether no number is infinite or NaN; of short floats the exponent bits say it, without a detour over float32."""
    ones = {"bfloat16": 0x7F80, "float16": 0x7C00}.get(array.dtype.name)
    if ones is None:
        return bool(np.isfinite(array).all())
    return not bool((array.view(np.uint16) & ones == ones).any())


# --- from devices to files --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writable:
    """A tensor to be: ``make`` fetches it when its turn comes."""

    name: str
    shape: Shape
    dtype: Any
    make: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def writables(sources: Sources, arrays: Mapping[str, Any], dtype: Any = None) -> Iterator[Writable]:
    """The tensors of ``arrays``, by flat path, in a file's names and layouts, in ``dtype`` (None: their own)."""
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
    """Write ``tensors`` into ``folder`` as model.safetensors, or in shards of at most ``shard_bytes`` with an index, as
    the hub has it. Returns the bytes of the tensors."""
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
    """Write one safetensors file, a tensor at a time (safetensors' own writer wants all of them in memory). It appears
    under its name once it is whole."""
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
