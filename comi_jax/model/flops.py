"""Model FLOP, counted from shapes, without rematerialisation and padding.

A matrix product of [a, b] and [b, c] is 2abc; causal attention over T tokens is half of 2 · 2T²NH. In the backward pass
a trained matrix costs twice its forward product (the gradients of the matrix and of its input), a frozen one once.
Norms, rotations, softmax and the embedding lookup are left out: together they are below one percent.
"""

import dataclasses

from comi_jax.config import Backbone, max_groups
from comi_jax.model.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Token counts of one example, without padding, and its compression rate."""

    context: int
    query: int
    answer: int
    rate: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOP of one example."""

    forward: float
    backward: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.forward + other.forward, self.backward + other.backward)

    @property
    def total(self) -> float:
        return self.forward + self.backward


def attention_weights(backbone: Backbone) -> int:
    """Parameters of W_Q, W_K, W_V and W_O of one block."""
    heads = 2 * backbone.num_attention_heads + 2 * backbone.num_key_value_heads
    return backbone.hidden_size * heads * backbone.head_dim


def mlp_weights(backbone: Backbone) -> int:
    """Parameters of one block's feed-forward."""
    return 3 * backbone.hidden_size * backbone.intermediate_size


def blocks(backbone: Backbone, layers: int, tokens: int, trained: tuple[bool, bool]) -> Cost:
    """``layers`` causal blocks over a row of ``tokens``. ``trained``: whether the attention matrices are, and the
    feed-forward's."""
    width = backbone.num_attention_heads * backbone.head_dim
    scores = 2.0 * layers * tokens**2 * width  # q·k and weights·v, half of each as it is causal
    cost = Cost(scores, 2 * scores)
    for weights, has_gradient in zip((attention_weights(backbone), mlp_weights(backbone)), trained, strict=True):
        product = 2.0 * layers * tokens * weights
        cost += Cost(product, product * (2 if has_gradient else 1))
    return cost


def head(backbone: Backbone, positions: int) -> Cost:
    """The vocabulary projection, which is frozen, at ``positions``."""
    product = 2.0 * positions * backbone.hidden_size * backbone.vocab_size
    return Cost(product, product)


def memory_length(arch: Architecture, lengths: Lengths) -> int:
    """The number of memory vectors of a context, not counting that groups may be empty."""
    return sum(max_groups(segment, lengths.rate) for segment in arch.compression.segments(lengths.context))


def by_part(arch: Architecture, lengths: Lengths) -> dict[str, Cost]:
    """FLOP of one training example by part of the model."""
    backbone, settings = arch.backbone, arch.compression
    parts = settings.segments(lengths.context)
    memory = memory_length(arch, lengths)
    nothing = Cost(0.0)
    encoder = (blocks(backbone, settings.encoder_layers, n + lengths.query, (True, True)) for n in parts)
    lsa = (blocks(backbone, settings.lsa_layers, max_groups(n, lengths.rate), (True, True)) for n in parts)
    similar = 2.0 * backbone.hidden_size * sum(max_groups(n, lengths.rate) ** 2 for n in parts)
    rows = memory + lengths.query + lengths.answer
    decoder = blocks(backbone, backbone.num_hidden_layers, rows, (not arch.lora.rank, False))
    return {
        "encoder": sum(encoder, nothing),
        "compression": Cost(similar * settings.coarse * settings.coarse_redundancy),
        "lsa": sum(lsa, nothing) if settings.lsa else nothing,
        "decoder": decoder + adapters(arch, rows) + head(backbone, lengths.answer),
    }


def adapters(arch: Architecture, tokens: int) -> Cost:
    """The decoder's low-rank adapters over one row."""
    if not arch.lora.rank:
        return Cost(0.0)
    backbone = arch.backbone
    queries, keys = (n * backbone.head_dim for n in (backbone.num_attention_heads, backbone.num_key_value_heads))
    width = {"q": queries, "k": keys, "v": keys, "o": queries}
    ranks = sum(backbone.hidden_size + width[name] for name in arch.lora.targets) * arch.lora.rank
    product = 2.0 * backbone.num_hidden_layers * tokens * ranks
    return Cost(product, 2 * product)


def train_step(arch: Architecture, lengths: Lengths) -> float:
    """FLOP of one example's loss and gradients, as used for model FLOP utilisation."""
    return sum(cost.total for cost in by_part(arch, lengths).values())


def shared(arch: Architecture, lengths: Lengths, share: int) -> Cost:
    """FLOP of one training example if ``share`` examples share each context, which is encoded once."""
    parts = by_part(arch, lengths)
    context = by_part(arch, dataclasses.replace(lengths, query=0, answer=0))["encoder"]
    again = 1 / share - 1
    return sum(parts.values(), Cost(context.forward * again, context.backward * again))


def compress(arch: Architecture, lengths: Lengths) -> float:
    """FLOP from context and query to the memory."""
    parts = by_part(arch, lengths)
    return sum(parts[name].forward for name in ("encoder", "compression", "lsa"))


def answer(arch: Architecture, lengths: Lengths, new_tokens: int) -> float:
    """FLOP of prefilling memory and query and generating ``new_tokens``, without the compression."""
    backbone, rows = arch.backbone, memory_length(arch, lengths) + lengths.query
    layers, heads = backbone.num_hidden_layers, backbone.num_attention_heads * backbone.head_dim
    weights = layers * (attention_weights(backbone) + mlp_weights(backbone))
    cached = sum(4.0 * layers * (rows + i) * heads for i in range(1, new_tokens))
    prefill = blocks(backbone, layers, rows, (False, False)).forward
    return prefill + 2.0 * weights * (new_tokens - 1) + cached + head(backbone, new_tokens).forward
