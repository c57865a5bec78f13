"""Model FLOP of whole passes, from the costs of the parts (``costs``).

The systems count themselves (``systems``); what is done with a context once, whoever asks, is the part "encoder".
The full prompt has no such part, but training reads a shared context once there too.
"""

import dataclasses

from comi_jax import config
from comi_jax.model.costs import Cost, Lengths, adapters, attention_weights, blocks, head, mlp_weights, seen
from comi_jax.model.shape import Architecture, Stage
from comi_jax.model.systems import system_of


def memory_length(arch: Architecture, lengths: Lengths) -> int:
    """The entries that stand for a context, its memory vectors, not counting that groups may be empty."""
    return config.memory_length(arch.system, arch.compression, arch.beacon, lengths.context, lengths.rate)


def already_read(arch: Architecture, lengths: Lengths) -> int:
    """How many of these are keys and values that the decoder has already when it reads its prompt."""
    return config.beacons_of(arch.beacon, lengths.context, lengths.rate)[0] if arch.system == "beacon" else 0


def by_part(arch: Architecture, lengths: Lengths, stage: Stage = "answering") -> dict[str, Cost]:
    """FLOP of one training example by part of the model: "encoder", "compression", "lsa" and "decoder"."""
    return system_of(arch).costs(arch, lengths, stage)


def train_step(arch: Architecture, lengths: Lengths, stage: Stage = "answering") -> float:
    """FLOP of one example's loss and gradients, as used for model FLOP utilisation."""
    return sum(cost.total for cost in by_part(arch, lengths, stage).values())


def shared(arch: Architecture, lengths: Lengths, share: int, stage: Stage = "answering") -> Cost:
    """FLOP of one training example if ``share`` examples share each context, which is encoded and, while autoencoding,
    reconstructed once."""
    parts = by_part(arch, lengths, stage)
    if stage == "autoencoding":
        whole = sum(parts.values(), Cost(0.0))
        return Cost(whole.forward / share, whole.backward / share)
    context, again = of_context(arch, lengths), 1 / share - 1
    return sum(parts.values(), Cost(context.forward * again, context.backward * again))


def of_context(arch: Architecture, lengths: Lengths) -> Cost:
    """FLOP that training spends once on a context that several examples share."""
    parts = by_part(arch, dataclasses.replace(lengths, query=0, answer=0))
    return parts["decoder" if arch.system == "full_prompt" else "encoder"]


def compress(arch: Architecture, lengths: Lengths) -> float:
    """FLOP from context and query to the memory."""
    parts = by_part(arch, lengths)
    return sum(parts[name].forward for name in ("encoder", "compression", "lsa"))


def read(arch: Architecture, before: int, tokens: int) -> float:
    """FLOP of the decoder's blocks over ``tokens`` that follow ``before`` cached ones."""
    backbone = arch.backbone
    own = blocks(backbone, backbone.num_hidden_layers, tokens, (False, False)) + adapters(backbone, arch.lora, tokens)
    return (seen(backbone, before, tokens) + own).forward


def answer(arch: Architecture, lengths: Lengths, new_tokens: int) -> float:
    """FLOP of prefilling memory and query and generating ``new_tokens``, without the compression."""
    backbone, rows = arch.backbone, memory_length(arch, lengths) + lengths.query
    layers, heads = backbone.num_hidden_layers, backbone.num_attention_heads * backbone.head_dim
    weights = layers * (attention_weights(backbone) + mlp_weights(backbone))
    cached = sum(4.0 * layers * (rows + i) * heads for i in range(1, new_tokens))
    before = already_read(arch, lengths)
    prefill = (blocks(backbone, layers, rows - before, (False, False)) + seen(backbone, before, rows - before)).forward
    return prefill + 2.0 * weights * (new_tokens - 1) + cached + head(backbone, new_tokens).forward
