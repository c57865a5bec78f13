"""The paper's figure 1: how much of the question's attention few context tokens get, and how alike these tokens are.

    mass_x = 1/(L N Q) sum over layers, heads and question tokens q of softmax_x(q . k_x / sqrt(H)),  / its sum over x

The attention is that of a causal language model on its full prompt [context; question], without compression.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from comi_jax.backbone import Backbone
from comi_jax.data.encode import LengthError
from comi_jax.evaluation.diagnostics import NOT_COMPARABLE, RESAMPLES, DiagnosisError, Subject, Table
from comi_jax.evaluation.diagnostics_tables import mean_cosine
from comi_jax.evaluation.metrics import summarize
from comi_jax.model import backbone as lm
from comi_jax.model.architecture import Architecture
from comi_jax.model.batch import Batch
from comi_jax.model.encoder import encode_pairs, join_rows, segments
from comi_jax.model.rope import rotation
from comi_jax.params import Tree
from comi_jax.serving import batching
from comi_jax.serving.compressor import Comi
from comi_jax.serving.explanation import check_system

QUESTION_TOKENS = 8  # whose attention probabilities are held at a time
SINKS = 4  # first tokens of the context that models attend to whatever they say (StreamingLLM)
PAPER_TENTHS = range(1, 21)  # of a percent: .1 to 2.0
MORE_TENTHS = (50, 100, 200, 500)  # short contexts have too few tokens for the paper's percentages
PAPER_1A = {1: 65.5, 5: 97.7, 6: 99.2, 10: 100.0}  # percent of the attention, read from the figure
HIGHEST = 18  # tokens of figure 1b


@functools.partial(jax.jit, static_argnames=("backbone", "dtype", "runtime"))
def attention_mass(
    params: Tree, batch: Batch, backbone: Backbone, dtype: str, runtime: lm.Runtime = lm.Runtime()
) -> Float[Array, "B X"]:
    """The attention probability that each context token gets from the tokens of its question, averaged over these,
    layers and heads; 0 for padding. ``params`` are those of the whole language model; each row has its own context."""
    rows, _ = join_rows(batch.context, batch.context_length, batch.query, batch.query_length)
    x = lm.embed_tokens(params, rows, dtype, runtime)
    rope = rotation(backbone, jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None, :], rows.shape))
    offset = jnp.arange(batch.query.shape[1], dtype=jnp.int32)[None, :]
    asking, real = batch.context_length[:, None] + offset, offset < batch.query_length[:, None]

    def body(carry, layer):
        x, total = carry
        index, weights = layer
        q, k, _ = lm.attention_inputs({name: w.astype(x.dtype) for name, w in weights.items()}, x, rope, backbone)
        q = jnp.take_along_axis(q, asking[:, :, None, None], axis=1)
        total = total + _mass(q, k, asking, real)
        x, _ = lm.block(weights, x, rope, backbone, index=index, cache=None, start=None, lora=None, runtime=runtime)
        return (x, total), None

    layers = params["layers"]["q"].shape[0]
    zero = jnp.zeros(rows.shape, jnp.float32)
    (_, total), _ = jax.lax.scan(body, (x, zero), (jnp.arange(layers), params["layers"]))
    total = total[:, : batch.context.shape[1]] / layers
    inside = jnp.arange(total.shape[1])[None, :] < batch.context_length[:, None]
    return jnp.where(inside, total, 0.0)


def _mass(
    q: Float[Array, "B Q N H"], k: Float[Array, "B T K H"], asking: Int[Array, "B Q"], real: Bool[Array, "B Q"]
) -> Float[Array, "B T"]:
    """The mean over heads and ``real`` queries, at positions ``asking``, of the probabilities of each key; those of
    QUESTION_TOKENS queries are held at a time."""
    batch, count, heads, width = q.shape
    q = q.reshape(batch, count, k.shape[2], -1, width)
    share = real.astype(jnp.float32)
    share = share / (heads * jnp.maximum(jnp.sum(share, axis=1, keepdims=True), 1.0))
    key = jnp.arange(k.shape[1], dtype=jnp.int32)[None, None, :]

    def of(total, few):
        q, asking, share = few
        scores = jnp.einsum("bqkgh,btkh->bkgqt", q, k, preferred_element_type=jnp.float32) * width**-0.5
        seen = (key <= asking[:, :, None])[:, None, None]
        probabilities = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        return total + jnp.einsum("bkgqt,bq->bt", probabilities, share), None

    def blocks(x):
        x = jnp.pad(x, ((0, 0), (0, -count % QUESTION_TOKENS), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(batch, -1, QUESTION_TOKENS, *x.shape[2:]).swapaxes(0, 1)

    return jax.lax.scan(of, jnp.zeros((batch, k.shape[1]), jnp.float32), tuple(map(blocks, (q, asking, share))))[0]


def masses(model: Comi, language_model: Tree, subjects: Sequence[Subject]) -> Iterator[tuple[int, np.ndarray]]:
    """For each subject, its place in ``subjects`` and the attention mass of its context tokens. Raises LengthError for
    a prompt that is longer than the model's positions."""
    limit = model.run.backbone.max_position_embeddings
    for subject in subjects:
        context, query = len(subject.example.context), len(subject.example.query)
        if context + query > limit:
            raise LengthError(
                f"record {subject.number + 1}: figure 1 reads the whole prompt, and a context of {context} and a query "
                f"of {query} tokens are more than the {limit} positions of the model; pass "
                f"--set data.on_long=truncate --set data.max_context={max(limit - query, 1)}"
            )
    examples = [subject.example for subject in subjects]
    arch = model.architecture
    for rows, batch in batching.batches(model.run, examples, 1, model.batch_size, model.mesh):
        mass = batching.fetch(attention_mass(language_model, batch, arch.backbone, arch.dtype, arch.runtime))
        for row, number in enumerate(rows):
            yield number, mass[row, : len(examples[number].context)]


def shares(mass: Float[np.ndarray, " X"], sinks: bool) -> Float[np.ndarray, " X"]:
    """``mass`` as shares of its sum; without ``sinks``, the first SINKS tokens get none."""
    mass = mass.astype(np.float64)
    if not sinks:
        mass = np.where(np.arange(len(mass)) < SINKS, 0.0, mass)
    return mass / max(mass.sum(), 1e-300)


def summary_1a(found: Sequence[Float[np.ndarray, " _"]], sinks: bool) -> Table:
    """Figure 1a as a table: the attention mass of the top p percent of the context tokens."""
    used = [shares(mass, sinks) for mass in found if sinks or len(mass) > SINKS]
    if not used:
        raise DiagnosisError(f"--no-sinks leaves no token: every context has at most {SINKS}; leave out --no-sinks")
    rows = []
    for tenths in (*PAPER_TENTHS, *MORE_TENTHS):
        counts = [max(1, len(share) * tenths // 1000) for share in used]
        mass = [100 * float(np.sort(share)[-count:].sum()) for share, count in zip(used, counts, strict=True)]
        rows.append(
            {
                "top tokens, %": tenths / 10,
                "tokens, mean": float(np.mean(counts)),
                "mass, %": summarize([{"mass": value} for value in mass], resamples=RESAMPLES)["mass"],
                "min": min(mass),
                "max": max(mass),
                "paper, %": PAPER_1A.get(tenths),
            }
        )
    first = 100 * float(np.mean([shares(mass, True)[:SINKS].sum() for mass in found]))
    inside = f"the first {SINKS} context tokens, attention sinks, hold {first:.1f} % of the mass"
    notes = [
        f"{len(used)} examples"
        + (f", {len(found) - len(used)} left out, of at most {SINKS} tokens" if len(used) < len(found) else ""),
        f"{inside} and are inside; see --no-sinks" if sinks else f"{inside} and are left out",
        "p percent of the context tokens, rounded down, and at least one token",
        f"paper: read from its figure; layer, head and model are not named there; {NOT_COMPARABLE}",
    ]
    more = {"sinks": sinks, "mass_of_first_tokens": first / 100}
    return Table("1a", "Figure 1a: attention mass of the top context tokens, base decoder", rows, notes, more)


@functools.partial(jax.jit, static_argnames=("arch",))
def states_of(params: Any, batch: Batch, tokens: Int[Array, "B K"], arch: Architecture) -> Float[Array, "B K D"]:
    """The last encoder states of context tokens, by position in the context."""
    rows = []
    for part in segments(batch.context, batch.context_length, arch.compression.segment_size):
        encoded, _ = encode_pairs(params, arch, *part, batch.query, batch.query_length)
        width = part[0].shape[2]
        states = encoded.states[:, :width]
        rows.append(states.reshape(batch.context.shape[0], -1, states.shape[2]))
    return jnp.take_along_axis(jnp.concatenate(rows, axis=1), tokens[:, :, None], axis=1).astype(jnp.float32)


def summary_1b(
    model: Comi, params: Any, subjects: Sequence[Subject], found: Sequence[np.ndarray], sinks: bool, example: int
) -> Table:
    """Figure 1b: the cosines among the last encoder states of the HIGHEST tokens of each context, and among as many
    tokens drawn at random; the matrix of the subject ``example`` is stored."""
    check_system(model)
    chosen = []
    for subject, mass in zip(subjects, found, strict=True):
        count = min(HIGHEST, len(mass))
        highest = np.sort(np.argsort(-shares(mass, sinks), kind="stable")[:count])
        random = np.random.default_rng([0, subject.number]).permutation(len(mass))[:count]
        chosen.append((highest, np.sort(random)))
    examples, cosines, matrix, left_out = [s.example for s in subjects], [], np.zeros((0, 0)), 0
    for rows, batch in batching.batches(model.run, examples, 1, model.batch_size, model.mesh):
        wanted = np.zeros((batch.context.shape[0], 2 * HIGHEST), np.int32)
        for row, number in enumerate(rows):
            for half, tokens in enumerate(chosen[number]):
                wanted[row, half * HIGHEST : half * HIGHEST + len(tokens)] = tokens
        states = batching.fetch(states_of(params, batch, jnp.asarray(wanted), model.architecture))
        for row, number in enumerate(rows):
            count = len(chosen[number][0])
            if count < 2:
                left_out += 1
                continue
            top, random = states[row, :count], states[row, HIGHEST : HIGHEST + count]
            square = _cosines(top)
            cosines.append({"mean": mean_cosine(top), "min": float(square.min()), "random": mean_cosine(random)})
            matrix = square if number == example else matrix
    if not cosines:
        raise DiagnosisError("--table=1b needs contexts of at least two tokens; give other records")
    over = summarize(cosines, resamples=RESAMPLES)
    rows = [
        {"tokens": f"the {HIGHEST} with the most attention", "mean cosine": over["mean"], "lowest cosine": over["min"],
         "paper": "0.6 to 1"},
        {"tokens": "as many at random", "mean cosine": over["random"], "lowest cosine": None, "paper": None},
    ]  # fmt: skip
    notes = [
        f"{len(cosines)} examples" + (f", {left_out} of a single token left out" if left_out else ""),
        f"paper: the colours of its 18 x 18 figure, of one example; {NOT_COMPARABLE}",
    ]
    words = [subjects[example].text(range(t, t + 1)).strip() for t in chosen[example][0].tolist()]
    more = {"record": subjects[example].number, "tokens": words, "cosines": matrix.round(4).tolist()}
    return Table("1b", "Figure 1b: cosines among the last encoder states of the top tokens", rows, notes, more)


def _cosines(vectors: np.ndarray) -> np.ndarray:
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit @ unit.T
