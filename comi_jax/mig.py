"""Marginal information gain, the paper's equation (1): what a token tells about the query that others do not tell too.

G_i = α · cos(x_i, q̄) − β · max_{j ∈ S, j ≠ i} cos(x_i, x_j)
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from comi_jax.kernels.redundancy import max_cosine

EPSILON = 1e-12  # cos(a, b) = a·b / (max(‖a‖, ε) max(‖b‖, ε))


def unit(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """x / max(‖x‖, ε) in float32 at least. Scaled by its largest entry first, so that no norm over- or underflows."""
    x = x.astype(np.promote_types(x.dtype, jnp.float32))
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    scaled = x / jnp.where(largest > 0, largest, 1.0)
    square = jnp.sum(jnp.square(scaled), axis=-1, keepdims=True)  # at least 1, or 0 for the zero vector
    norm = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    return scaled / norm * jnp.minimum(largest * jax.lax.stop_gradient(norm) / EPSILON, 1.0)


def relevance(unit_tokens: Float[Array, "B S D"], unit_query: Float[Array, "B D"]) -> Float[Array, "B S"]:
    """cos(x_i, q̄) of every token with the query vector of its example."""
    return jnp.einsum("bsd,bd->bs", unit_tokens, unit_query, precision=jax.lax.Precision.HIGHEST)


def redundancy(unit_tokens: Float[Array, "B S D"], group: Int[Array, "B S"]) -> Float[Array, "B S"]:
    """max_{j≠i} cos(x_i, x_j) over the other tokens of i's group; 0 for a token alone in its group or of no group
    (-1)."""
    return max_cosine(unit_tokens, group)[0]


def gain(
    relevance: Float[Array, "B S"], redundancy: Float[Array, "B S"], alpha: Float[Array, ""], beta: Float[Array, ""]
) -> Float[Array, "B S"]:
    """(1): α · relevance − β · redundancy."""
    return alpha.astype(relevance.dtype) * relevance - beta.astype(redundancy.dtype) * redundancy
