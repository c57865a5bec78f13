"""Marginal information gain, the paper's equation (1): relevance to the query minus redundancy with other tokens.

G_i = α · cos(x_i, q̄) − β · max_{j ∈ S, j ≠ i} cos(x_i, x_j)
"""

from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from comi_jax.kernels.redundancy import max_cosine

EPSILON = 1e-12  # cos(a, b) = a·b / (max(‖a‖, ε) max(‖b‖, ε))
LARGE = 2.0**48  # a million squares of entries up to here still sum to a finite float32
SHRINK = 2.0**-80  # factor for larger ones; a power of two, so the direction stays exact


@no_type_check
@struct.dataclass
class Norms:
    """What cosines need of vectors x besides x: no query changes it, so that a stored context keeps it."""

    scale: Any  # [*batch]: 1, or SHRINK where the entries of x are huge; in the dtype of x
    inverse: Any  # [*batch]: 1 / max(‖scale · x‖, ε), in float32 at least


def norms(x: Float[Array, "*batch D"]) -> Norms:
    """The ``Norms`` of vectors."""
    wide = np.promote_types(x.dtype, jnp.float32)
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1)).astype(wide)
    scale = jnp.where(largest > LARGE, SHRINK, 1.0).astype(x.dtype)
    square = jnp.sum(jnp.square((x * scale[..., None]).astype(wide)), axis=-1)
    return Norms(scale, 1.0 / jnp.sqrt(jnp.maximum(square, EPSILON**2)))


def directions(
    x: Float[Array, "*batch D"], known: Norms | None = None
) -> tuple[Float[Array, "*batch D"], Float[Array, "*batch"]]:
    """x', which is x scaled down if its entries are huge, and 1 / max(‖x'‖, ε) in float32 at least; ``known`` are the
    norms of x, if computed already.

    cos(a, b) is then a'·b' times both inverse norms, which avoids a normalised copy, rounded to bfloat16, of x.
    """
    known = norms(x) if known is None else known
    return x * known.scale[..., None], known.inverse


def relevance(
    x: Float[Array, "C S D"], inverse: Float[Array, "C S"], query: Float[Array, "B D"]
) -> Float[Array, "B S"]:
    """cos(x_i, q̄) of each token with each query vector of its context, the B / C of a context in order; ``x`` and
    ``inverse`` as ``directions`` gives them."""
    query, query_inverse = directions(query.astype(inverse.dtype))
    x, unit = x.astype(inverse.dtype), query * query_inverse[:, None]
    if x.shape[0] == unit.shape[0]:
        return jnp.sum(x * unit[:, None, :], axis=2) * inverse
    unit = unit.reshape(x.shape[0], -1, x.shape[2])  # matrices: gradients of sums would hold x once for each query
    cosines = jnp.einsum("csd,cqd->cqs", x, unit, precision=jax.lax.Precision.HIGHEST) * inverse[:, None]
    return cosines.reshape(-1, x.shape[1])


def redundancy(
    x: Float[Array, "C S D"],
    inverse: Float[Array, "C S"],
    group: Int[Array, "B S"],
    implementation: str | None = None,
) -> Float[Array, "B S"]:
    """max_{j≠i} cos(x_i, x_j) over the other tokens of i's group; 0 for a token that is alone or in no group (-1)."""
    return max_cosine(x, inverse, group, implementation=implementation)[0]


def gain(
    relevance: Float[Array, "B S"], redundancy: Float[Array, "B S"], alpha: Float[Array, ""], beta: Float[Array, ""]
) -> Float[Array, "B S"]:
    """(1): α · relevance − β · redundancy."""
    return alpha.astype(relevance.dtype) * relevance - beta.astype(redundancy.dtype) * redundancy
