"""The trained systems beside COMI, each against a plain computation; and what a stage trains."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
from jax.sharding import NamedSharding, PartitionSpec

from comi_jax import config as config_module
from comi_jax.config import Compression, Config, Gmsa, Icae, Lora, Mesh, Optimizer
from comi_jax.devices import sharding
from comi_jax.errors import ConfigError
from comi_jax.model import backbone as lm
from comi_jax.model import comi, flops, lora, systems
from comi_jax.model.architecture import Architecture, is_trained, specs
from comi_jax.model.batch import Batch
from comi_jax.params import abstract, flatten, partition
from comi_jax.training import optim
from comi_jax.training.state import TrainState
from comi_jax.training.step import CompiledStep

SEGMENT, REST, MIN_RATE = 12, 7, 2
RIVALS = ("full_prompt", "gmsa", "icae")
BACKBONE = tiny_models.BACKBONES["qwen2"]
STAGES = ("autoencoding", "answering")


def arch_of(system, rank=2, **compression):
    """A tiny model; the decoder has adapters unless ``rank`` is 0."""
    settings = {"rates": (2, 4), "encoder_layers": 2, "lsa_layers": 1, "segment_size": SEGMENT} | compression
    small = Icae(memory_tokens=8, rank=3, alpha=5.0, dropout=0.5)
    return Architecture(BACKBONE, Compression(**settings), Lora(rank, 4.0, 0.5), system=system, icae=small)


def params_of(arch):
    return tiny_models.shaken(specs(arch))


@pytest.fixture(scope="module")
def batch():
    """Contexts of three segments, of two, of a short one and of none, with different questions and rates."""
    rng = np.random.default_rng(0)
    return Batch(
        context=rng.integers(0, 61, (4, 2 * SEGMENT + REST), np.int32),
        context_length=np.array([31, 15, 7, 0], np.int32),
        query=rng.integers(0, 61, (4, 5), np.int32),
        query_length=np.array([3, 5, 1, 4], np.int32),
        answer=rng.integers(0, 61, (4, 4), np.int32),
        answer_length=np.array([4, 1, 3, 2], np.int32),
        rate=np.array([2, 4, 3, 2], np.int32),
    )


def shared(batch):
    """Two questions about each context, at different rates."""
    per_example = ("query", "query_length", "answer", "answer_length", "rate")
    more = {name: np.repeat(getattr(batch, name), 2, axis=0) for name in per_example}
    more["query"][1::2], more["rate"][1::2] = (more["query"][1::2] + 5) % 61, 4
    return batch.replace(**more)


# The programs that the tests share.


@functools.partial(jax.jit, static_argnames=("arch", "min_rate"))
def memory_of(params, arch, batch, min_rate=MIN_RATE):
    return comi.memory_of(params, arch, batch, min_rate)


@functools.partial(jax.jit, static_argnames="arch")
def answer_logits(params, arch, memory, batch):
    return comi.answer_logits(params, arch, memory, batch)


@functools.partial(jax.jit, static_argnames="arch")
def reconstruction(params, arch, batch):
    return comi.reconstruction_loss(params, arch, batch, MIN_RATE)


@jax.jit
def _row(params, x):
    return lm.forward(params, x, BACKBONE)[0]


def states_of(params, embedded):
    """A language model's states of one row of vectors, without cache or companions; all rows compile once."""
    length = len(embedded)
    return _row(params, jnp.pad(jnp.asarray(embedded), ((0, 64 - length), (0, 0)))[None])[0, :length]


def merged(params, arch):
    """The decoder with its adapters multiplied into its weights."""
    layers = lora.merge(params["decoder"]["layers"], params["lora"], arch.lora)
    return {**params["decoder"], "layers": layers}


def segments_of(ids):
    return [ids[i : i + SEGMENT] for i in range(0, len(ids), SEGMENT)]


def plain_memory(params, arch, ids, rate):
    """The memory of one context, by NumPy means or one row at a time."""
    if arch.system == "full_prompt":
        return np.asarray(params["decoder"]["embed"])[ids]
    memory = []
    for segment in segments_of(ids):
        embedded = np.asarray(params["encoder"]["embed"])[segment]
        if arch.system == "gmsa":
            states = states_of(params["encoder"], embedded)
            means = np.stack([np.asarray(states)[i : i + rate].mean(axis=0) for i in range(0, len(segment), rate)])
            memory.append(states_of(params["lsa"], means))
        else:
            slots = -(-len(segment) // rate)
            encoder = dict(params["encoder"])
            encoder["layers"] = lora.merge(encoder["layers"], params["encoder_lora"], arch.icae.lora)
            row = np.concatenate([embedded, params["memory_tokens"]["embed"][:slots]])
            memory.append(states_of(encoder, row)[len(segment) :])
    return np.concatenate(memory) if memory else np.zeros((0, BACKBONE.hidden_size), np.float32)


def plain_logits(params, arch, before, target):
    """The logits that predict each of ``target`` after the vectors ``before``."""
    decoder = merged(params, arch)
    rows = np.concatenate([before, np.asarray(decoder["embed"])[target]])
    return np.asarray(lm.logits(decoder, states_of(decoder, rows)[len(before) - 1 : -1]))


def rows_of(batch):
    for i in range(batch.query.shape[0]):
        context = i // batch.share
        parts = [(batch.context, batch.context_length, context)]
        parts += [(getattr(batch, n), getattr(batch, f"{n}_length"), i) for n in ("query", "answer")]
        yield [ids[row, : length[row]] for ids, length, row in parts], int(batch.rate[i])


@pytest.mark.parametrize("system", RIVALS)
def test_memory_and_logits_are_those_of_a_plain_computation(system, batch):
    """Of every row by itself, from merged adapters; segments, groups and memory tokens cut by hand."""
    arch, batch = arch_of(system), shared(batch)
    params = params_of(arch)
    memory = memory_of(params, arch, batch)
    logits = answer_logits(params, arch, memory, batch)
    for i, ((context, query, answer), rate) in enumerate(rows_of(batch)):
        expected = plain_memory(params, arch, context, rate)
        assert memory.entries[i] == len(expected)
        if memory.before is None:  # else the logits tell
            np.testing.assert_allclose(memory.vectors[i, : len(expected)], expected, rtol=1e-4, atol=1e-4)
        parts = [expected, np.asarray(params["decoder"]["embed"])[query]]
        if system == "icae":
            parts.insert(1, np.asarray(params["tasks"]["answering"])[None])
        plain = plain_logits(params, arch, np.concatenate(parts), answer)
        np.testing.assert_allclose(logits[i, : len(answer)], plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("system", ("gmsa", "icae"))
def test_reconstruction_is_the_cross_entropy_of_the_context_and_its_end(system, batch, monkeypatch):
    """Read from memory and the task vector; of each context once, whoever asks, and in slices as at once."""
    arch, batch = arch_of(system), shared(batch)
    params, expected, tokens, right = params_of(arch), 0.0, 0, 0
    for i, ((context, _, answer), rate) in enumerate(rows_of(batch)):
        if i % 2 == 0:
            before = plain_memory(params, arch, context, rate)
            before = np.concatenate([before, np.asarray(params["tasks"]["autoencoding"])[None]])
            target = np.append(context, answer[-1])
            scores = plain_logits(params, arch, before, target)
            expected -= float(jax.nn.log_softmax(scores)[np.arange(len(target)), target].sum())
            right += int((scores.argmax(axis=1) == target).sum())
            tokens += len(target)
    at_once = reconstruction(params, arch, batch)
    monkeypatch.setattr(comi, "RECONSTRUCTED", 5)
    for sums in (at_once, jax.jit(lambda p, b: comi.reconstruction_loss(p, arch, b, MIN_RATE))(params, batch)):
        assert float(sums.loss) == pytest.approx(expected, rel=1e-5)
        assert (int(sums.tokens), int(sums.correct)) == (tokens, right)
    lengths = memory_of(params, arch, batch.replace(rate=np.repeat(batch.rate[::2], 2))).length[::2]
    assert int(sums.vectors) == 2 * int(lengths.sum())


@pytest.mark.parametrize("system", RIVALS)
def test_padding_and_companions_change_nothing(system, batch):
    arch, batch = arch_of(system), shared(batch)
    params = params_of(arch)

    def run(params, batch):
        memory = memory_of(params, arch, batch)
        losses = reconstruction(params, arch, batch).loss if system != "full_prompt" else 0.0
        return memory.entries, answer_logits(params, arch, memory, batch), losses

    def padded(name):
        ids, length = np.array(getattr(batch, name)), getattr(batch, f"{name}_length")
        beyond = np.arange(ids.shape[1])[None, :] >= length[:, None]
        return np.where(beyond, (ids + 17) % 61, ids)

    other = batch.replace(**{name: padded(name) for name in ("context", "query", "answer")})
    real = np.arange(4)[None, :] < batch.answer_length[:, None]
    (length, logits, loss), (length_2, logits_2, loss_2) = run(params, batch), run(params, other)
    np.testing.assert_array_equal(length, length_2)
    np.testing.assert_array_equal(np.asarray(logits)[real], np.asarray(logits_2)[real])
    assert float(loss) == float(loss_2)
    order = {4: [0, 3, 2, 1], 8: [0, 1, 6, 7, 4, 5, 2, 3]}  # of contexts, and of the questions about them
    strangers = other.replace(**{name: value[order[len(value)]] for name, value in vars(other).items()})
    np.testing.assert_allclose(run(params, strangers)[1][0], logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", (0, 2))
def test_a_shared_full_prompt_has_the_loss_and_gradients_of_as_many_contexts(rank, batch):
    arch, batch = arch_of("full_prompt", rank), shared(batch)
    alone = batch.replace(**{n: np.repeat(getattr(batch, n), 2, axis=0) for n in ("context", "context_length")})

    @jax.jit
    def loss_and_gradients(params, batch):
        return jax.value_and_grad(lambda p: comi.loss(p, arch, batch, MIN_RATE).loss)(params)

    params = params_of(arch)
    (loss, grads), (loss_alone, grads_alone) = (loss_and_gradients(params, rows) for rows in (batch, alone))
    assert float(loss) == pytest.approx(float(loss_alone), rel=1e-6)
    for (path, got), want in zip(flatten(grads).items(), flatten(grads_alone).values(), strict=True):
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want), path


@pytest.mark.parametrize("system", ("gmsa", "icae"))
def test_the_memory_does_not_depend_on_the_question(system, batch):
    arch, batch = arch_of(system), shared(batch)
    params = params_of(arch)
    asked = batch.replace(query=(batch.query + 7) % 61, query_length=batch.query_length % 5 + 1)
    got, want = (memory_of(params, arch, rows).vectors for rows in (asked, batch))
    np.testing.assert_array_equal(got, want)


def test_icae_has_one_memory_for_all_rates(batch):
    """The first vectors at any rate: a memory token does not see those after it."""
    arch = arch_of("icae", segment_size=40)
    rates = (np.full(4, rate, np.int32) for rate in (4, 8))
    fine, coarse = (memory_of(params_of(arch), arch, batch.replace(rate=rate), 4) for rate in rates)
    np.testing.assert_array_equal(coarse.length, [4, 2, 1, 0])
    for row, count in enumerate(coarse.length):
        np.testing.assert_array_equal(fine.vectors[row, :count], coarse.vectors[row, :count])


# --- training ---------------------------------------------------------------------------------------------------------


def step(arch, params, batch, mesh, update, stage, number=0, first_stage=5):
    placed = sharding.parameters(specs(arch), mesh)
    trained, frozen = (
        {path: jax.device_put(np.array(x), placed[path]) for path, x in part.items()}
        for part in partition(params, lambda path: is_trained(path, arch))
    )
    begun = jax.device_put(jnp.int32(number), NamedSharding(mesh, PartitionSpec()))
    state = TrainState(begun, trained, update.init(trained))
    function = CompiledStep(arch.on(mesh), update, first_stage)
    return function(state, frozen, sharding.put_batch((batch,), mesh), jax.random.key(0), stage)


def mesh_of(count, **sizes):
    return sharding.make_mesh(Mesh(**{"data": 1} | sizes), jax.devices()[:count])


def decaying():
    """An optimizer with two stages, whose learning rate stays the same."""
    settings = Optimizer(learning_rate=0.01, warmup=0.0, weight_decay=0.5, schedule="constant")
    return optim.optimizer(settings, 10, 5)


WANTED = {
    ("gmsa", "autoencoding"): ("encoder", "lsa", "tasks"),
    ("gmsa", "answering"): ("lora",),
    ("icae", "autoencoding"): ("encoder_lora", "memory_tokens", "tasks"),
    ("icae", "answering"): ("encoder_lora", "memory_tokens", "tasks", "lora"),
    ("full_prompt", "answering"): ("lora",),
}


@pytest.mark.parametrize("system, stage", list(WANTED))
def test_a_stage_changes_its_own_parameters_and_no_others(system, stage, batch):
    """By finite gradients; weight decay does not reach the others either."""
    arch = arch_of(system)
    params, update = params_of(arch), decaying()
    new, metrics = step(arch, params, batch, mesh_of(1), update, stage)
    assert np.isfinite(list(metrics.values())).all() and float(metrics["gradient_norm"]) > 0
    before = flatten(params)
    for path, after in new.trained.items():
        other_task = path.startswith("tasks/") and path != f"tasks/{stage}"
        wanted = path.split("/")[0] in WANTED[system, stage] and not other_task
        assert np.array_equal(after, before[path]) != wanted, path
    assert {p.split("/")[0] for p in flatten(specs(arch)) if is_trained(p, arch, stage)} == set(WANTED[system, stage])


@pytest.mark.parametrize("system", RIVALS)
def test_the_decoder_is_trained_as_comis_is(system):
    """The same parameters while answering, with adapters and without."""

    def tuned(system, rank):
        arch = arch_of(system, rank)
        paths = (path for path in flatten(specs(arch)) if path.startswith(("decoder/", "lora/")))
        return {path for path in paths if is_trained(path, arch, "answering")}

    for rank in (0, 2):
        assert tuned(system, rank) == tuned("comi", rank) != set()


@pytest.mark.parametrize(
    "system, stage",
    [
        ("gmsa", "autoencoding"),
        pytest.param("gmsa", "answering", marks=pytest.mark.slow),
        pytest.param("icae", "autoencoding", marks=pytest.mark.slow),
        ("icae", "answering"),
        pytest.param("full_prompt", "answering", marks=pytest.mark.slow),
    ],
)
def test_a_step_is_the_same_on_one_device_and_on_four(system, stage, batch):
    arch, update = arch_of(system, rank=0), optax.trace(1.0)  # whose state is the gradient
    params, batch = params_of(arch), shared(batch) if system == "full_prompt" else batch
    alone, metrics = step(arch, params, batch, mesh_of(1), update, stage)
    spread, metrics_4 = step(arch, params, batch, mesh_of(4, fsdp=2, tensor=2), update, stage)
    for name, value in metrics.items():
        assert float(metrics_4[name]) == pytest.approx(float(value), rel=1e-5), name
    for path, gradient in alone.optimizer.trace.items():
        difference = np.linalg.norm(np.asarray(spread.optimizer.trace[path]) - gradient)
        assert difference <= 1e-5 * np.linalg.norm(gradient), path


def test_the_second_stage_begins_with_fresh_moments(batch):
    """Its first step is that of an optimizer that has seen nothing, whatever the first stage left."""
    arch = arch_of("icae")
    params, update = params_of(arch), decaying()
    trained, frozen = partition(params, lambda path: is_trained(path, arch))
    used = update.init(trained)
    used = jax.tree.map(lambda x: x + jnp.asarray(3, x.dtype), used)
    function = CompiledStep(arch.on(mesh_of(1)), update, 5)

    def after(number, optimizer):
        mesh = mesh_of(1)
        everywhere = NamedSharding(mesh, PartitionSpec())
        state = jax.device_put(jax.tree.map(np.array, TrainState(jnp.int32(number), trained, optimizer)), everywhere)
        placed = sharding.put_batch((batch,), mesh)
        return function(state, jax.device_put(frozen, everywhere), placed, jax.random.key(0), "answering")[0].trained

    for (path, new), old in zip(after(5, used).items(), after(5, update.init(trained)).values(), strict=True):
        np.testing.assert_array_equal(new, old, err_msg=path)
    assert any(not np.array_equal(a, b) for a, b in zip(after(6, used).values(), after(5, used).values(), strict=True))


@pytest.mark.parametrize("name", ("linear", "cosine", "constant"))
def test_each_stage_has_the_whole_schedule(name):
    settings = Optimizer(learning_rate=2.0, schedule=name, warmup=0.2)
    both = optim.schedule(settings, 30, 10)
    alone = [float(optim.schedule(settings, count)(i)) for count in (10, 20) for i in range(count)]
    np.testing.assert_allclose([float(both(i)) for i in range(30)], alone)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_for_every_name_and_old_runs_are_comi():
    assert list(systems.SYSTEMS) == list(config_module.SYSTEMS)
    assert Config().system == "comi" and Config().autoencoding_steps == 0
    assert Architecture(BACKBONE, Compression(encoder_layers=1)).system == "comi"


def test_the_number_of_autoencoding_steps_is_a_share_of_all():
    def steps(**more):
        return Config(**more).autoencoding_steps  # of train.steps = 1000

    assert (steps(system="gmsa"), steps(system="icae"), steps(system="full_prompt")) == (333, 333, 0)
    assert steps(system="gmsa", gmsa=Gmsa(autoencoding=0.25)) == 250 and steps(system="icae", icae=Icae(0.0)) == 0


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"system": "gsma"},
            "no system 'gsma'; the nearest are gmsa; there are: comi, full_prompt, gmsa, icae, beacon",
        ),
        ({"system": ""}, "no system ''; there are: comi"),
        (
            {"system": "gmsa", "compression": Compression(coarse=False)},
            "compression.coarse=false changes COMI, not sys",
        ),
        (
            {"system": "icae", "compression": Compression(lsa=False)},
            "compression.lsa=false changes COMI, not system=ic",
        ),
        ({"system": "icae", "compression": Compression(learn_mig=True)}, "compression.learn_mig=true changes COMI"),
        ({"system": "gmsa", "mesh": Mesh(context=2)}, "system=gmsa cannot split the tokens of a row over devices; set"),
    ],
)
def test_what_a_system_does_not_have_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Config(**settings)


def test_settings_of_systems_are_checked():
    with pytest.raises(ConfigError, match=r"gmsa.autoencoding is 1.0; it is a fraction of all steps, in \[0, 1\)"):
        Gmsa(autoencoding=1.0)
    with pytest.raises(ConfigError, match="icae.memory_tokens is 0; it must be at least 1"):
        Icae(memory_tokens=0)
    with pytest.raises(
        ConfigError, match="exact_groups=true sizes groups by the rate alone; set compression.coarse=fal"
    ):
        Compression(exact_groups=True)


# --- FLOP -------------------------------------------------------------------------------------------------------------


def test_flop_of_systems_differ_by_what_they_compute():
    lengths = flops.Lengths(context=48, query=5, answer=3, rate=4)
    arch = {name: arch_of(name, rank=0) for name in systems.SYSTEMS}
    part = {name: flops.by_part(one, lengths) for name, one in arch.items()}
    assert part["comi"]["decoder"] == part["gmsa"]["decoder"]  # equal memories
    assert part["gmsa"]["encoder"].backward == 0 and part["full_prompt"]["encoder"].total == 0
    assert part["gmsa"]["encoder"].forward < part["comi"]["encoder"].forward  # which reads the question
    assert [flops.memory_length(arch[name], lengths) for name in RIVALS] == [48, 12, 12]
    for system in ("gmsa", "icae"):
        whole = flops.train_step(arch[system], lengths, "autoencoding")
        assert whole > flops.train_step(arch[system], lengths)
        assert flops.shared(arch[system], lengths, 4, "autoencoding").total == pytest.approx(whole / 4)
    full, alone = arch["full_prompt"], flops.Lengths(context=48, query=0, answer=0, rate=4)
    saved = flops.train_step(full, lengths) - flops.shared(full, lengths, 4).total
    assert saved == pytest.approx(3 / 4 * flops.train_step(full, alone))


@pytest.mark.parametrize("system", RIVALS)
def test_flop_are_those_of_the_compiled_program(system):
    """Of a single layer, which XLA counts whole: within 5 %, after adding attention's other half, which a dense
    implementation computes and masks."""
    small = dataclasses.replace(BACKBONE, num_hidden_layers=1, hidden_size=128, head_dim=32, intermediate_size=256)
    settings = Compression(rates=(4,), encoder_layers=1, segment_size=64)
    arch = Architecture(small, settings, runtime=lm.Runtime(attention="dense"), system=system)
    arch = dataclasses.replace(arch, icae=Icae(memory_tokens=16, rank=8))
    rows = Batch(*(jax.ShapeDtypeStruct(s, jnp.int32) for s in ((1, 64), (1,), (1, 8), (1,), (1, 8), (1,), (1,))))

    def forward(params, rows):
        return comi.answer_logits(params, arch, comi.memory_of(params, arch, rows, 4), rows)

    compiled = jax.jit(forward).lower(abstract(specs(arch)), rows).compile().cost_analysis()["flops"]
    counted = sum(cost.forward for cost in flops.by_part(arch, flops.Lengths(64, 8, 8, 4)).values())
    tokens = {"full_prompt": [80], "gmsa": [64, 16, 32], "icae": [80, 33]}[system]
    other_half = sum(2.0 * n**2 * small.num_attention_heads * small.head_dim for n in tokens)
    assert compiled == pytest.approx(counted + other_half, rel=0.05)
