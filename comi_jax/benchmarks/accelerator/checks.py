"""Correctness on the device, before anything is timed: kernels and attention against their references, bfloat16 against
float32.

Inputs are drawn anew each time. What the functions promise to ignore holds NaN, and so does the memory that their
results are likely to be written to: a value that was not computed shows. In bfloat16 the limit is relative to the
rounding error of the plain implementation itself.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from comi_jax.benchmarks.accelerator.kit import Kit, Row
from comi_jax.kernels import bench, dispatch
from comi_jax.kernels.merge import merge, merge_reference
from comi_jax.kernels.redundancy import max_cosine, max_cosine_reference
from comi_jax.model import backbone as lm
from comi_jax.model.attention import attention, choose
from comi_jax.params import initialize

EXACT = 1e-5  # relative: sums of the same float32 products in another order
TIMES = 1.5  # the rounding error of the plain implementation


def difference(got: Any, want: Any) -> float:
    """The largest ‖got - want‖ / ‖want‖ of two trees' arrays; infinite if one is not finite."""
    worst = 0.0
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        error = float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))
        worst = max(worst, error) if np.isfinite(error) else float("inf")
    return worst


def poisoned(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function`` of ``arguments``, run right after memory of its results' sizes was filled with NaN and freed."""
    program = jax.jit(function).lower(*arguments).compile()
    shapes = jax.tree.leaves(jax.eval_shape(function, *arguments))
    filled = [jnp.full(x.shape, jnp.nan, x.dtype) for x in shapes if jnp.issubdtype(x.dtype, jnp.floating)]
    filled += [jnp.full(x.shape, -7, x.dtype) for x in shapes if not jnp.issubdtype(x.dtype, jnp.floating)]
    jax.block_until_ready(filled)
    del filled
    return jax.block_until_ready(program(*arguments))


def check(name: str, by: str, error: float, limit: float, note: str = "") -> Row:
    failed = not error <= limit
    return Row(name, by, error=error, limit=limit, failed=failed, note=note or ("WRONG" if failed else ""))


def kernels(kit: Kit) -> list[Row]:
    """Values and gradients of both kernels, by each implementation that this device has."""
    rows = []
    for dtype in (jnp.float32, jnp.bfloat16):
        x, inverse, gain, group, slots = _states(kit, dtype)
        clean = jnp.where((group >= 0)[:, :, None], x, 0)  # the references may multiply by 0 what is of no group
        for kernel, numbers, count in (("redundancy", inverse, ()), ("merge", gain, (slots,))):
            reference = functools.partial(_kernel, REFERENCES[kernel], group, count, kit.key)
            want = jax.jit(reference)(clean, numbers)
            for name in sorted({"xla", dispatch.choose("check", None, x.dtype)}):
                ours = functools.partial(KERNELS[kernel], implementation=name)
                got = poisoned(functools.partial(_kernel, ours, group, count, kit.key), x, numbers)
                # Gradients of bfloat16 states are rounded to bfloat16 once.
                limits = (EXACT, EXACT if dtype == jnp.float32 else 2.0**-8)
                for title, mine, theirs, limit in zip(("", ", gradients"), got, want, limits, strict=True):
                    title = f"{kernel}{title}, {jnp.dtype(dtype)}"
                    rows.append(check(title, name, difference(mine, theirs), limit))
    return rows


REFERENCES: dict[str, Callable[..., Any]] = {"redundancy": max_cosine_reference, "merge": merge_reference}
KERNELS: dict[str, Callable[..., Any]] = {"redundancy": max_cosine, "merge": merge}


def _kernel(function, group, count, key, x, numbers):
    """The result of ``function`` and the gradients by a random cotangent, 0 for tokens of no group."""

    def pulled(x, numbers):
        out = function(x, numbers, group, *count)[0]
        return jnp.sum(out * jax.random.normal(key, out.shape, out.dtype)), out

    (to_x, to_numbers), out = jax.grad(pulled, (0, 1), has_aux=True)(x, numbers)
    real = group >= 0
    return out, (jnp.where(real[:, :, None], to_x, 0), jnp.where(real, to_numbers, 0))


def _states(kit: Kit, dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, int]:
    """States with NaN at the tokens of no group, inverse norms, gains, groups, and their number."""
    rng, tokens, width = np.random.default_rng(kit.seed), kit.shapes.check_tokens, kit.shapes.backbone.hidden_size
    ids = np.stack([bench.groups(tokens, 32, rng) for _ in range(2)])
    ids[1, -tokens // 5 :] = -1
    x = rng.standard_normal((2, tokens, width), np.float32)
    x = jnp.asarray(x + rng.standard_normal((2, 1, width), np.float32), dtype)  # alike, as hidden states are
    inverse = 1 / jnp.linalg.norm(x.astype(jnp.float32), axis=2)
    gain = jnp.asarray(rng.standard_normal((2, tokens)), jnp.float32)
    group = jnp.asarray(ids)
    return jnp.where((group >= 0)[:, :, None], x, jnp.nan), inverse, gain, group, int(ids.max()) + 1


def attentions(kit: Kit) -> list[Row]:
    """The device's attention, forward and backward, with and without lengths, against the dense one in float32."""
    backbone, tokens = kit.shapes.backbone, kit.shapes.check_tokens
    heads = (backbone.num_attention_heads, backbone.num_key_value_heads, backbone.num_key_value_heads)
    *keys, last = jax.random.split(kit.key, 4)
    wide = [jax.random.normal(k, (2, tokens, n, backbone.head_dim)) for k, n in zip(keys, heads, strict=True)]
    pull = jax.random.normal(last, wide[0].shape)
    rows = []
    for lengths in (None, jnp.array([tokens, tokens // 3], jnp.int32)):
        of = functools.partial(_attended, pull=pull, lengths=lengths)
        dense = jax.jit(functools.partial(of, name="dense"))
        for dtype in (jnp.float32, jnp.bfloat16):
            inputs = [x.astype(dtype) for x in wide]
            want = dense(*(x.astype(jnp.float32) for x in inputs))
            limit = EXACT if dtype == jnp.float32 else TIMES * difference(dense(*inputs), want)
            for name in sorted({choose(inputs[0], inputs[1], None, True, kit.device.platform), "blocked"} - {"dense"}):
                error = difference(poisoned(functools.partial(of, name=name), *inputs), want)
                title = f"attention, {jnp.dtype(dtype)}{'' if lengths is None else ', lengths'}"
                rows.append(check(title, name, error, limit))
    return rows


def _attended(q, k, v, *, name, pull, lengths):
    """Causal attention and its gradients."""

    def run(q, k, v):
        out = attention(q, k, v, lengths=lengths, implementation=name).astype(jnp.float32)
        if lengths is None:
            return out
        real = jnp.arange(out.shape[1])[None, :] < lengths[:, None]  # padded queries are no results
        return jnp.where(real[:, :, None, None], out, 0)

    def pulled(q, k, v):
        return jnp.sum(run(q, k, v) * pull)

    return run(q, k, v), jax.grad(pulled, (0, 1, 2))(q, k, v)


def bfloat16(kit: Kit) -> list[Row]:
    """Two blocks and the vocabulary's logits in bfloat16, by the device's attention, against float32."""
    backbone, tokens = kit.shapes.backbone, kit.shapes.check_tokens
    specs = lm.specs(backbone, 2, embed=backbone.tie_word_embeddings, head=True)
    params = jax.jit(lambda key: initialize(specs, key, jnp.bfloat16))(kit.key)
    x = jax.random.normal(kit.key, (1, tokens, backbone.hidden_size)).astype(jnp.bfloat16)

    def run(params, x, name):
        states, _ = lm.forward(params, x, backbone, runtime=lm.Runtime(attention=name))
        return lm.logits(params, states[:, -64:])

    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (params, x))
    with jax.default_matmul_precision("highest"):
        want = jax.jit(functools.partial(run, name="dense"))(*exact)
    plain = difference(jax.jit(functools.partial(run, name="dense"))(params, x), want)
    got = poisoned(functools.partial(run, name=None), params, x)
    return [check("two blocks and logits, bfloat16 against float32", "", difference(got, want), TIMES * plain)]
