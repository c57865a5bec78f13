"""Rematerialisation policies: what a block keeps for the backward pass."""

from collections.abc import Callable
from typing import Any

import jax

# What is kept besides the block's input; the rest is recomputed.
REMAT = {
    "off": None,  # everything
    "products": ("attention", "projections", "products"),  # all matrix products; what is recomputed is elementwise
    "projections": ("attention", "projections"),  # all but the feed-forward layer
    "attention": ("attention",),  # the most expensive to recompute, and nothing of size T x T
    "full": (),
    "offload": ("attention", "input"),  # kept in host memory
}


def remat_policy(name: str) -> Callable[..., Any]:
    """The policy for jax.checkpoint by a name of REMAT; a run replaces "auto" by one of them (training.estimate).

    cuDNN's results carry no checkpoint name and are matched by their primitive; even "offload" keeps them on the
    device.
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
