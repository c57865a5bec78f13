"""A plan, with this machine's four devices in the place of chips that are not there."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import os
import subprocess
import sys

import jax
import pytest
import train_fixtures

from comi_jax import plan
from comi_jax.config import Compression, Config, Data, Mesh, Model, Optimizer, Train
from comi_jax.devices import chips, sharding, topology
from comi_jax.errors import ConfigError
from comi_jax.model import architecture, attention_blocked, flops
from comi_jax.model.architecture import Architecture
from comi_jax.overrides import load
from comi_jax.params import flatten
from comi_jax.planning import compiled, hlo_text, programs, published_models
from comi_jax.planning.programs import Program
from comi_jax.training import optim, state
from comi_jax.training.step import CompiledStep, gradients_of

CHIP = chips.Chip("test", flops=1e12, memory=1e9, bandwidth=1e11, link=1e10, network=1e9)


def four(chip=CHIP):
    """This machine's devices as a topology of ``chip``."""
    return topology.Topology("four", chip, tuple(jax.devices()), None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return train_fixtures.language_model(tmp_path_factory.mktemp("plan") / "lm")


def run(model, tmp_path, *words):
    """What a plan for four devices of a chip with 1 GB prints, and its programs."""
    command = train_fixtures.command(
        model, "none.jsonl", tmp_path / "out", "data.max_query=16", "data.max_answer=8", *words
    )
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(topology, "find", lambda name: four())
        plan.main([*command, "--topology=four", f"--json={tmp_path / 'plan.json'}"])
    return printed.getvalue(), json.loads((tmp_path / "plan.json").read_text())["programs"]


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The plan of a step of one micro-batch."""
    return run(model, tmp_path_factory.mktemp("whole"), "mesh.data=1", "mesh.fsdp=4", "optimizer.accumulate=1")


def test_the_plan_of_a_step(whole, model, tmp_path):
    """Parameters from their shardings; operations a little above the model's own; the verdict in words."""
    printed, (step,) = whole
    assert step["fits"] and "fits" in printed
    run_of = load("qwen2", train_fixtures.command(model, "none.jsonl", tmp_path)[1:])
    specs = architecture.specs(Architecture.of(programs.backbone_of(run_of), run_of))
    trained = sum(
        math.prod(s.shape)
        for p, s in flatten(specs).items()
        if architecture.is_trained(p, Architecture.of(programs.backbone_of(run_of), run_of))
    )
    assert step["memory"]["trained parameters"] == pytest.approx(trained, rel=0.1)  # 4 bytes over 4 devices
    assert step["memory"]["optimizer"] == pytest.approx(2 * step["memory"]["trained parameters"], rel=0.01)
    assert 1.0 < step["waste"] < 2.0 and step["sent"]["all-gather"] > 0
    assert step["bound"] in step["seconds"] and step["seconds"]["compute"] == step["flops"] / CHIP.flops


def test_the_plan_of_micro_batches_is_theirs_and_the_updates(whole, model, tmp_path):
    """Two of half the rows: the same work on twice the weights that are gathered, and gradients that lie between."""
    (one,) = whole[1]
    (two,) = run(model, tmp_path, "mesh.data=1", "mesh.fsdp=4", "optimizer.accumulate=2")[1]
    assert two["own_flops"] == one["own_flops"] and two["flops"] == pytest.approx(one["flops"], rel=0.01)
    assert two["sent"]["all-gather"] == pytest.approx(2 * one["sent"]["all-gather"], rel=0.05)
    assert two["memory"]["gradients"] == two["memory"]["trained parameters"] and "gradients" not in one["memory"]
    assert two["memory"]["temporaries"] < one["memory"]["temporaries"]


def test_programs_in_turn_need_what_the_largest_needs_and_do_what_all_do():
    seconds, sent = {"compute": 1.0, "memory": 2.0}, {"all-gather": 3.0}
    small = Program("step", "", True, 10, 100, {"program": 1}, 2.0, 1.0, sent, seconds, ("a",))
    other = {"sent": {"all-reduce": 5.0}, "seconds": {"compute": 4.0}, "kernels": ("b",)}
    large = dataclasses.replace(small, bytes_needed=20, **other)
    both = programs.in_turn([(3, small), (1, large)])
    assert (both.bytes_needed, both.flops, both.own_flops, both.kernels) == (20, 8.0, 4.0, ("a", "b"))
    assert both.sent == {"all-gather": 9.0, "all-reduce": 5.0} and both.seconds == {"compute": 7.0, "memory": 6.0}
    refused = dataclasses.replace(small, fits=False, refusal="Used 2G of 1G hbm", flops=0.0, seconds={})
    assert programs.in_turn([(3, refused), (1, large)]) == dataclasses.replace(refused, own_flops=4.0)


def test_what_does_not_fit_is_said(capsys):
    """A product of 12 KB, beside a chip with more and one with less."""
    x = jax.ShapeDtypeStruct((32, 32), "float32")
    for memory, words in ((1e5, "fits"), (1e4, "DOES NOT FIT")):
        where = four(dataclasses.replace(CHIP, memory=memory))
        found = programs.measure("product", "one device", jax.jit(lambda x, y: x @ y).lower(x, x), where, {}, 65536.0)
        assert found.fits == (memory == 1e5) and found.bytes_needed >= 3 * 4096 and found.waste == 1.0
        plan.show([found], where, Config(), plan.Console())
        assert f"): {words}, 0.00 GB" in capsys.readouterr().out


def test_a_program_is_compiled_once(tmp_path, monkeypatch):
    """By the text of the program and the name of the topology; a damaged answer on disk is as good as none."""
    monkeypatch.setenv("COMI_CACHE", str(tmp_path))
    compile_, compilations = compiled._compile, []
    monkeypatch.setattr(compiled, "_compile", lambda lowered: compilations.append(None) or compile_(lowered))
    x, y = (jax.ShapeDtypeStruct((size, size), "float32") for size in (8, 16))
    product, other = jax.jit(lambda x: x @ x).lower(x), jax.jit(lambda x: x @ x).lower(y)
    where = four(CHIP)
    first = compiled.compiled(product, where)
    assert compiled.compiled(product, where) == first and len(compilations) == 1 and "dot" in first.text
    assert compiled.compiled(other, where).sizes != first.sizes and len(compilations) == 2
    compiled.compiled(product, dataclasses.replace(where, name="elsewhere"))
    assert len(compilations) == 3
    for path in (tmp_path / "plans").iterdir():
        path.write_bytes(path.read_bytes()[:-20])
    assert compiled.compiled(product, where).sizes == first.sizes and len(compilations) == 4


def test_the_plan_of_serving(model, tmp_path):
    printed, (compress, answer) = run(model, tmp_path, "--serve", "--batch-size=2")
    assert compress["fits"] and answer["fits"] and compress["waste"] > 1 and not compress["sent"]
    assert all(way in printed for way in ("re-read", "prefix cache", "COMI, kept, rate 2", "COMI, kept, rate 4"))
    assert len(json.loads((tmp_path / "plan.json").read_text())["ways"]) == 2 + 2 * (2 + 3)


@pytest.mark.parametrize("system, kept", [("full_prompt", ""), ("gmsa", "GMSA, kept, rate 2")])
def test_the_plan_of_serving_another_system_counts_its_own_ways(system, kept, model, tmp_path):
    printed, (compress, answer) = run(model, tmp_path, "--serve", f"system={system}")
    assert kept in printed and "COMI" not in printed and compress["fits"] and answer["fits"]
    assert len(json.loads((tmp_path / "plan.json").read_text())["ways"]) == 2 + 2 * (2 * bool(kept) + 3)


@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "h100:12", "h100:0", "tpu"])
def test_a_name_that_means_nothing_is_refused(name):
    with pytest.raises(ConfigError, match="no topology|not a valid number of GPUs"):
        topology.find(name)


@pytest.mark.parametrize("name, extra", [("v5e:2x2", r"\[plan\]"), ("h100:8", r"\[cuda\]")])
def test_a_missing_compiler_is_one_sentence(name, extra, monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"is not installed: pip install '.{extra}"):
        topology.find(name)


def test_the_models_that_the_configs_name_are_known():
    names = [load(name).model.hub for name in ("qwen2", "llama2", "qwen3")]
    assert set(names) == set(published_models.BACKBONES)
    sizes = {
        name: sum(flops.attention_weights(b) + flops.mlp_weights(b) for _ in range(b.num_hidden_layers))
        for name, b in published_models.BACKBONES.items()
    }
    billions = {name.split("/")[1]: round(size / 1e9, 2) for name, size in sizes.items()}
    assert billions == {"Qwen2-7B-Instruct": 6.53, "Llama-2-7b-chat-hf": 6.48, "Qwen3-8B": 6.95}


# --- what the compiled step holds -------------------------------------------------------------------------------------

TOKENS, VOCABULARY = 1024, 4096


def compiled_step(mesh, batch_size):
    """The step of a small model over 1,024 tokens on four devices, two layers everywhere."""
    config = Config(
        model=Model(dtype="float32", attention="blocked", remat="attention"),
        compression=Compression(rates=(16,), encoder_layers=2, lsa_layers=2, segment_size=TOKENS),
        data=Data(max_context=TOKENS, max_query=8, max_answer=4),
        optimizer=Optimizer(accumulate=1), train=Train(batch_size=batch_size), mesh=mesh,
    )  # fmt: skip
    mesh = sharding.make_mesh(config.mesh)
    backbone = train_fixtures.backbone(vocab_size=VOCABULARY, max_position_embeddings=2048, tie_word_embeddings=False)
    arch = Architecture.of(backbone, config).on(mesh)
    update = optim.optimizer(config.optimizer, 10)
    held, frozen = state.abstract(arch, update, mesh)
    batch = programs.abstract_batch(config, batch_size, 1, sharding.rows(mesh))
    key, number = jax.eval_shape(lambda: (jax.random.key(0), jax.numpy.int32(0)))
    step, total = CompiledStep(arch, update), gradients_of(held)
    compiled = step.lower_gradients(total, held, frozen, batch, key, number).compile()
    # Neither what is added to nor the state is held twice.
    gradients = sum(math.prod(x.sharding.shard_shape(x.shape)) * 4 for x in jax.tree.leaves(total))
    assert compiled.memory_analysis().alias_size_in_bytes >= gradients
    assert step.lower_update(held).compile().memory_analysis().alias_size_in_bytes >= 2.99 * gradients
    return compiled.as_text(), arch


@pytest.fixture(scope="module")
def step_text():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_blocked, "BLOCK_ROWS", 256)  # a block of scores is as long as these short rows else
        return compiled_step(Mesh(data=1, fsdp=2, context=2), 2)


def test_no_whole_stack_of_weights_is_gathered(step_text):
    """Each layer's weights are gathered in its turn: what an all-gather gives is no stack of two layers."""
    text, arch = step_text
    stacks = {
        spec.shape
        for path, spec in flatten(architecture.specs(arch)).items()
        if "/layers/" in path and len(spec.shape) > 2
    }
    computations, _ = hlo_text.parse(text)
    gathered = [
        shape.dims
        for computation in computations.values()
        for i in computation.values()
        if i.opcode.startswith("all-gather")
        for shape in i.shapes
    ]
    assert gathered and not stacks & set(gathered)


def test_nothing_is_tokens_by_tokens_or_tokens_by_vocabulary(step_text):
    computations, _ = hlo_text.parse(step_text[0])
    largest = max(
        (math.prod(shape.dims), shape.dims) for c in computations.values() for i in c.values() for shape in i.shapes
    )
    assert largest[0] < TOKENS**2 / 2 < TOKENS * VOCABULARY, largest


def test_where_tokens_are_split_no_device_holds_the_states_of_a_whole_row(step_text):
    """But whole rows of its own heads, in attention."""
    text, arch = step_text
    row, backbone = TOKENS + 8, arch.backbone
    computations, _ = hlo_text.parse(text)
    shapes = {shape.dims for c in computations.values() for i in c.values() for shape in i.shapes}
    whole = {dims for dims in shapes if set(dims) & set(range(TOKENS, row + 8))}
    assert (1, row, backbone.num_attention_heads // 2, backbone.head_dim) in shapes
    assert not [dims for dims in whole if {backbone.hidden_size, backbone.intermediate_size} & set(dims)]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler of the extra [plan]")
def test_the_step_compiles_for_a_tpu_slice(model, tmp_path):
    """In a process of its own: the compiler stays loaded, and prints what it likes."""
    words = train_fixtures.command(model, "none.jsonl", tmp_path / "out", "data.max_query=16", "data.max_answer=8")
    command = [sys.executable, "-m", "comi_jax.plan", *words, "--topology=v5e:2x2", f"--json={tmp_path / 'plan.json'}"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0 and "train step on v5e:2x2 (data 1 x fsdp 4 x tensor 1" in done.stdout, done.stderr
    (step,) = json.loads((tmp_path / "plan.json").read_text())["programs"]
    assert step["fits"] and step["waste"] > 1 and step["sent"]
