"""One update of the trained weights.

loss (9) = mean over the answer tokens of a batch of -log p(token | memory, query, answer tokens before it)

An update is left out if the loss or a gradient is not finite: weights and optimizer, its own counter included, stay as
they were, bit for bit; only ``TrainState.step`` moves on, and with it the position in the data and the random key.
"""

import ctypes
import functools
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from comi_jax import comi
from comi_jax.params import combine


@no_type_check
@struct.dataclass
class TrainState:
    """All that a step changes. ``trained`` is flat ("encoder/layers/q") and float32; ``step`` counts batches, those
    whose update was left out included."""

    step: Int[Array, ""]
    trained: dict[str, Array]
    optimizer: Any


def micro_batches(batch: comi.Batch, count: int) -> comi.Batch:
    """``batch`` with a leading axis of ``count`` micro-batches, each of which has rows of every device: none moves.
    Questions stay with their context."""
    contexts = batch.context.shape[0]

    def split(x: Array) -> Array:
        parts = x.reshape(contexts // count, count, x.shape[0] // contexts, *x.shape[1:]).swapaxes(0, 1)
        return parts.reshape(count, -1, *x.shape[1:])

    return jax.tree.map(split, batch)


def train_step(
    state: TrainState,
    frozen: dict[str, Array],
    batch: comi.Batch,
    key: Array,
    *,
    arch: comi.Architecture,
    update: optax.GradientTransformation,
    accumulate: int,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One update from ``batch``, whose rows are taken in ``accumulate`` micro-batches; equal to one big batch.

    The metric ``skipped`` is 1 if the update was left out, else 0; ``memory_vectors`` counts those of all rows."""
    micro = micro_batches(batch, accumulate)
    keys = jax.random.split(jax.random.fold_in(key, state.step), accumulate)

    def loss_sum(trained, rows, dropout_key):
        sums = comi.loss(combine(trained, frozen), arch, rows, min(arch.compression.rates), dropout_key)
        return sums.loss, sums

    def gradients(rows_and_key):
        (_, sums), grads = jax.value_and_grad(loss_sum, has_aux=True)(state.trained, *rows_and_key)
        return grads, sums

    def add_micro(total, rows_and_key):
        return jax.tree.map(jnp.add, total, gradients(rows_and_key)), None

    if accumulate == 1:  # no second copy of the gradients to add to
        grads, sums = gradients(jax.tree.map(lambda x: x[0], (micro, keys)))
    else:
        zero = jnp.zeros((), jnp.float32)
        nothing = (jax.tree.map(jnp.zeros_like, state.trained), comi.LossSums(zero, zero, zero, zero))
        (grads, sums), _ = jax.lax.scan(add_micro, nothing, (micro, keys))
    grads = jax.tree.map(lambda g: g / sums.tokens, grads)
    # optax raises Python floats to int32 counters, which the tests' strict promotion refuses.
    with jax.named_scope("update"), jax.numpy_dtype_promotion("standard"):
        updates, optimizer = update.update(grads, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
    norm = optax.tree.norm(grads)  # not finite if any gradient is not
    finite = jnp.isfinite(sums.loss) & jnp.isfinite(norm)
    new, old = (trained, optimizer), (state.trained, state.optimizer)
    trained, optimizer = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    metrics = {
        "loss": sums.loss / sums.tokens,
        "accuracy": sums.correct / sums.tokens,
        "gradient_norm": norm,
        "skipped": 1 - finite.astype(jnp.int32),
        "memory_vectors": sums.vectors,
    }
    return TrainState(state.step + 1, trained, optimizer), metrics


class CompiledStep:
    """``train_step`` compiled for each shape of batch as it comes. It takes over the state that it is given."""

    def __init__(self, arch: comi.Architecture, update: optax.GradientTransformation, accumulate: int):
        self._step = functools.partial(train_step, arch=arch, update=update, accumulate=accumulate)
        self._compiled: dict[tuple[tuple[int, ...], ...], Any] = {}

    @property
    def compiled(self) -> int:
        """How many shapes of batches it has been compiled for."""
        return len(self._compiled)

    def __call__(
        self, state: TrainState, frozen: dict[str, Array], batch: comi.Batch, key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        return self._for(state, frozen, batch, key)(state, frozen, batch, key)

    def prepare(self, state: TrainState, frozen: dict[str, Array], batch: comi.Batch, key: Array) -> Any:
        """Compile for batches of this shape; returns XLA's analysis of the memory, None where there is none."""
        return self._for(state, frozen, batch, key).memory_analysis()

    def _for(self, state: TrainState, frozen: dict[str, Array], batch: comi.Batch, key: Array) -> Any:
        shapes = tuple(x.shape for x in jax.tree.leaves(batch))
        if shapes not in self._compiled:
            self._compiled[shapes] = self.lower(state, frozen, batch, key).compile()
            return_freed_memory()
        return self._compiled[shapes]

    def lower(self, state: Any, frozen: Any, batch: Any, key: Any) -> jax.stages.Lowered:
        """The step before its compilation, of arrays or of their abstract shapes with places."""
        places = (jax.tree.map(lambda x: x.sharding, state), None)
        return jax.jit(self._step, donate_argnums=0, out_shardings=places).lower(state, frozen, batch, key)


def return_freed_memory() -> None:
    """Give the operating system back what the compiler has freed: on CPU most of a gigabyte, which would stay with the
    process under glibc while the step asks for more."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
