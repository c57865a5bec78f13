"""AdamW with warm-up, decay and clipping, on the trained parameters.

A system that is trained in two stages has the same schedule twice: each stage warms up and decays over its own steps,
as two runs would, and the second begins with fresh moments (``fresh_moments``).
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from comi_jax.config import Optimizer

NO_DECAY = re.compile(r"(^|/)(norm|\w+_norm|\w+_bias)$|^(mig|tasks)/")


def schedule(settings: Optimizer, steps: int, first_stage: int = 0) -> optax.Schedule:
    """Learning rate by step: linear warm-up over ``settings.warmup`` of all ``steps``, then the decay by name: "linear"
    and "cosine" reach 0 at the last step. With a ``first_stage`` of so many steps, both happen in it and again in the
    rest."""
    if first_stage:
        stages = [schedule(settings, count) for count in (first_stage, steps - first_stage)]
        return optax.join_schedules(stages, [first_stage])
    warm = round(settings.warmup * steps)
    peak, rest = settings.learning_rate, max(steps - warm, 1)
    after = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "constant": optax.constant_schedule(peak),
    }[settings.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warm), after], [warm]) if warm else after


def decayed(trained: dict[str, Array]) -> dict[str, bool]:
    """The weight-decay mask of the flat ``trained`` parameters: matrices, but not norms, biases, COMI's scalars and
    task vectors."""
    return {path: not NO_DECAY.search(path) for path in trained}


def fresh_moments(state: Any, when: Bool[Array, ""]) -> Any:
    """The optimizer's ``state`` with Adam's moments and their count zero if ``when``; the schedule's count goes on."""

    def one(part: Any) -> Any:
        if not isinstance(part, optax.ScaleByAdamState):
            return part
        return jax.tree.map(lambda x: jnp.where(when, jnp.zeros_like(x), x), part)

    return jax.tree.map(one, state, is_leaf=lambda part: isinstance(part, optax.ScaleByAdamState))


def optimizer(settings: Optimizer, steps: int, first_stage: int = 0) -> optax.GradientTransformation:
    """The update rule: clipping by global norm, Adam, decoupled weight decay, scheduled learning rate."""
    clip = [optax.clip_by_global_norm(settings.clip_norm)] if settings.clip_norm else []
    adam = optax.adamw(
        schedule(settings, steps, first_stage),
        b1=settings.beta1,
        b2=settings.beta2,
        weight_decay=settings.weight_decay,
        mask=decayed,
    )
    return optax.chain(*clip, adam)
