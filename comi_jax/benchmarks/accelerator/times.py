"""What is timed: kernels, attention, compress, train step, prefill, decode, questions about a document."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from comi_jax.benchmarks.accelerator.kit import RATE, RUNS, Kit, Row, compiled, seconds, size_of
from comi_jax.config import Mesh, Optimizer, max_groups
from comi_jax.devices import sharding
from comi_jax.kernels import bench, dispatch
from comi_jax.model import architecture, comi, comi_memory, costs, encoder, flops, generate
from comi_jax.model.architecture import Architecture
from comi_jax.model.attention import attention, choose
from comi_jax.params import flatten, initialize
from comi_jax.training import estimate, optim
from comi_jax.training import state as training_state
from comi_jax.training.step import CompiledStep


def rates(kit: Kit) -> list[Row]:
    """The device's own rates, which every floor is made of."""
    size, side = 2.0 * kit.shapes.copied * jnp.dtype(kit.shapes.dtype).itemsize, float(kit.shapes.multiplied)
    copy, product = size / kit.copy_rate, 2 * side**3 / kit.matmul_rate
    sheet = (None, None) if kit.chip is None else (size / kit.chip.bandwidth, 2 * side**3 / kit.chip.flops)
    return [
        Row("copy", seconds=copy, floor=copy, floor_of="bytes", plan=sheet[0], note=f"{kit.copy_rate / 1e9:,.1f} GB/s"),
        Row(
            "matmul", seconds=product, floor=product, floor_of="FLOP", plan=sheet[1],
            note=f"{kit.matmul_rate / 1e12:,.2f} TFLOP/s, {kit.shapes.dtype}",
        ),
    ]  # fmt: skip


def kernels(kit: Kit, tokens: int) -> list[Row]:
    """Both compression kernels on ``tokens``, forward and with gradients, by the device's implementation and XLA's."""
    width, dtype = kit.shapes.backbone.hidden_size, jnp.dtype(kit.shapes.dtype)
    rng = np.random.default_rng(kit.seed)
    ids = bench.groups(tokens, RATE, rng)
    x = jax.random.normal(kit.key, (1, tokens, width), dtype)
    numbers = jnp.asarray(rng.uniform(0.5, 1.5, (1, tokens)) / width**0.5, jnp.float32)
    arguments = (x, numbers, jnp.asarray(ids)[None])
    rows = []
    for kernel in ("redundancy", "merge"):
        for name in sorted({dispatch.choose("device", None, dtype), "xla"}):
            for backward in (False, True):
                program = compiled(bench.work(kernel, backward, name, int(ids[-1]) + 1), *arguments)
                took = seconds(functools.partial(program, *arguments))
                title = f"{kernel}{', forward and backward' if backward else ''}, {tokens:,} tokens"
                rows.append(kit.row(title, took, *bench.least(kernel, backward, x, ids), program, by=name))
    return rows


def attentions(kit: Kit) -> list[Row]:
    """Causal attention over the context, forward and with gradients. Gradients are twice the forward products; that the
    scores are computed again is no part of the floor."""
    backbone, tokens = kit.shapes.backbone, kit.shapes.context
    heads = (backbone.num_attention_heads, backbone.num_key_value_heads, backbone.num_key_value_heads)
    keys = jax.random.split(kit.key, 3)
    dtype = kit.shapes.dtype
    inputs = [jax.random.normal(k, (1, tokens, n, backbone.head_dim), dtype) for k, n in zip(keys, heads, strict=True)]
    own = 2.0 * tokens**2 * backbone.num_attention_heads * backbone.head_dim
    name = choose(inputs[0], inputs[1], None, True, kit.device.platform)

    def total(q, k, v):
        return jnp.sum(attention(q, k, v).astype(jnp.float32))

    rows = []
    for title, function, times in (("forward", attention, 1), ("forward and backward", jax.grad(total, (0, 1, 2)), 3)):
        program = compiled(function, *inputs)
        took = seconds(functools.partial(program, *inputs))
        size = (2 if times == 1 else 5) * size_of(inputs)
        rows.append(kit.row(f"attention, {title}, {tokens:,} tokens", took, size, times * own, program, by=name))
    return rows


def lengths(kit: Kit) -> flops.Lengths:
    return flops.Lengths(kit.shapes.context, kit.shapes.query, kit.shapes.answer, RATE)


def compress(kit: Kit) -> list[Row]:
    """From token ids to the memory, batch 1."""
    arch, batch = kit.shapes.arch, kit.batch(kit.shapes.context)
    params = kit.params("encoder", "lsa", "mig")
    program = compiled(lambda params, batch: comi.memory_of(params, arch, batch, RATE).vectors, params, batch)
    took = seconds(functools.partial(program, params, batch))
    title = f"compress {kit.shapes.context:,} tokens, {kit.shapes.encoder_layers} encoder layers"
    return [kit.row(title, took, _blocks(params), flops.compress(arch, lengths(kit)), program)]


def _blocks(params: Any) -> int:
    """Bytes of the weights of all blocks in ``params``: of the embedding table only some rows are read."""
    return sum(x.nbytes for path, x in flatten(params).items() if not path.endswith("embed"))


def answering(kit: Kit, rows: int) -> list[Row]:
    """The decoder from memory, ``rows`` answers at once: prefill over [memory; query], then tokens one by one."""
    arch, new = kit.shapes.arch, kit.shapes.new_tokens
    backbone, params = arch.backbone, kit.params("decoder")
    before = max_groups(kit.shapes.context, RATE) + kit.shapes.query
    prompt = jax.random.normal(kit.key, (rows, before, backbone.hidden_size), arch.dtype)
    length, rules, room = jnp.full((rows,), before, jnp.int32), kit.rules(rows), (RUNS + 2) * new

    def begin(params, prompt):
        return generate.begin(params, arch, prompt, length, rules, (), room, sampled=False)

    prefill, weights = compiled(begin, params, prompt), _blocks(params)
    took = seconds(functools.partial(prefill, params, prompt))
    cost = rows * (flops.read(arch, 0, before) + costs.head(backbone, 1).forward)
    made = [kit.row(f"prefill {before:,} of memory and query, batch {rows}", took, weights, cost, prefill)]

    def proceed(params, decoding, until):
        return generate.proceed(params, arch, decoding, rules, (), until, sampled=False)

    held = [prefill(params, prompt)]
    decode = compiled(proceed, params, held[0], jnp.int32(0), donate=(1,))
    chosen = 1

    def some_tokens():
        nonlocal chosen
        chosen += new
        held[0] = decode(params, held[0], jnp.int32(chosen))
        return held[0].ids

    took = seconds(some_tokens, at_once=1) / new
    seen = before + (RUNS + 1) * new // 2  # half of the runs come before
    cache = 2 * backbone.num_hidden_layers * backbone.num_key_value_heads * backbone.head_dim * held[0].cache.k.itemsize
    size = weights + rows * seen * cache
    cost = rows * (flops.read(arch, seen, 1) + costs.head(backbone, 1).forward)
    title = f"decode a token after {before:,}, batch {rows}"
    made.append(kit.row(title, took, size, cost, decode, per=new, open_trips=new, note=f"{rows / took:,.1f} tokens/s"))
    return made


def next_question(kit: Kit) -> list[Row]:
    """A further question about a document whose states, keys and values are kept: to its first token."""
    arch, batch, params = kit.shapes.arch, kit.batch(kit.shapes.context), kit.params("encoder", "lsa", "mig", "decoder")
    document = compiled(
        lambda params, ids, length: encoder.encode({"encoder": params}, arch, ids, length),
        params["encoder"], batch.context, batch.context_length,
    )(params["encoder"], batch.context, batch.context_length)  # fmt: skip
    rules = kit.rules(1)

    def ask(params, document, query, length, rate):
        memory = comi_memory.remember(params, arch, document, query, length, rate, RATE)
        asked = dataclasses.replace(batch, query=query, query_length=length)
        made = comi.prompt(params, arch, memory, asked)
        return generate.begin(params, arch, made.rows, made.length, rules, (), 1, sampled=False).ids

    arguments = (params, document, batch.query, batch.query_length, batch.rate)
    program = compiled(ask, *arguments)
    took = seconds(functools.partial(program, *arguments))
    before, query = max_groups(kit.shapes.context, RATE), kit.shapes.query
    parts = flops.by_part(arch, lengths(kit))
    own = parts["compression"].forward + parts["lsa"].forward + flops.read(arch, 0, before + query)
    states = kit.shapes.context * arch.backbone.hidden_size * jnp.dtype(arch.dtype).itemsize
    # The keys and values once, and the states for relevance, redundancy and merging.
    size = _blocks(params) + size_of(document) + 2 * states
    title = f"next question about a kept document of {kit.shapes.context:,} tokens"
    return [kit.row(title, took, size, own, program, note=f"{size_of(document) / 1e9:,.2f} GB kept")]


# --- the train step ---------------------------------------------------------------------------------------------------


def train_step(kit: Kit) -> list[Row]:
    """One update from one context, with the deepest decoder whose step fits by estimate, then with fewer layers as long
    as the device refuses."""
    kit.forget_params()
    available, layers = estimate.available_bytes(kit.device), kit.shapes.backbone.num_hidden_layers
    refused = []
    while True:
        arch, shapes = _training(kit, layers)
        if _needed(arch, shapes) <= available:
            try:
                return [_timed_step(kit, arch, shapes, refused)]
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                refused.append(f"{layers} decoder layers do not fit")
        if layers <= kit.shapes.encoder_layers:
            least = _needed(arch, shapes) / 1e9
            raise MemoryError(f"{layers} decoder layers need {least:.1f} GB of {available / 1e9:.1f}")
        layers = max(layers - max(layers // 4, 1), kit.shapes.encoder_layers)


def _training(kit: Kit, layers: int) -> tuple[Architecture, tuple[Any, ...]]:
    """The model with ``layers`` decoder layers on this device, and what ``estimate.held`` takes besides. The remat
    policy is the least recomputation that fits, else "full"."""
    mesh = sharding.make_mesh(Mesh(), [kit.device])
    backbone = dataclasses.replace(kit.shapes.backbone, num_hidden_layers=layers)
    arch = dataclasses.replace(kit.shapes.arch, backbone=backbone).on(mesh)
    state, frozen = training_state.abstract(arch, optim.optimizer(Optimizer(), 1000), mesh)
    shapes = (state, frozen, lengths(kit), 1, 1, mesh)
    available = estimate.available_bytes(kit.device)
    for remat in estimate.REMATS:
        arch = dataclasses.replace(arch, runtime=dataclasses.replace(arch.runtime, remat=remat))
        if _needed(arch, shapes) <= available:
            break
    return arch, shapes


def _needed(arch: Architecture, shapes: tuple[Any, ...]) -> int:
    return estimate.held(arch, *shapes).total


def _timed_step(kit: Kit, arch: Architecture, shapes: tuple[Any, ...], refused: list[str]) -> Row:
    like, like_frozen, *_, mesh = shapes
    update = optim.optimizer(Optimizer(), 1000)
    specs = flatten(architecture.specs(arch))

    def draw(path: str, like: Any) -> jax.Array:
        made = jax.jit(lambda key: initialize({"x": specs[path]}, key, like.dtype)["x"], out_shardings=like.sharding)
        return made(kit.key)

    params = {path: draw(path, x) for path, x in {**like.trained, **like_frozen}.items()}
    state, frozen = training_state.create(params, arch, update, mesh)
    del params
    batch = sharding.put_batch(jax.tree.map(np.asarray, kit.batch(kit.shapes.context)), mesh)
    step, number = CompiledStep(arch, update), np.int32(0)
    gradients = step.lower_gradients(None, state, frozen, batch, kit.key, number).compile()
    apply, held = step.lower_update(state).compile(), [state]
    del state

    def one() -> Any:
        total = gradients(None, held[0], frozen, batch, kit.key, number)
        held[0], metrics = apply(held[0], total)
        return metrics

    took = seconds(one, at_once=1)
    # Weights are read forward and backward; the update reads and writes weights and moments.
    size = 2 * size_of([held[0].trained, frozen]) + 2 * size_of(held[0].trained) + 2 * size_of(held[0].optimizer)
    title = f"train step, {kit.shapes.context:,} tokens, {arch.compression.encoder_layers} encoder layers"
    own = flops.train_step(arch, lengths(kit))
    used = own / took / kit.chip.flops if kit.chip else own / took / kit.matmul_rate
    note = f"{arch.backbone.num_hidden_layers} decoder layers, remat {arch.runtime.remat}, {used:.0%} of the "
    note += "chip's FLOP/s" if kit.chip else "matmul rate"
    return kit.row(title, took, size, own, gradients, note="; ".join([note, *refused]))
