"""AdamW with warm-up, decay and clipping, on the trained parameters."""

import re

import optax
from jaxtyping import Array

from comi_jax.config import Optimizer

NO_DECAY = re.compile(r"(^|/)(norm|\w+_norm|\w+_bias)$|^mig/")


def schedule(settings: Optimizer, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up over ``settings.warmup`` of all ``steps``, then the decay by name: "linear"
    and "cosine" reach 0 at the last step."""
    warm = round(settings.warmup * steps)
    peak, rest = settings.learning_rate, max(steps - warm, 1)
    after = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "constant": optax.constant_schedule(peak),
    }[settings.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warm), after], [warm]) if warm else after


def decayed(trained: dict[str, Array]) -> dict[str, bool]:
    """The weight-decay mask of the flat ``trained`` parameters: matrices, but not norms, biases or COMI's scalars."""
    return {path: not NO_DECAY.search(path) for path in trained}


def optimizer(settings: Optimizer, steps: int) -> optax.GradientTransformation:
    """The update rule: clipping by global norm, Adam, decoupled weight decay, scheduled learning rate."""
    clip = [optax.clip_by_global_norm(settings.clip_norm)] if settings.clip_norm else []
    adam = optax.adamw(
        schedule(settings, steps),
        b1=settings.beta1,
        b2=settings.beta2,
        weight_decay=settings.weight_decay,
        mask=decayed,
    )
    return optax.chain(*clip, adam)
