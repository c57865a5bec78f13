"""Activation Beacon: windows read in turn equal one dense masked pass; its memory is keys and values everywhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_detokenizer
import tiny_models
from jax.sharding import NamedSharding, PartitionSpec

from comi_jax.config import Beacon, Compression, Config, Generation, Lora, Mesh, memory_length
from comi_jax.data.encode import Example, LengthError, check_positions
from comi_jax.devices import sharding
from comi_jax.errors import ConfigError
from comi_jax.model import backbone as lm
from comi_jax.model import comi, flops, lora, sampling
from comi_jax.model.architecture import Architecture, is_trained, own_parameters, specs
from comi_jax.model.baselines import beacon
from comi_jax.model.batch import Batch
from comi_jax.model.cache import ContextKV, empty_cache
from comi_jax.params import abstract, flatten, partition
from comi_jax.serving import batching
from comi_jax.serving.prompts import PromptEmbeddings
from comi_jax.serving.slots import SlotDecoder
from comi_jax.training.state import TrainState
from comi_jax.training.step import CompiledStep

WINDOW, MIN_RATE = 8, 2


def arch_of(kind="qwen2", rank=2, rates=(2, 4), **more):
    settings = Compression(rates=rates, encoder_layers=1)
    beacons = Beacon(window=WINDOW)
    return Architecture(
        tiny_models.BACKBONES[kind], settings, Lora(rank, 4.0, 0.5), system="beacon", beacon=beacons, **more
    )


def params_of(arch):
    return tiny_models.shaken(specs(arch))


@pytest.fixture(scope="module")
def batch():
    """Contexts of three windows and a rest, of two windows, of a rest alone, and none; two questions about each."""
    rng = np.random.default_rng(0)
    return Batch(
        context=rng.integers(0, 61, (4, 3 * WINDOW + 5), np.int32),
        context_length=np.array([3 * WINDOW + 5, 2 * WINDOW, 7, 0], np.int32),
        query=rng.integers(0, 61, (8, 5), np.int32),
        query_length=np.array([3, 5, 1, 4, 5, 2, 3, 1], np.int32),
        answer=rng.integers(0, 61, (8, 4), np.int32),
        answer_length=np.array([4, 1, 3, 2, 4, 4, 1, 2], np.int32),
        rate=np.array([2, 4, 3, 2, 4, 2, 2, 8], np.int32),
    )


def rows_of(batch):
    for i in range(batch.query.shape[0]):
        context = i // batch.share
        parts = [(batch.context, batch.context_length, context)]
        parts += [(getattr(batch, n), getattr(batch, f"{n}_length"), i) for n in ("query", "answer")]
        yield [ids[row, : length[row]] for ids, length, row in parts], int(batch.rate[i])


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of the dense pass; a beacon has no id, and the place that it has for later windows."""

    window: int
    position: int
    id: int | None = None
    compact: int | None = None


def dense_row(context, after, rate):
    """All tokens and beacons of a row, with their windows and positions, as the paper lays them out."""
    tokens, beacons = [], 0
    full = len(context) // WINDOW
    for window in range(full):
        position, kept = beacons, beacons
        ids = context[window * WINDOW : (window + 1) * WINDOW]
        for number, id in enumerate(ids, start=1):
            tokens.append(Token(window, position, int(id)))
            position += 1
            if number % rate == 0 or number == WINDOW:
                tokens.append(Token(window, position, None, kept))
                position, kept = position + 1, kept + 1
        beacons = kept
    rest = [*context[full * WINDOW :], *after]
    tokens += [Token(full, beacons + i, int(id)) for i, id in enumerate(rest)]
    return tokens, beacons


def rotated(x, positions, backbone):
    half = backbone.head_dim // 2
    angle = positions[..., None] * backbone.rope_theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


def normed(x, scale, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def dense_logits(params, arch, context, query, answer, rate):
    """The logits of the answer by one pass in NumPy, float64, over all windows at once: a token sees what is before it
    in its own window, and earlier windows' beacons at their compact positions."""
    backbone = arch.backbone
    decoder = dict(params["decoder"])
    if arch.lora.rank:
        decoder["layers"] = lora.merge(decoder["layers"], params["lora"], arch.lora)
    decoder, own = (jax.tree.map(lambda x: np.asarray(x, np.float64), tree) for tree in (decoder, params["beacons"]))
    tokens, beacons = dense_row(context, [*query, *answer], rate)
    marked = np.array([t.id is None for t in tokens])
    window = np.array([t.window for t in tokens])
    position = np.array([t.position for t in tokens])
    compact = np.array([-1 if t.compact is None else t.compact for t in tokens])
    same = window[:, None] == window[None]
    visible = same & np.tri(len(tokens), dtype=bool) | (window[None] < window[:, None]) & marked[None]
    x = np.stack([own["embed"] if t.id is None else decoder["embed"][t.id] for t in tokens])
    for layer in range(backbone.num_hidden_layers):
        w = {name: value[layer] for name, value in decoder["layers"].items()}
        n = normed(x, w["attention_norm"], backbone.rms_norm_eps)

        def project(name, w=w, n=n, layer=layer):
            out = np.einsum("td,dnh->tnh", n, w[name]) + w.get(f"{name}_bias", 0.0)
            extra = np.einsum("td,dnh->tnh", n, own["layers"][name][layer])
            extra = extra + (own["layers"][f"{name}_bias"][layer] if backbone.qkv_bias else 0.0)
            return np.where(marked[:, None, None], out + extra, out)

        q, k, v = (project(name) for name in ("q", "k", "v"))
        if backbone.qk_norm:
            q, k = (normed(y, w[f"{name}_norm"], backbone.rms_norm_eps) for name, y in (("q", q), ("k", k)))
        groups = backbone.num_attention_heads // backbone.num_key_value_heads
        k, v = (np.repeat(y, groups, axis=1) for y in (k, v))
        q = rotated(q, position[:, None], backbone)
        in_window, later = (rotated(k, at[:, None], backbone) for at in (position, compact))
        scores = np.where(same[:, None], *(np.einsum("tnh,snh->tns", q, y) for y in (in_window, later)))
        scores = np.where(visible[:, None], scores / np.sqrt(backbone.head_dim), -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out = np.einsum("tns,snh->tnh", weights / weights.sum(axis=-1, keepdims=True), v)
        x = x + np.einsum("tnh,nhd->td", out, w["o"])
        n = normed(x, w["mlp_norm"], backbone.rms_norm_eps)
        gate = n @ w["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (n @ w["up"])) @ w["down"]
    states = normed(x, decoder["norm"], backbone.rms_norm_eps)[-len(answer) - 1 : -1]
    return states @ (decoder["head"] if "head" in decoder else decoder["embed"].T), beacons


@pytest.mark.parametrize("kind", ("qwen2", "qwen3"))
def test_windows_in_turn_equal_one_dense_masked_pass(kind, batch):
    """Of every row by itself: rates of its own, which divide the window or not, contexts with and without windows."""
    arch = arch_of(kind)
    params = params_of(arch)

    @jax.jit
    def run(params, batch):
        memory = comi.memory_of(params, arch, batch, MIN_RATE)
        return memory.entries, memory.length, comi.answer_logits(params, arch, memory, batch)

    entries, raw, logits = run(params, batch)
    for i, ((context, query, answer), rate) in enumerate(rows_of(batch)):
        expected, beacons = dense_logits(params, arch, context, query, answer, rate)
        assert (entries[i], raw[i]) == (beacons + len(context) % WINDOW, len(context) % WINDOW)
        np.testing.assert_allclose(logits[i, : len(answer)], expected, rtol=1e-4, atol=1e-4)


def repeated(batch):
    """The same examples, each with a context of its own."""
    contexts = {name: np.repeat(getattr(batch, name), batch.share, axis=0) for name in ("context", "context_length")}
    return batch.replace(**contexts)


def test_padding_and_companions_change_nothing(batch):
    arch = arch_of()
    params = params_of(arch)

    @jax.jit
    def run(params, batch):
        memory = comi.memory_of(params, arch, batch, MIN_RATE)
        return memory.entries, comi.answer_logits(params, arch, memory, batch)

    def padded(name):
        ids, length = np.array(getattr(batch, name)), getattr(batch, f"{name}_length")
        return np.where(np.arange(ids.shape[1])[None, :] >= length[:, None], (ids + 17) % 61, ids)

    other = batch.replace(**{name: padded(name) for name in ("context", "query", "answer")})
    real = np.arange(4)[None, :] < batch.answer_length[:, None]
    (entries, logits), (entries_2, logits_2) = run(params, batch), run(params, other)
    np.testing.assert_array_equal(entries, entries_2)
    np.testing.assert_array_equal(np.asarray(logits)[real], np.asarray(logits_2)[real])
    contexts, order = [0, 3, 2, 1], [0, 1, 6, 7, 4, 5, 2, 3]
    strangers = {name: value[contexts if "context" in name else order] for name, value in vars(other).items()}
    np.testing.assert_allclose(run(params, batch.replace(**strangers))[1][0], logits[0], rtol=1e-5, atol=1e-5)


def test_a_fresh_model_reads_beacons_with_the_projections_of_its_tokens():
    arch = arch_of(rank=0)
    own = own_parameters(arch, seed=0)
    assert set(own) == {"beacons/embed"} | {f"beacons/layers/{name}" for name in beacon.OWN}
    assert all(np.any(np.asarray(value)) == (path == "beacons/embed") for path, value in own.items())


# --- decoding ---------------------------------------------------------------------------------------------------------


def test_batches_slots_and_training_choose_the_same_tokens(batch):
    """Greedy answers in a batch and in slots; the training logits of each answer prefer its own next token."""
    arch, new = arch_of(), 4
    params = params_of(arch)
    memory = batching.remember(params, batch, arch, MIN_RATE)
    rules = sampling.rules(Generation(), 8)
    begun = batching.begin(params, memory, batch, rules, arch, (), new, False)
    ids = batching.proceed(params, begun, rules, np.zeros(8, bool), np.int32(new), arch, (), False).ids
    asked = batch.replace(answer=np.asarray(ids), answer_length=np.full(8, new, np.int32))
    logits = jax.jit(lambda p, m, b: comi.answer_logits(p, arch, m, b))(params, memory, asked)
    np.testing.assert_array_equal(np.argmax(logits, axis=-1), ids)

    whole = batching.prompt(params, memory, batch, arch)
    rows, before = np.asarray(whole.rows), jax.tree.map(np.asarray, whole.before)
    prompts = [
        PromptEmbeddings(
            rows[i, : int(whole.length[i])], 0, int(memory.entries[i]), False,
            before=ContextKV(before.k[:, [i]], before.v[:, [i]], before.length[[i]]),
        )
        for i in range(8)
    ]  # fmt: skip
    loop = SlotDecoder(params, arch, (), test_detokenizer.byte_level(), Generation(), slots=2, length=32)
    handles = [loop.submit(prompt, Generation(max_new_tokens=new)) for prompt in prompts]
    while loop.live or loop.waiting:
        loop.step()
    np.testing.assert_array_equal([handle.tokens for handle in handles], ids)
    positions = int(memory.entries[0] + batch.query_length[0])
    with pytest.raises(LengthError, match=f"a prompt of {positions} vectors and an answer of up to 30 tokens do not"):
        loop.submit(prompts[0], Generation(max_new_tokens=30))
    with pytest.raises(ConfigError, match="this prompt follows keys and values, which a file of vectors cannot hold"):
        prompts[0].base64()


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_decoder_is_trained_as_comis_is_and_the_beacons_are():
    for rank in (0, 2):
        arch = arch_of(rank=rank)
        trained = {path for path in flatten(specs(arch)) if is_trained(path, arch, "answering")}
        other = dataclasses.replace(arch, system="comi")
        comis = {path for path in flatten(specs(other)) if is_trained(path, other, "answering")}
        assert {path for path in trained if path.startswith("beacons/")} == {f"beacons/{p}" for p in flatten(
            specs(arch)["beacons"])}  # fmt: skip
        of_decoder = {path for path in comis if path.startswith(("decoder/", "lora/"))}
        assert {path for path in trained if not path.startswith("beacons/")} == of_decoder != set()


def test_a_step_is_the_same_on_four_devices_and_with_shared_windows(batch):
    """Loss, entries and gradients: of contexts that are each read once for two questions, as a single rate allows, on
    four devices; and of a context for each question, on one."""
    arch, update = arch_of(rank=0, rates=(3,)), optax.trace(1.0)  # whose state is the gradient
    batch = batch.replace(rate=np.full(8, 3, np.int32))
    trained, frozen = partition(params_of(arch), lambda path: is_trained(path, arch))

    def step(rows, count, **sizes):
        mesh = sharding.make_mesh(Mesh(**{"data": 1} | sizes), jax.devices()[:count])
        placed = sharding.parameters(specs(arch), mesh)
        mine, rest = (
            {path: jax.device_put(np.array(x), placed[path]) for path, x in part.items()} for part in (trained, frozen)
        )
        begun = jax.device_put(jnp.int32(0), NamedSharding(mesh, PartitionSpec()))
        state = TrainState(begun, mine, update.init(mine))
        function = CompiledStep(arch.on(mesh), update)
        return function(state, rest, sharding.put_batch((rows,), mesh), jax.random.key(0))

    alone, metrics = step(repeated(batch), 1)
    spread, metrics_4 = step(batch, 4, fsdp=2, tensor=2)
    for name, value in metrics.items():
        assert float(metrics_4[name]) == pytest.approx(float(value), rel=1e-5), name
    # Three windows of three beacons and five tokens; two windows; seven tokens; nothing: for two questions each.
    assert float(metrics["memory_vectors"]) == 2 * (3 * 3 + 5 + 2 * 3 + 7)
    for path, gradient in alone.optimizer.trace.items():
        difference = np.linalg.norm(np.asarray(spread.optimizer.trace[path]) - gradient)
        assert difference <= 1e-5 * np.linalg.norm(gradient) > 0, path
    contexts = jax.eval_shape(lambda p, b: beacon.memory_of(p, arch, b, 3), params_of(arch), batch).before.length.shape
    assert contexts == (4,)


def test_dropout_of_adapters_acts_on_windows_and_differs_between_them(batch):
    """The same tokens in two windows have other keys with dropout than without, and other ones in each window."""
    arch = arch_of()
    ids = jnp.tile(jnp.arange(WINDOW, dtype=jnp.int32), 2)[None]

    @jax.jit
    def keys(params, key):
        length, rate = jnp.full((1,), 2 * WINDOW, jnp.int32), jnp.full((1,), 4, jnp.int32)
        return beacon.read_windows(params, arch, ids, length, rate, 4, key).v[0, 0]  # of the first layer

    params = params_of(arch)
    plain, dropped = keys(params, None), keys(params, jax.random.key(0))
    np.testing.assert_allclose(plain[:2], plain[2:], rtol=1e-5, atol=1e-5)  # the first layer sees no other tokens
    assert np.abs(dropped[:2] - plain[:2]).max() > 0.01 and np.abs(dropped[:2] - dropped[2:]).max() > 0.01


# --- accounts and limits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens, rate, entries",
    [(1023, 32, 1023), (1024, 32, 32), (1065, 32, 73), (1599, 32, 607), (3179, 32, 203), (8147, 32, 1203),
     (14766, 32, 878), (32000, 32, 1248), (1599, 16, 639), (2048, 5, 410)],
)  # fmt: skip
def test_entries_are_beacons_and_the_unfinished_window(tokens, rate, entries):
    """At the published window, the figures of the official window code."""
    assert memory_length("beacon", Compression(), Beacon(), tokens, rate) == entries


def test_flop_are_those_of_the_compiled_program():
    """Of a window and of the decoder behind it, in a single layer, which XLA counts whole: within 5 %, after adding
    what a dense implementation computes and masks. The states of a window are asked for too, as the last layer of a
    program that needs keys and values alone is not computed whole."""
    small = dataclasses.replace(
        tiny_models.BACKBONES["qwen2"], num_hidden_layers=1, hidden_size=128, head_dim=32, intermediate_size=256
    )
    arch = Architecture(
        small, Compression(rates=(4,), encoder_layers=1), runtime=lm.Runtime(attention="dense"), system="beacon",
        beacon=Beacon(window=64),
    )  # fmt: skip
    params, width = abstract(specs(arch)), small.num_attention_heads * small.head_dim
    rows = Batch(*(jax.ShapeDtypeStruct(s, jnp.int32) for s in ((1, 128), (1,), (1, 8), (1,), (1, 8), (1,), (1,))))

    def window(params, x):
        at = jnp.arange(4, 80, 5, dtype=jnp.int32)[None]
        marked = lora.Adapters({}, None, 0.0, marked=lora.Marked.in_layers(params["beacons"]["layers"], at, -at))
        cache = empty_cache(small, 1, 1, 16, "float32")
        before = ContextKV(cache.k, cache.v, jnp.full((1,), 16, jnp.int32))
        return lm.forward(params["decoder"], x, small, context=before, lora=marked, runtime=arch.runtime)

    def decoded(params, memory, rows):
        return comi.answer_logits(params, arch, memory, rows)

    def flop(function, *arguments):
        return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]

    memory = jax.eval_shape(lambda p, b: comi.memory_of(p, arch, b, 4), params, rows)
    one, two = (flops.by_part(arch, flops.Lengths(n, 8, 8, 4)) for n in (64, 128))
    of_window = flop(window, params, jax.ShapeDtypeStruct((1, 80, 128), jnp.float32))
    assert of_window == pytest.approx(two["encoder"].forward - one["encoder"].forward + 2.0 * 80**2 * width, rel=0.05)
    longest = flops.by_part(arch, flops.Lengths(128 + 63, 8, 8, 4))["decoder"].forward
    assert flop(decoded, params, memory, rows) == pytest.approx(longest + 2.0 * 79**2 * width, rel=0.05)


def test_windows_count_once_for_all_questions_with_a_single_rate():
    lengths = flops.Lengths(20, 5, 3, 4)
    once, each = (arch_of(rank=0, rates=rates) for rates in ((4,), (2, 4)))
    assert flops.train_step(once, lengths) == flops.train_step(each, lengths)
    assert flops.shared(once, lengths, 4).total < flops.shared(each, lengths, 4).total
    assert flops.compress(once, lengths) == flops.compress(each, lengths) > 0
    assert flops.memory_length(once, lengths) == 8 and flops.already_read(once, lengths) == 4
    assert flops.already_read(dataclasses.replace(once, system="comi"), lengths) == 0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"beacon": Beacon(window=16)}, "beacon.window is 16, below the largest rate 32"),
        ({"mesh": Mesh(context=2)}, "system=beacon cannot split the tokens of a row over devices; set mesh.context=1"),
        ({"compression": Compression(coarse=False)}, "compression.coarse=false changes COMI, not system=beacon"),
    ],
)
def test_what_it_does_not_have_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Config(system="beacon", **settings)


def test_contexts_beyond_the_positions_of_the_model_are_refused():
    """Of a window with all beacons before and in it, and of the decoder's prompt."""
    config, shape = Config(system="beacon", beacon=Beacon(window=64)), tiny_models.BACKBONES["qwen2"]  # 512 positions
    long, short = (Example(np.zeros(n, np.int32), np.zeros(8, np.int32), np.zeros(4, np.int32)) for n in (930, 895))
    check_positions([short], shape, config, 2)  # 13 windows: 416 beacons, 480 with a window; 63 tokens and 12 behind
    with pytest.raises(LengthError, match="record 1: a window of 64 tokens and 448 beacons are more than the 500"):
        check_positions([long], dataclasses.replace(shape, max_position_embeddings=500), config, 2)
    with pytest.raises(LengthError, match="record 1: 482 memory vectors, a query of 8 and an answer of 55 tokens"):
        check_positions([long], shape, config, 2, 55)
    with pytest.raises(ConfigError, match="beacon.window is 0; it must be at least 1"):
        Beacon(window=0)
