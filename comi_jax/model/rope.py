"""Rotary position embeddings: each pair of head dimensions is turned by an angle proportional to the position."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from comi_jax.backbone import Backbone


def rope_frequencies(backbone: Backbone) -> Float[Array, " half"]:
    """Radians per position of each pair of head dimensions, LLaMA-3's long-context scaling included."""
    exponent = jnp.arange(0, backbone.head_dim, 2, dtype=jnp.float32) / backbone.head_dim
    frequency = 1.0 / backbone.rope_theta**exponent
    scaling = backbone.rope_scaling
    if scaling is None:
        return frequency
    rotations = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    blend = jnp.clip((rotations - scaling.low_freq_factor) / span, 0.0, 1.0)
    return frequency * (blend + (1.0 - blend) / scaling.factor)


def rotation(backbone: Backbone, positions: Int[Array, "B T"]) -> tuple[Float[Array, "B T 1 half"], ...]:
    """Cosine and sine of the rotation at each position, float32."""
    angle = positions.astype(jnp.float32)[:, :, None, None] * rope_frequencies(backbone)[None, None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "B T heads H"], rope: tuple[Float[Array, "B T 1 half"], ...]) -> Float[Array, "B T heads H"]:
    """Rotary position embedding; dimension i is paired with i + H/2, as in Hugging Face's layout."""
    cos, sin = (r.astype(np.promote_types(x.dtype, jnp.float32)) for r in rope)
    a, b = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
