"""From files to devices: weights are streamed into (sharded) arrays.

A shard is assembled in host memory from pieces of tensors, then moved to its device. Besides the loaded arrays, memory
holds only one shard and the pieces being read. Each process reads only the blocks that its own devices hold.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from comi_jax.params import Placement, as_stored
from comi_jax.weights.files import Tensors
from comi_jax.weights.layout import Index, Shape, Source, Sources, WeightsError

PIECE_BYTES = 64_000_000  # of a tensor, read at a time
THREADS = min(4, os.cpu_count() or 1)  # for reading and transposing


def load(tensors: Tensors, sources: Sources, place: Placement = as_stored) -> dict[str, jax.Array]:
    """The parameters in ``sources``, by flat path, from ``tensors`` that ``check`` has accepted.

    ``place(path)`` gives the dtype of the array (None: the file's, or float32 if its layers differ) and its sharding
    (None: the first device). Raises WeightsError listing every tensor with infinities or NaN, before or after the cast
    to that dtype.
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
    """A parameter, and the names of its tensors that are not finite (in the shards of this process)."""
    kinds = {tensors.dtypes[name] for name in source.names}
    dtype = jnp.dtype(dtype or (kinds.pop() if len(kinds) == 1 else "float32"))  # float32 is exact for all others
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shards: dict[str, list[jax.Array]] = {}
    bad: set[str] = set()
    for device, index in sharding.addressable_devices_indices_map(source.shape).items():
        if index is None:  # the device holds nothing
            continue
        if str(index) in shards:  # a replica
            shards[str(index)].append(jax.device_put(shards[str(index)][0], device))
        else:
            shard, found = _read_shard(tensors, source, dtype, index)
            # On CPU the array takes over the buffer; elsewhere the buffer is freed before the next shard is read.
            shards[str(index)] = [jax.block_until_ready(jax.device_put(shard, device))]
            bad |= found
    held = [shard for replicas in shards.values() for shard in replicas]
    return jax.make_array_from_single_device_arrays(source.shape, sharding, held), sorted(bad, key=source.names.index)


def _read_shard(tensors: Tensors, source: Source, dtype: Any, index: Index) -> tuple[np.ndarray, set[str]]:
    """The block ``index`` of a parameter, and the names of its tensors that are not finite. Threads read the tensors in
    pieces of some rows each."""
    bounds = [piece.indices(size)[:2] for piece, size in zip(index, source.shape, strict=True)]
    shard = _aligned(tuple(stop - start for start, stop in bounds), dtype)
    own_layers = range(*bounds[0]) if source.stacked else range(1)
    own = bounds[1:] if source.stacked else bounds
    layout, local = source.layout, tuple(stop - start for start, stop in own)
    block, axis = layout.block(own, source.layer), layout.row_axis
    unit = layout.shape(local)[0] // local[axis] if local else 1  # rows of the tensor per index along that axis
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
    """An empty array that JAX takes over without a copy on CPU, because it is aligned to 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    first = -raw.ctypes.data % 64
    return raw[first : first + size].view(dtype).reshape(shape)


def is_finite(array: np.ndarray) -> bool:
    """Whether no number is infinite or NaN. For 16-bit floats it tests the exponent bits, without a cast to float32."""
    ones = {"bfloat16": 0x7F80, "float16": 0x7C00}.get(array.dtype.name)
    if ones is None:
        return bool(np.isfinite(array).all())
    return not bool((array.view(np.uint16) & ones == ones).any())
