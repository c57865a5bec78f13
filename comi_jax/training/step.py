"""One update of the trained weights, from micro-batches of any shapes.

loss (9) = mean over the answer tokens of a batch of -log p(token | memory, query, answer tokens before it)

``add_gradients`` accumulates the sums of loss, tokens and gradients over micro-batches; ``apply_gradients`` divides
them and makes the update.

A system that is trained in two stages has programs for each: ``autoencoding`` reconstructs
the context, and each stage changes its own parameters only.

An update is skipped if the loss or a gradient is not finite: weights and optimizer state, including its step count,
stay unchanged bit for bit; only ``TrainState.step`` advances, and with it the data position and the random key.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from comi_jax.model import comi
from comi_jax.model.architecture import Architecture, Stage, is_trained
from comi_jax.model.batch import Batch
from comi_jax.params import combine
from comi_jax.training import optim
from comi_jax.training.state import TrainState


@no_type_check
@struct.dataclass
class Gradients:
    """Accumulated over micro-batches: the gradient of the summed loss, by the paths of ``TrainState.trained``, and the
    sums."""

    trained: dict[str, Array]
    sums: comi.LossSums


def add_gradients(
    total: Gradients | None,
    state: TrainState,
    frozen: dict[str, Array],
    rows: Batch,
    key: Array,
    number: Int[Array, ""],
    *,
    arch: Architecture,
    stage: Stage = "answering",
) -> Gradients:
    """The gradients of ``rows``, micro-batch ``number`` of the step, added to ``total`` (None: the first one). Those of
    parameters that ``stage`` does not train are zero."""
    dropout_key = jax.random.fold_in(jax.random.fold_in(key, state.step), number)
    loss = comi.loss if stage == "answering" else comi.reconstruction_loss

    def loss_sum(trained):
        trained = {p: x if is_trained(p, arch, stage) else jax.lax.stop_gradient(x) for p, x in trained.items()}
        sums = loss(combine(trained, frozen), arch, rows, min(arch.compression.rates), dropout_key)
        return sums.loss, sums

    (_, sums), grads = jax.value_and_grad(loss_sum, has_aux=True)(state.trained)
    new = Gradients(grads, sums)
    return new if total is None else jax.tree.map(jnp.add, total, new)


def apply_gradients(
    state: TrainState,
    total: Gradients,
    *,
    update: optax.GradientTransformation,
    changed: frozenset[str] | None = None,
    begins: int = 0,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """The update by the accumulated gradients of all micro-batches, and its metrics. ``changed``: the parameters of the
    stage (None: all); ``begins``: the step at which the second stage begins, with fresh moments, 0 for none.

    ``skipped`` is 1 if the update was skipped, else 0; ``memory_vectors`` is summed over all rows."""
    sums = total.sums
    grads = jax.tree.map(lambda g: g / sums.tokens, total.trained)
    before = optim.fresh_moments(state.optimizer, state.step == begins) if begins else state.optimizer
    # optax raises Python floats to the power of int32 counters, which strict dtype promotion refuses.
    with jax.named_scope("update"), jax.numpy_dtype_promotion("standard"):
        updates, optimizer = update.update(grads, before, state.trained)
        if changed is not None:  # weight decay would change the others
            stays = {path: path not in changed for path in state.trained}
            updates = jax.tree.map(lambda x, stay: jnp.zeros_like(x) if stay else x, updates, stays)
        trained = optax.apply_updates(state.trained, updates)
    norm = optax.tree.norm(grads)  # not finite if any gradient is not
    finite = jnp.isfinite(sums.loss) & jnp.isfinite(norm)
    new, old = (trained, optimizer), (state.trained, before)
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
    """The update as programs compiled on first use: ``add_gradients`` for each micro-batch shape, ``apply_gradients``
    for all, and both for each stage. ``first_stage``: the number of steps of autoencoding."""

    def __init__(self, arch: Architecture, update: optax.GradientTransformation, first_stage: int = 0):
        self._arch, self._apply = arch, functools.partial(apply_gradients, update=update)
        self._add = functools.partial(add_gradients, arch=arch)
        self._first_stage = first_stage
        self._compiled: dict[Any, Any] = {}

    @property
    def compiled(self) -> int:
        """The number of programs compiled so far."""
        return len(self._compiled)

    def __call__(
        self,
        state: TrainState,
        frozen: dict[str, Array],
        batch: Sequence[Batch],
        key: Array,
        stage: Stage = "answering",
    ) -> tuple[TrainState, dict[str, Array]]:
        """The state after an update from the micro-batches of ``batch``, the same as from all rows at once, and its
        metrics. The given ``state`` is donated."""
        total = self._zeros(state)() if len(batch) > 1 else None  # a single one needs no accumulator
        for number, rows in enumerate(batch):
            arguments = (total, state, frozen, rows, key, np.int32(number))
            total = self._gradients(stage, *arguments)(*arguments)
        return self._update(stage, state)(state, total)

    def prepare(
        self,
        state: TrainState,
        frozen: dict[str, Array],
        batch: Sequence[Batch],
        key: Array,
        stage: Stage = "answering",
    ) -> int:
        """Compile for micro-batches of these shapes. Returns the temporary memory per device of the largest program in
        bytes, 0 if XLA does not report it."""
        total = gradients_of(state) if len(batch) > 1 else None
        programs = [self._gradients(stage, total, state, frozen, rows, key, np.int32(0)) for rows in batch]
        analyses = [program.memory_analysis() for program in (*programs, self._update(stage, state))]
        return max(analysis.temp_size_in_bytes if analysis else 0 for analysis in analyses)

    def lower_gradients(
        self,
        total: Any,
        state: Any,
        frozen: Any,
        rows: Any,
        key: Any,
        number: Any,
        stage: Stage = "answering",
    ) -> jax.stages.Lowered:
        """``add_gradients`` of ``stage`` lowered for arrays, or for abstract arrays with shardings."""
        shardings = _shardings(gradients_of(state))
        # keep_unused: the optimizer state is not used, but occupies memory that the compiler must account for.
        add = self._add if stage == "answering" else functools.partial(self._add, stage=stage)
        function = jax.jit(add, donate_argnums=0, out_shardings=shardings, keep_unused=True)
        return function.lower(total, state, frozen, rows, key, number)

    def lower_update(self, state: Any, stage: Stage = "answering") -> jax.stages.Lowered:
        """``apply_gradients`` lowered, likewise."""
        apply, changed = self._apply, frozenset(path for path in state.trained if is_trained(path, self._arch, stage))
        if self._first_stage or len(changed) < len(state.trained):
            begins = self._first_stage if stage == "answering" else 0
            apply = functools.partial(apply, changed=changed, begins=begins)
        function = jax.jit(apply, donate_argnums=0, out_shardings=(_shardings(state), None))
        return function.lower(state, gradients_of(state))

    def _gradients(self, stage, total, state, frozen, rows, key, number):
        shapes = (stage, total is None, *(x.shape for x in jax.tree.leaves(rows)))
        return self._program(shapes, lambda: self.lower_gradients(total, state, frozen, rows, key, number, stage))

    def _update(self, stage, state):
        return self._program(("update", stage), lambda: self.lower_update(state, stage))

    def _zeros(self, state):
        def lower():
            like = gradients_of(state)
            make = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), like)
            return jax.jit(make, out_shardings=_shardings(like)).lower()

        return self._program("zeros", lower)

    def _program(self, name: Any, lower: Callable[[], jax.stages.Lowered]) -> Any:
        if name not in self._compiled:
            self._compiled[name] = lower().compile()
            return_freed_memory()
        return self._compiled[name]


def gradients_of(state: TrainState) -> Gradients:
    """The gradients and sums for ``state`` as abstract arrays with shardings."""
    trained = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for path, x in state.trained.items()}
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=state.step.sharding)
    sums = comi.LossSums(*[number] * 4)  # pyright: ignore[reportArgumentType] (shapes for arrays)
    return Gradients(trained, sums)  # pyright: ignore[reportArgumentType] (likewise)


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def return_freed_memory() -> None:
    """Return memory that the compiler has freed to the operating system: on CPU glibc would keep up to a gigabyte."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
