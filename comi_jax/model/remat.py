"""What of a block is kept for the backward pass, and what is computed again."""

from collections.abc import Callable
from typing import Any

import jax

# What of a block is kept for the backward pass beside its input; the rest is computed again.
REMAT = {
    "off": None,  # everything
    "projections": ("attention", "projections"),  # all but the feed-forward layer
    "attention": ("attention",),  # what costs most to compute again; nothing of size T x T is kept with it
    "full": (),
    "offload": ("attention", "input"),  # kept in the host's memory
}


def remat_policy(name: str) -> Callable[..., Any]:
    """Which intermediate results of a block are kept, for jax.checkpoint, by a name of REMAT.

    cuDNN's results carry no name and are known by their primitive; they stay on the device under "offload" too.
    """
    names = list(REMAT[name] or ())
    policies = jax.checkpoint_policies
    if name == "offload":
        named = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=names,
            offload_src="device", offload_dst="pinned_host",
        )  # fmt: skip
    else:
        named = policies.save_only_these_names(*names)

    def keep(primitive, *arguments, **parameters):
        if "attention" in names and primitive.name == "dot_product_attention_fwd_wrapper":
            return True
        return named(primitive, *arguments, **parameters)

    return keep
