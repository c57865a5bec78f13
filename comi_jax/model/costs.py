"""Model FLOP of the parts that models are made of, counted from shapes, without rematerialisation and padding.

A matrix product of [a, b] and [b, c] is 2abc; causal attention over T tokens is half of 2 · 2T²NH. In the backward pass
a trained matrix costs twice its forward product (the gradients of the matrix and of its input), a frozen one once.
Norms, rotations, softmax and the embedding lookup are left out: together they are below one percent.
"""

import dataclasses

from comi_jax.backbone import Backbone
from comi_jax.config import Lora
from comi_jax.model.shape import Architecture


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
    def frozen(self) -> "Cost":
        """The same without a backward pass."""
        return Cost(self.forward)

    @property
    def total(self) -> float:
        return self.forward + self.backward


NOTHING = Cost(0.0)


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


def seen(backbone: Backbone, before: int, tokens: int) -> Cost:
    """The attention of all blocks from a row of ``tokens`` to ``before`` entries that it continues."""
    scores = 4.0 * backbone.num_hidden_layers * before * tokens * backbone.num_attention_heads * backbone.head_dim
    return Cost(scores, 2 * scores)


def head(backbone: Backbone, positions: int) -> Cost:
    """The vocabulary projection, which is frozen, at ``positions``."""
    product = 2.0 * positions * backbone.hidden_size * backbone.vocab_size
    return Cost(product, product)


def adapters(backbone: Backbone, lora: Lora, tokens: int) -> Cost:
    """Low-rank adapters on all layers over one row."""
    if not lora.rank:
        return NOTHING
    queries, keys = (n * backbone.head_dim for n in (backbone.num_attention_heads, backbone.num_key_value_heads))
    width = {"q": queries, "k": keys, "v": keys, "o": queries}
    ranks = sum(backbone.hidden_size + width[name] for name in lora.targets) * lora.rank
    product = 2.0 * backbone.num_hidden_layers * tokens * ranks
    return Cost(product, 2 * product)


def decoder(arch: Architecture, tokens: int, targets: int, *, tuned: bool = True) -> Cost:
    """The decoder over a row of ``tokens`` with logits at ``targets`` of them; ``tuned``: it is being trained."""
    backbone = arch.backbone
    trained = blocks(backbone, backbone.num_hidden_layers, tokens, (tuned and not arch.lora.rank, False))
    return trained + adapters(backbone, arch.lora, tokens) + head(backbone, targets)
