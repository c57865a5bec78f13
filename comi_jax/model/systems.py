"""The table of trained systems: COMI, and those that it is compared with. A new one is a module and a row.

What they share is elsewhere: the decoder, the losses and the prompt in ``comi``, adapters of the decoder in ``lora``.
"""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array

from comi_jax.model import comi_memory
from comi_jax.model.baselines import beacon, full_prompt, gmsa, icae
from comi_jax.model.batch import Batch
from comi_jax.model.costs import Cost, Lengths
from comi_jax.model.memory import Memory
from comi_jax.model.shape import Architecture, Stage
from comi_jax.params import Tree


@runtime_checkable
class System(Protocol):
    """The functions of a system's module."""

    def specs(self, arch: Architecture) -> dict[str, Any]:
        """The spec tree of its parameters, without the decoder's adapters. "encoder" and "lsa", if any, start from the
        first blocks of the language model, "decoder" from all of it, other parts from their own initialisers."""
        ...

    def is_trained(self, path: str, arch: Architecture, stage: Stage) -> bool:
        """Whether the parameter at ``path`` ("encoder/layers/q") is trained in ``stage``."""
        ...

    def memory_of(
        self, params: Tree, arch: Architecture, batch: Batch, min_rate: int, dropout_key: Array | None = None
    ) -> Memory:
        """What stands for the contexts in the decoder, for every example: vectors that it reads, keys and values that
        it continues, or both. ``min_rate`` is the static lower bound of the rates."""
        ...

    def costs(self, arch: Architecture, lengths: Lengths, stage: Stage) -> dict[str, Cost]:
        """FLOP of one training example; "encoder" is what is done once for all questions about a context, the other
        keys are "compression", "lsa" and "decoder"."""
        ...


SYSTEMS: dict[str, System] = {
    "comi": comi_memory,
    "full_prompt": full_prompt,
    "gmsa": gmsa,
    "icae": icae,
    "beacon": beacon,
}


def system_of(arch: Architecture) -> System:
    """The functions of the system that ``arch`` describes."""
    return SYSTEMS[arch.system]
