"""Compression over the tokens of a row on one device (Whole) or split over several (Split).

Split tokens lie in order on the devices of one mesh axis, equally many on each. Per-token scalars and the vectors of
the representatives are all-gathered; vectors of other tokens pass around a ring, as far as a group reaches. Each device
merges its part of a group, and the parts are combined by their softmax normalizers,

    h_g = sum_d exp(z_gd - z_g) h_gd,   z_g = log sum_d exp(z_gd)        d: the devices that hold tokens of g

so that results and gradients equal those of one device.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from comi_jax.kernels import dispatch
from comi_jax.kernels.merge import merge
from comi_jax.kernels.redundancy import max_cosine
from comi_jax.model import mig


class Whole:
    """All tokens of a row are on this device."""

    devices = 1

    def position(self, length: int) -> Int[Array, " S"]:
        """The position in the row of each of this device's ``length`` tokens."""
        return jnp.arange(length, dtype=jnp.int32)

    def all(self, numbers: Array) -> Array:
        """Per-token scalars [B, S] of this device, gathered for all tokens of the row."""
        return numbers

    def own(self, numbers: Array) -> Array:
        """The inverse of ``all``: the scalars of this device's tokens."""
        return numbers

    def vectors(self, x: Float[Array, "C S D"], index: Int[Array, "B M"]) -> Float[Array, "B M D"]:
        """The vectors of a few tokens, by their positions in the row."""
        return dispatch.of_contexts(x, index)

    def redundancy(
        self, x: Float[Array, "C S D"], inverse: Float[Array, "C S"], group: Int[Array, "B T"], kernels: str | None
    ) -> Float[Array, "B S"]:
        """``mig.redundancy`` of this device's tokens among all tokens of the row; ``group`` covers all of them."""
        return mig.redundancy(x, inverse, group, kernels)

    def merge(
        self,
        x: Float[Array, "C S D"],
        gain: Float[Array, "B S"],
        group: Int[Array, "B T"],
        slots: int,
        kernels: str | None,
    ) -> tuple[Float[Array, "B M D"], Float[Array, "B M"]]:
        """``kernels.merge.merge`` over all tokens of the row; ``group`` covers all of them."""
        return merge(x, gain, group, slots, implementation=kernels)


@dataclasses.dataclass(frozen=True)
class Split:
    """The tokens of a row are split over the ``devices`` devices of the mesh axis ``axis``; used inside shard_map."""

    axis: str
    devices: int
    mesh_axes: tuple[str, ...]  # all axes of the mesh: loops with collectives need one trip count on all devices

    def position(self, length: int) -> Int[Array, " S"]:
        return jax.lax.axis_index(self.axis) * length + jnp.arange(length, dtype=jnp.int32)

    def all(self, numbers: Array) -> Array:
        return jax.lax.all_gather(numbers, self.axis, axis=1, tiled=True)

    def own(self, numbers: Array) -> Array:
        length = numbers.shape[1] // self.devices
        return jax.lax.dynamic_slice_in_dim(numbers, jax.lax.axis_index(self.axis) * length, length, axis=1)

    def vectors(self, x: Float[Array, "C S D"], index: Int[Array, "B M"]) -> Float[Array, "B M D"]:
        here, inside = self._here(index, x.shape[1], jax.lax.axis_index(self.axis))
        mine = jnp.where(inside[:, :, None], dispatch.of_contexts(x, here), 0)
        return jax.lax.psum(mine, self.axis)

    def redundancy(
        self, x: Float[Array, "C S D"], inverse: Float[Array, "C S"], group: Int[Array, "B T"], kernels: str | None
    ) -> Float[Array, "B S"]:
        reach = self._reach(group, x.shape[1])
        partner = self._partners(*jax.lax.stop_gradient((x, inverse)), group, reach, kernels)
        wide, contexts = inverse.dtype, x.shape[0]

        def product(partner):
            return jnp.sum(x.astype(wide) * _fetch(self, x, partner, reach).astype(wide), axis=2)

        if partner.shape[0] == contexts:
            products = product(partner)
        else:  # one question of each context at a time, fetched again for gradients: it fetches a vector for each token
            asked = partner.reshape(contexts, -1, partner.shape[1]).swapaxes(0, 1)
            products = jax.lax.map(jax.checkpoint(product), asked).swapaxes(0, 1).reshape(partner.shape)
        inverses = dispatch.for_rows(inverse, partner.shape[0])
        cosine = products * (inverses * dispatch.of_contexts(self.all(inverse), jnp.maximum(partner, 0)))
        return jnp.where(partner >= 0, cosine, 0.0)

    def merge(
        self,
        x: Float[Array, "C S D"],
        gain: Float[Array, "B S"],
        group: Int[Array, "B T"],
        slots: int,
        kernels: str | None,
    ) -> tuple[Float[Array, "B M D"], Float[Array, "B M"]]:
        memory, normalizer = merge(x, gain, self.own(group), slots, implementation=kernels)
        top = jax.lax.pmax(jax.lax.stop_gradient(normalizer), self.axis)
        power = jnp.where(normalizer > -jnp.inf, jnp.exp(normalizer - jnp.where(top > -jnp.inf, top, 0.0)), 0.0)
        total = jax.lax.psum(power, self.axis)
        filled = total > 0
        total = jnp.where(filled, total, 1.0)
        whole = jax.lax.psum(memory * (power / total)[:, :, None], self.axis)
        return whole, jnp.where(filled, top + jnp.log(total), -jnp.inf)

    def _here(self, index, length, device):
        """The local positions on ``device`` of the tokens ``index``, and which of them it holds."""
        return jnp.clip(index - device * length, 0, length - 1), index // length == device

    def _shift(self, tree, step):
        """``tree`` of the device ``step`` places before this one in the ring."""
        ring = [(device, (device + step) % self.devices) for device in range(self.devices)]
        return jax.tree.map(lambda a: jax.lax.ppermute(a, self.axis, ring), tree)

    def _reach(self, group, length):
        """The largest distance, in devices, between a token and another one of its group; the same on all devices."""
        (group,) = dispatch.pad_tokens(length, group)
        first, end = dispatch.reach(group, length)
        device = jnp.arange(self.devices, dtype=jnp.int32)[None, :]
        farthest = jnp.maximum(device - first // length, (end - 1) // length - device)
        farthest = jnp.where(end > 0, farthest, 0)  # a device whose tokens have no group
        return jax.lax.pmax(jnp.max(farthest), self.mesh_axes)

    def _partners(self, x, inverse, group, reach, kernels):
        """The position in the row of each token's most similar other token of its group, -1 if it is alone."""
        length, device = x.shape[1], jax.lax.axis_index(self.axis)
        here = (x, inverse, self.own(group))
        value, index = max_cosine(*here, implementation=kernels)
        best = (jnp.where(index < 0, -jnp.inf, value), jnp.where(index < 0, -1, index + device * length))
        token = jnp.arange(length, dtype=jnp.int32)

        def window(left, right, step):
            """[left | here | right] as one sequence. Tokens that wrapped around the ends of the row must match none:
            those before the first token get a group each, those after the last none."""
            before, ours, behind = (jnp.where(g < 0, -1, g + length) for g in (left[2], here[2], right[2]))
            before = jnp.where(device >= step, before, token[None, :])
            behind = jnp.where(device + step < self.devices, behind, -1)
            vectors, inverses = (jnp.concatenate([left[k], here[k], right[k]], axis=1) for k in (0, 1))
            return vectors, inverses, jnp.concatenate([before, ours, behind], axis=1)

        def farther(state):
            step, left, right, (value, index) = state
            left, right = self._shift(left, 1), self._shift(right, -1)
            new, at = max_cosine(*window(left, right, step), implementation=kernels)
            new, at = new[:, length : 2 * length], at[:, length : 2 * length]
            side = at // length - 1  # -1, 0, 1 for left, here, right
            position = (device + side * step) * length + at % length
            better = (at >= 0) & ((new > value) | ((new == value) & (position < index)))
            return step + 1, left, right, (jnp.where(better, new, value), jnp.where(better, position, index))

        start = (jnp.int32(1), here, here, best)
        return jax.lax.while_loop(lambda state: state[0] <= reach, farther, start)[3][1]


def _fetched(split: Split, x: Array, index: Array, reach: Array) -> Array:
    """The vectors [B, S, D] of the row's tokens ``index`` [B, S], at most ``reach`` devices away; 0 for index -1."""
    device, length = jax.lax.axis_index(split.axis), x.shape[1]

    def take(out, source, vectors):
        local, inside = split._here(index, length, source)
        return jnp.where(
            (inside & (index >= 0))[:, :, None], jnp.take_along_axis(vectors, local[:, :, None], axis=1), out
        )

    def farther(state):
        step, left, right, out = state
        left, right = split._shift(left, 1), split._shift(right, -1)
        return step + 1, left, right, take(take(out, device - step, left), device + step, right)

    start = (jnp.int32(1), x, x, take(jnp.zeros_like(x), device, x))
    return jax.lax.while_loop(lambda state: state[0] <= reach, farther, start)[3]


_fetch = jax.custom_vjp(_fetched, nondiff_argnums=(0,))


def _fetch_forward(split, x, index, reach):
    return _fetch(split, x, index, reach), (index, reach)


def _fetch_backward(split, saved, cotangent):
    """The cotangents of fetched tokens travel back around the ring, summed with those of the devices they pass."""
    index, reach = saved
    device, length = jax.lax.axis_index(split.axis), index.shape[1]
    wide = dispatch.wide(cotangent)
    rows = jnp.arange(index.shape[0], dtype=jnp.int32)[:, None]

    def give(total, source):
        local, inside = split._here(index, length, source)
        own = jnp.where((inside & (index >= 0))[:, :, None], cotangent, 0).astype(wide)
        return total.at[rows, local].add(own)

    def nearer(state):
        step, left, right = state
        left, right = give(left, device - step), give(right, device + step)
        return step - 1, split._shift(left, -1), split._shift(right, 1)

    nothing = jnp.zeros(cotangent.shape, wide)
    _, left, right = jax.lax.while_loop(lambda state: state[0] > 0, nearer, (reach, nothing, nothing))
    return (give(left + right, device)).astype(cotangent.dtype), None, None


_fetch.defvjp(_fetch_forward, _fetch_backward)
