"""How weight files store our parameters.

A parameter of ours is stacked over layers and stored as it is applied; a file has one tensor per layer, with
projections as [out, in]. A Source lists the tensors of a file that make up one parameter.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from comi_jax.errors import UserError

TRANSPOSED = 64  # rows of a tensor to transpose at a time
Shape = tuple[int, ...]
Index = tuple[slice, ...]


class WeightsError(UserError):
    """Weights that do not fit the model or cannot be read; the message lists every problem."""


def some(things: Sequence[Any]) -> str:
    """The first ten of ``things``, and how many more there are, as text for a message."""
    return f"{', '.join(map(str, things[:10]))}{f' and {len(things) - 10} more' if len(things) > 10 else ''}"


@dataclass(frozen=True)
class Layout:
    """How a file stores one layer of a parameter: unchanged, flat, or as a matrix [out, in], where our first ``inputs``
    axes are the input."""

    inputs: int = 0
    flat: bool = False

    def copy(self, tensor: np.ndarray, into: np.ndarray) -> None:
        """Copy ``tensor``, or some of its rows, to ``into``, a block of our parameter that need not be contiguous."""
        if not self.inputs:
            into[...] = tensor.reshape(into.shape)
            return
        width = math.prod(into.shape[self.inputs + 1 :])  # rows per index along our axis
        for first in range(0, into.shape[self.inputs], max(1, TRANSPOSED // width)):  # a few rows fit in the caches
            part = into[(slice(None),) * self.inputs + (slice(first, first + max(1, TRANSPOSED // width)),)]
            rows = tensor[first * width : first * width + part.shape[self.inputs] * width]
            part[...] = rows.T.reshape(part.shape)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        if self.inputs:
            return array.reshape(math.prod(array.shape[: self.inputs]), -1).T
        return array.reshape(-1) if self.flat else array

    def shape(self, ours: Shape) -> Shape:
        """The shape in the file of one layer, or a block of it, whose shape is ``ours``."""
        if self.inputs:
            return math.prod(ours[self.inputs :]), math.prod(ours[: self.inputs])
        return (math.prod(ours),) if self.flat else ours

    @property
    def row_axis(self) -> int:
        """Our axis that corresponds to the rows of the tensor."""
        return self.inputs

    def block(self, bounds: Sequence[tuple[int, int]], ours: Shape) -> Index:
        """The block of the tensor that corresponds to block ``bounds`` of our parameter of shape ``ours``."""
        if self.inputs:
            groups = (range(self.inputs, len(ours)), range(self.inputs))
        else:
            groups = (range(len(ours)),) if self.flat else tuple(range(axis, axis + 1) for axis in range(len(ours)))
        return tuple(self._merged(bounds, ours, group) for group in groups)

    @staticmethod
    def _merged(bounds: Sequence[tuple[int, int]], ours: Shape, axes: range) -> slice:
        """The slice along the axis into which ``axes`` are merged. Raises ValueError if any but the first is split."""
        if any(bounds[axis] != (0, ours[axis]) for axis in axes[1:]):
            raise ValueError(f"a parameter of shape {ours} split as {bounds} is not a block of its tensor")
        rest = math.prod(ours[axis] for axis in axes[1:])
        return slice(bounds[axes[0]][0] * rest, bounds[axes[0]][1] * rest)

    @staticmethod
    def rows(block: Index, first: int, count: int) -> Index:
        """``count`` rows of ``block``, from row ``first`` on."""
        return (slice(block[0].start + first, block[0].start + first + count), *block[1:]) if block else ()


@dataclass(frozen=True)
class Source:
    """The tensors of a file that make up a parameter of ``shape``: one, or one per layer, all with the same layout."""

    names: tuple[str, ...]
    shape: Shape
    layout: Layout
    stacked: bool

    @property
    def layer(self) -> Shape:
        return self.shape[1:] if self.stacked else self.shape

    def expected(self) -> dict[str, Shape]:
        """The required tensors and their shapes."""
        return dict.fromkeys(self.names, self.layout.shape(self.layer))


Sources = Mapping[str, Source]  # by the flat path of our parameter
