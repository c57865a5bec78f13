"""How a parameter of ours lies in a file of weights.

One of our parameters is a stack over layers and stored as it is applied; a file has one tensor a layer, projections as
[out, in]. A Source says which tensors of a file make up a parameter.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from comi_jax.errors import UserError

TRANSPOSED = 64  # rows of a tensor that are transposed at a time
Shape = tuple[int, ...]
Index = tuple[slice, ...]


class WeightsError(UserError):
    """Weights that do not fit the model or cannot be read; the message lists every one of them."""


def some(things: Sequence[Any]) -> str:
    """``things`` for a message: the first ten."""
    return f"{', '.join(map(str, things[:10]))}{f' and {len(things) - 10} more' if len(things) > 10 else ''}"


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
