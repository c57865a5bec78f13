"""Weights in and out: what comes in goes out byte for byte, PyTorch computes the same from it, the rest is refused."""

import dataclasses
import functools
import importlib.util
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import train_fixtures
from safetensors.numpy import load_file, save_file

from comi_jax import Comi, convert
from comi_jax.config import Compression, Generation, Lora
from comi_jax.devices import sharding
from comi_jax.errors import ConfigError
from comi_jax.model import architecture, comi, generate
from comi_jax.model.architecture import SCALARS
from comi_jax.model.batch import Batch
from comi_jax.params import flatten, unflatten
from comi_jax.runs import description, stored_weights
from comi_jax.weights import files, hf, hf_config, inspection, official
from comi_jax.weights.starting_model import StartingModel

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[1]
KINDS = list(tiny_models.BACKBONES)
ALPHA = 4.0


def language_model(folder, kind, dtype="float32", shard="1GB"):
    """A Hugging Face folder of a random tiny model, with a tokenizer."""
    tiny_models.transformers_model(kind).to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    train_fixtures.tokenizer().save_pretrained(folder)
    return folder


def tensors_of(folder):
    """All tensors of a folder, over its shards."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert ours[name].tobytes() == tensor.tobytes(), name


def command(*words):
    convert.main([str(word) for word in words])


def refusal(*words):
    """What the command says as it refuses; nothing else may come out of it."""
    with pytest.raises(SystemExit) as stopped:
        command(*words)
    assert str(stopped.value).startswith("error: ")
    return str(stopped.value)


def import_hf(folder, output, *more):
    layers = ("--encoder-layers=2", "--lsa-layers=1", "--rates=2,4", "--segment-size=16")
    command("import-hf", f"--backbone={folder}", f"--output={output}", *layers, *more)
    return output


# --- Hugging Face -> ours -> Hugging Face -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, shard", [("float32", "20KB"), ("float16", "1GB"), ("bfloat16", "20KB")])
def test_a_language_model_comes_back_byte_for_byte(kind, dtype, shard, tmp_path):
    theirs = language_model(tmp_path / "lm", kind, dtype, shard)
    assert len(list(theirs.glob("*.safetensors"))) == 1 or shard == "20KB"
    ours = import_hf(theirs, tmp_path / "comi")
    command("export-hf", f"--checkpoint={ours}", f"--output={tmp_path / 'out'}", "--shard-gb=0.00003")
    out = tmp_path / "out"
    tensors = tensors_of(theirs)
    assert_same(tensors_of(out / "decoder"), tensors)
    assert len(list((out / "decoder").glob("*.safetensors"))) > 1  # in shards of 30 KB, with an index
    first = {name for name in tensors if "layers." not in name or int(name.split(".")[2]) < 2}
    encoder = {name.removeprefix("model."): tensors[name] for name in first - {"lm_head.weight"}}
    assert_same(tensors_of(out / "encoder"), encoder)
    lsa = {name: tensor for name, tensor in encoder.items() if not name.startswith("layers.1.")}
    assert_same(tensors_of(out / "lsa"), lsa)
    assert hf_config.read_config(out / "decoder") == tiny_models.BACKBONES[kind]
    assert json.loads((out / "decoder" / "config.json").read_text())["torch_dtype"] == dtype


def test_a_dtype_may_be_chosen(tmp_path):
    ours = import_hf(language_model(tmp_path / "lm", "qwen2"), tmp_path / "comi")
    command("export-hf", f"--checkpoint={ours}", f"--output={tmp_path / 'out'}", "--dtype=bfloat16")
    theirs, out = tensors_of(tmp_path / "lm"), tensors_of(tmp_path / "out" / "decoder")
    assert_same(out, {name: tensor.astype(jnp.bfloat16) for name, tensor in theirs.items()})
    said = refusal("export-hf", f"--checkpoint={ours}", f"--output={tmp_path / 'other'}", "--dtype=int8")
    assert "int8 is not one of float32, float16, bfloat16" in said and not (tmp_path / "other").exists()


def test_what_is_ignored_of_a_config_stands_in_the_checkpoints(tmp_path):
    lm = language_model(tmp_path / "lm", "qwen2")
    change_config(lm, dual_chunk_attention_config={"chunk_size": 8}, attention_dropout=0.1)
    said = refusal("import-hf", f"--backbone={lm}", f"--output={tmp_path / 'comi'}", "--encoder-layers=2")
    assert "--ignore-config=attention_dropout,dual_chunk_attention_config" in said and not (tmp_path / "comi").exists()
    assert "asks for something that is not implemented: attention_dropout=0.1" in "".join(inspection.inspect(lm).notes)
    names = ("attention_dropout", "dual_chunk_attention_config")
    ours = import_hf(lm, tmp_path / "comi", *(f"--ignore-config={name}" for name in names))
    assert json.loads((ours / "config.json").read_text())["config"]["model"]["ignore_config"] == list(names)
    assert description.read_run(ours).config.model.ignore_config == names


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    lm = language_model(tmp_path / "lm", "qwen2")
    tokenizer = train_fixtures.tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(tiny_models.BACKBONES["qwen2"].vocab_size)])
    tokenizer.save_pretrained(lm)
    said = refusal("import-hf", f"--backbone={lm}", f"--output={tmp_path / 'comi'}", "--encoder-layers=1")
    assert "tokens, the model only" in said and not (tmp_path / "comi").exists()


# --- official -> ours -> official -------------------------------------------------------------------------------------


def official_file(folder, kind, rank, dtype="float32", targets="qkvo"):
    """A random official state dict, all of whose unused tensors hold something of their own, and its architecture."""
    arch = tiny_models.architecture(kind, lora=rank)
    if rank:
        arch = dataclasses.replace(arch, lora=dataclasses.replace(arch.lora, targets=tuple(targets)))
    params = tiny_models.shaken(architecture.specs(arch))
    tensors = {name: tensor.astype(dtype) for name, tensor in official.tensors(params, arch).items()}
    rng = np.random.default_rng(1)
    tensors |= {
        name: rng.standard_normal(shape).astype(dtype)
        for name, shape in official.unused(arch).items()
        if not (arch.backbone.tie_word_embeddings and name.startswith("decoder."))  # it repeats embeddings
    }
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "official.safetensors")
    return folder / "official.safetensors", tensors, arch


def import_official(file, folder, output, *more):
    words = (f"--checkpoint={file}", f"--backbone={folder}", f"--output={output}", f"--lora-alpha={ALPHA}")
    command("import-official", *words, "--rates=2,4", "--segment-size=16", *more)
    return output


def in_shards(file):
    """The folder of ``file``, which is cut into three with an index."""
    tensors = load_file(file)
    shards = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for shard in set(shards.values()):
        save_file({name: tensors[name] for name in tensors if shards[name] == shard}, file.parent / shard)
    (file.parent / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    file.unlink()
    return file.parent


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "kind, rank, targets, sharded",
    [("llama2", 0, "", True), ("llama3", 2, "qkvo", False), ("qwen2", 2, "qv", True), ("qwen3", 3, "qkvo", False)],
)
def test_an_official_checkpoint_comes_back_byte_for_byte(kind, rank, targets, sharded, dtype, tmp_path):
    file, tensors, arch = official_file(tmp_path / "theirs", kind, rank, dtype, targets)
    lm = language_model(tmp_path / "lm", kind)
    file = in_shards(file) if sharded else file
    ours = import_official(file, lm, tmp_path / "comi")
    found = description.read_run(ours)
    assert found.architecture.lora.targets == (arch.lora.targets if rank else Lora().targets)
    assert found.config.compression.segment_size == 16 and found.config.compression.rates == (2, 4)
    command("export-official", f"--checkpoint={ours}", f"--output={tmp_path / 'back.safetensors'}")
    back = load_file(tmp_path / "back.safetensors")
    assert set(back) - set(tensors) <= {"decoder.lm_head.weight", "decoder.base_model.model.lm_head.weight"}
    assert_same({name: back[name] for name in tensors}, tensors)


@pytest.mark.parametrize("kind", ["llama2", "llama3"])
def test_the_release_would_load_what_was_never_official(kind, tmp_path):
    """Its strict loading wants every tensor of its modules: those that we have no use for, too."""
    ours = import_hf(language_model(tmp_path / "lm", kind), tmp_path / "comi")
    command("export-official", f"--checkpoint={ours}", f"--output={tmp_path / 'out.safetensors'}")
    out = load_file(tmp_path / "out.safetensors")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "lm")
    modules = {"encoder.": 2, "memory_fusion_layer.": 1, "decoder.": 3}
    want = {f"semantic_alignment_layer.{name}" for name in ("weight", "bias")} | set(official.SCALARS.values())
    for prefix, layers in modules.items():
        config.num_hidden_layers = layers
        module = transformers.AutoModelForCausalLM.from_config(config)
        own = {name.removeprefix(prefix): torch.from_numpy(x) for name, x in out.items() if name.startswith(prefix)}
        module.load_state_dict(own, strict=True)
        want |= {prefix + name for name in module.state_dict()}
    assert set(out) == want


def test_merged_adapters_compute_what_they_did_apart(tmp_path):
    file, _, arch = official_file(tmp_path / "theirs", "qwen2", 2)
    lm = language_model(tmp_path / "lm", "qwen2")
    ours = import_official(file, lm, tmp_path / "comi")
    out = tmp_path / "merged.safetensors"
    command("export-official", f"--checkpoint={ours}", f"--output={out}", "--merge-lora")
    assert not [name for name in load_file(out) if "lora" in name or "base_layer" in name]
    merged = import_official(out, lm, tmp_path / "again")
    ids = np.random.default_rng(0).integers(3, 60, 21)
    apart, together = (Comi.load(folder) for folder in (ours, merged))
    apart, together = (first_logits(model, ids) for model in (apart, together))
    np.testing.assert_allclose(together, apart, rtol=0, atol=1e-5 * np.abs(apart).max())


def batch_of(context, query):
    """One example without answer."""
    return Batch(
        context=jnp.asarray(context, jnp.int32)[None],
        context_length=jnp.asarray([len(context)], jnp.int32),
        query=jnp.asarray(query, jnp.int32)[None],
        query_length=jnp.asarray([len(query)], jnp.int32),
        answer=jnp.zeros((1, 1), jnp.int32),
        answer_length=jnp.ones((1,), jnp.int32),
        rate=jnp.asarray([2], jnp.int32),
    )


@functools.partial(jax.jit, static_argnames="arch")
def remember_and_score(params, batch, arch):
    memory = comi.memory_of(params, arch, batch, 2)
    return memory, comi.answer_logits(params, arch, memory, batch)


def first_logits(model, ids):
    return np.asarray(remember_and_score(model.params, batch_of(ids[:16], ids[16:]), model.architecture)[1])


# --- the same in PyTorch ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def replay():
    spec = importlib.util.spec_from_file_location("replay_pytorch", ROOT / "launch" / "replay_pytorch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_pytorch_replays_the_whole_pipeline(kind, replay, tmp_path):
    file, _, arch = official_file(tmp_path / "theirs", kind, 2 * kind.startswith("qwen"))
    ours = import_official(file, language_model(tmp_path / "lm", kind), tmp_path / "comi")
    command("export-hf", f"--checkpoint={ours}", f"--output={tmp_path / 'out'}")
    theirs, model = replay.load(tmp_path / "out"), Comi.load(ours)
    rng = np.random.default_rng(2)
    context, query = rng.integers(3, 60, 37), rng.integers(3, 60, 5)  # segments of 16, 16 and 5 tokens
    memory, logits = remember_and_score(model.params, batch_of(context, query), model.architecture)
    with torch.no_grad():
        want = replay.remember(theirs, torch.from_numpy(context), torch.from_numpy(query), 2)
        prompt = torch.cat([want, theirs.decoder.get_input_embeddings()(torch.from_numpy(query))])[None]
        want_logits = theirs.decoder(inputs_embeds=prompt).logits[:, -1:].numpy()
        ids = theirs.decoder.generate(inputs_embeds=prompt, max_new_tokens=12, do_sample=False)[0].tolist()
    want = want.numpy()
    found = np.asarray(memory.vectors[0, : int(memory.length[0])])
    assert found.shape == want.shape
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-4 * np.abs(want).max())
    np.testing.assert_allclose(logits, want_logits, rtol=0, atol=1e-4 * np.abs(want_logits).max())
    prompt = comi.prompt(model.params, model.architecture, memory, batch_of(context, query))
    options = Generation(max_new_tokens=12)
    out = generate.greedy(model.params, model.architecture, prompt.rows, prompt.length, options, model.run.stop)
    assert out.ids[0, : int(out.length[0])].tolist() == ids


def test_pytorch_answers_a_batch_as_one_at_a_time(replay, tmp_path):
    """Contexts and questions of unlike lengths: rows are padded on the left."""
    lm = train_fixtures.language_model(tmp_path / "lm")
    command("import-hf", f"--backbone={lm}", f"--output={tmp_path / 'comi'}", "--encoder-layers=1", "--rates=2")
    command("export-hf", f"--checkpoint={tmp_path / 'comi'}", f"--output={tmp_path / 'out'}")
    model = replay.load(tmp_path / "out")
    rows = [(" ".join(row["input"][: i + 1]), row["prompt"]) for i, row in enumerate(train_fixtures.records(3))]
    contexts, questions = zip(*rows, strict=True)
    together, memories = replay.answer(model, contexts, questions, max_new_tokens=8)
    assert len({len(memory) for memory in memories}) == 3
    for ids, context, question in zip(together, contexts, questions, strict=True):
        (alone,), _ = replay.answer(model, [context], [question], max_new_tokens=8)
        assert ids[: len(alone)].tolist() == alone.tolist()
    found = Comi.load(tmp_path / "comi").answer(contexts[2], questions[2], max_new_tokens=8).tokens
    assert together[2].tolist()[: len(found)] == list(found)


def test_adapters_for_peft_are_those_that_the_other_export_merges(tmp_path):
    """W + (lora_alpha / r) B A, as PEFT computes it, of the unmerged decoder and its adapter: the merged decoder."""
    file, _, _ = official_file(tmp_path / "theirs", "qwen2", 2)
    ours = import_official(file, language_model(tmp_path / "lm", "qwen2"), tmp_path / "comi")
    command("export-hf", f"--checkpoint={ours}", f"--output={tmp_path / 'merged'}")
    command("export-hf", f"--checkpoint={ours}", f"--output={tmp_path / 'apart'}", "--adapter")
    merged, base = (load_file(tmp_path / name / "decoder" / "model.safetensors") for name in ("merged", "apart"))
    adapter = load_file(tmp_path / "apart" / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "apart" / "adapter" / "adapter_config.json").read_text())
    adapted = 0
    for name, weight in base.items():
        a, b = (f"base_model.model.{name.removesuffix('weight')}lora_{part}.weight" for part in "AB")
        if a in adapter:
            adapted += 1
            assert name.split(".")[-2] in config["target_modules"] and adapter[a].shape[0] == config["r"]
            weight = weight + config["lora_alpha"] / config["r"] * adapter[b] @ adapter[a]
        np.testing.assert_allclose(weight, merged[name], rtol=0, atol=1e-6)
    assert len(adapter) == 2 * adapted > 0
    plain = import_hf(language_model(tmp_path / "other", "qwen2"), tmp_path / "plain")
    with pytest.raises(SystemExit, match="has no adapters"):
        command("export-hf", f"--checkpoint={plain}", f"--output={tmp_path / 'none'}", "--adapter")
    assert not (tmp_path / "none").exists()


def test_the_replay_is_short_enough_to_be_documentation():
    assert len((ROOT / "launch" / "replay_pytorch.py").read_text().splitlines()) < 150


def test_the_scalars_go_out_as_they_are_whatever_the_dtype_of_the_weights(tmp_path):
    ours = import_hf(language_model(tmp_path / "lm", "qwen2"), tmp_path / "comi", "compression.alpha_fine=1.1")
    command("export-official", f"--checkpoint={ours}", f"--output={tmp_path / 'out.safetensors'}", "--dtype=bfloat16")
    tensors = load_file(tmp_path / "out.safetensors")
    kinds = {name: tensor.dtype for name, tensor in tensors.items() if tensor.dtype != jnp.bfloat16}
    assert len(kinds) == 4 and set(kinds.values()) == {np.dtype("float32")}
    assert [float(tensors[name]) for name in kinds if tensors[name] != 1] == [float(np.float32(1.1))]


# --- going on from what was imported ----------------------------------------------------------------------------------


def test_training_starts_from_an_imported_model(tmp_path):
    """A run's first step from an imported COMI sees its weights; other parts than its own are refused by name."""
    lm = train_fixtures.language_model(tmp_path / "lm")
    ours = tmp_path / "comi"
    command("import-hf", f"--backbone={lm}", f"--output={ours}", "--encoder-layers=1", "--rates=2", "lora.rank=2")
    run = description.read_run(ours)
    before = stored_weights.load_flat(ours, run.architecture)
    mesh = sharding.make_mesh(run.config.mesh)
    config = dataclasses.replace(run.config, model=dataclasses.replace(run.config.model, path=str(ours)))
    start = StartingModel.open(config)
    start.check()
    started = start.load(run, mesh)
    assert started.keys() == before.keys()
    for path, array in before.items():
        np.testing.assert_array_equal(started[path], array, err_msg=path)
    assert (start.backbone, start.stop) == (run.backbone, run.stop)
    other = dataclasses.replace(config, lora=Lora(), compression=Compression(rates=(2,), encoder_layers=2))
    with pytest.raises(ConfigError, match="pass compression.encoder_layers=1 lora.rank=2$"):
        StartingModel.open(other).check()
    sharper = dataclasses.replace(config, compression=dataclasses.replace(run.config.compression, alpha_fine=4.0))
    with pytest.raises(ConfigError, match="pass compression.alpha_fine=1.0$"):
        StartingModel.open(sharper).check()
    # It may train what the run that made the checkpoint kept frozen.
    learning = dataclasses.replace(run.config.compression, learn_mig=True)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, compression=learning))
    assert start.load(run, mesh).keys() == before.keys()


def test_the_card_has_what_evaluation_measured_of_these_weights(tmp_path):
    ours = import_hf(language_model(tmp_path / "lm", "qwen2"), tmp_path / "comi")
    command("export-hf", f"--checkpoint={ours}", f"--output={tmp_path / 'before'}")
    assert "No measured results" in (tmp_path / "before" / "README.md").read_text()
    score = {"mean": 0.5, "low": 0.25, "high": 0.75}
    weights = stored_weights.weights_of(ours, 0)
    row = {
        "n": 4, "of": 4, "records": "abc", "metrics": {"em": score, "f1_max": score}, "ratio": 7.9, "step": 0,
        "weights": weights, "rate": 8, "closed_book": False, "data": ["nq:/home/me/dev|1.jsonl"],
        "decoding": {"method": "greedy"},
    }  # fmt: skip
    closed = row | {"closed_book": True, "rate": None, "ratio": 0.0}

    def card(evaluation, closing=None):
        (ours / "evaluation").mkdir(exist_ok=True)
        (ours / "evaluation" / "results.json").write_text(json.dumps({"COMI": evaluation}))
        (ours / "results.json").write_text(json.dumps(closing or {}))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        command("export-hf", f"--checkpoint={ours}", f"--output={tmp_path / 'out'}")
        return (tmp_path / "out" / "README.md").read_text()

    scores = "| 0.500 [0.250, 0.750] | 0.500 [0.250, 0.750] | - | 7.9 | method greedy |"
    assert f"| COMI | 0 | nq:dev\\|1.jsonl (abc) | 4 | 8 {scores}" in card(row)
    assert f"Weights after step 0, fingerprint {weights[:16]}." in card(row)
    # What is less than that is called less.
    assert "| COMI, the first 4 of 512 only | 0 |" in card(row | {"of": 512}) and "| COMI |" not in card(
        row | {"of": 9}
    )
    assert "| closed book: the contexts withheld | 0 |" in card(closed) and "| COMI |" not in card(closed)
    # What is of other weights, or nobody knows of which, is named and left out.
    other = card(row | {"weights": "f" * 64, "step": 7})
    assert "No measured results" in other and f"other weights (step 7, fingerprint {'f' * 16})" in other
    assert "an earlier version wrote it" in card({name: value for name, value in row.items() if name != "weights"})
    # The closing table of the same weights comes first; the same measured again is not said twice.
    both = card(row, {"COMI": row, "closed book": closed})
    assert both.count("| COMI |") == 1 and "| closed book: the contexts withheld |" in both
    both = card(row | {"rate": 4}, {"COMI": row})
    assert "| COMI | 0 | nq:dev\\|1.jsonl (abc) | 4 | 8 |" in both and "| COMI, evaluated later | 0 |" in both
    assert "closing table is left out: it used other weights" in card(row, {"COMI": row | {"weights": "f" * 64}})
    said = json.loads((tmp_path / "out" / "comi.json").read_text())
    assert said["rates"] == [2, 4] and said["segment_size"] == 16 and said["switches"]["lsa"] is True
    assert said["scalars"] == dict.fromkeys(SCALARS, 1.0) and said["tokens"]["stop"] == [2]


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_says_what_a_path_is(tmp_path, capsys):
    lm = language_model(tmp_path / "lm", "qwen3", "bfloat16")
    ours = import_hf(lm, tmp_path / "comi")
    command("export-hf", f"--checkpoint={ours}", f"--output={tmp_path / 'out'}")
    file, tensors, _ = official_file(tmp_path / "theirs", "qwen3", 2)
    kinds = {
        lm: "Hugging Face causal language model",
        ours: "COMI checkpoint of config 'import-hf', imported",
        tmp_path / "out": "COMI exported for Hugging Face",
        tmp_path / "out" / "lsa": "Hugging Face model without a head",
        file: "official COMI state dict",
        lm / "model.safetensors": "weights without a config.json (model.safetensors)",
    }
    found = {path: inspection.inspect(path) for path in kinds}
    assert {path: one.kind for path, one in found.items()} == kinds
    sizes = {path: sum(part.parameters for part in one.parts) for path, one in found.items()}
    assert sizes[lm] == sum(tensor.size for tensor in tensors_of(lm).values())
    assert sizes[file] == sum(tensor.size for tensor in tensors.values())
    assert sizes[ours] == sum(np.size(x) for x in Comi.load(ours).params["mig"].values()) + sum(
        leaf.size for part in ("encoder", "lsa", "decoder") for leaf in jax.tree.leaves(Comi.load(ours).params[part])
    )
    assert {part.name for part in found[ours].parts} == {"encoder", "lsa", "decoder", "mig"}
    assert {part.dtypes for part in found[lm].parts} == {("bfloat16",)}
    assert not any(one.missing for path, one in found.items() if path != lm / "model.safetensors")
    assert "3 layers, width 32, 4 heads over 2 key/value heads of 12" in found[ours].architecture
    assert "LoRA of rank 2" in found[file].architecture
    command("inspect", ours)
    assert "nothing is missing" in capsys.readouterr().out


def test_inspect_lists_what_is_missing(tmp_path, capsys):
    lm = language_model(tmp_path / "lm", "llama2")
    tensors = load_file(lm / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, lm / "model.safetensors")
    command("inspect", lm)
    assert "missing:\n  model.norm.weight (32,)" in capsys.readouterr().out
    assert "does not exist" in refusal("inspect", tmp_path / "nowhere")
    file, tensors, _ = official_file(tmp_path / "theirs", "qwen2", 2)
    gone = [
        "beta_merge", "encoder.model.norm.weight", "encoder.model.layers.1.mlp.up_proj.weight",
        "decoder.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
    ]  # fmt: skip
    save_file({name: tensor for name, tensor in tensors.items() if name not in gone}, file)
    assert sorted(inspection.inspect(file).missing) == sorted(gone)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A language model in shards, and an official file of it."""
    folder = tmp_path_factory.mktemp("whole")
    language_model(folder / "lm", "qwen2", shard="20KB")
    return folder / "lm", official_file(folder / "theirs", "qwen2", 0)[0]


def header(path):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def truncate(lm, official_path):
    official_path.write_bytes(official_path.read_bytes()[:-64])


def lie(lm, official_path):
    """The header says that a tensor is larger than it is."""
    said, body = header(official_path)
    said["encoder.model.norm.weight"]["shape"] = [64]
    text = json.dumps(said).encode()
    official_path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def endless(lm, official_path):
    official_path.write_bytes((2**60).to_bytes(8, "little") + official_path.read_bytes()[8:])


def drop_shard(lm, official_path):
    sorted(lm.glob("model-*.safetensors"))[1].unlink()


def name_no_file(lm, official_path):
    point_index(lm, "model-99999-of-00002.safetensors")


def leave_folder(lm, official_path):
    point_index(lm, "../model.safetensors")


def point_index(lm, name):
    path = lm / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))


def other_architecture(lm, official_path):
    change_config(lm, model_type="mistral", architectures=["MistralForCausalLM"])


def other_width(lm, official_path):
    change_config(lm, hidden_size=64)


def change_config(lm, **values):
    path = lm / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def not_finite(lm, official_path):
    tensors = load_file(official_path)
    tensors["encoder.model.norm.weight"][3] = np.nan
    tensors["decoder.model.layers.2.mlp.up_proj.weight"][5, 7] = np.inf
    save_file(tensors, official_path)


def several_dtypes(lm, official_path):
    tensors = load_file(official_path)
    name = "decoder.model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float16)
    save_file(tensors, official_path)


@pytest.mark.parametrize(
    "broken, said",
    [
        (truncate, "cannot be read as safetensors"),
        (lie, "cannot be read as safetensors"),
        (endless, "cannot be read as safetensors"),
        (drop_shard, "names files that are not there: model-00002-of-"),
        (name_no_file, "names files that are not there: model-99999-of-00002.safetensors"),
        (leave_folder, "names files outside its own folder"),
        (other_architecture, "model_type is 'mistral'; implemented are llama, qwen2, qwen3"),
        (other_width, "has shape (61, 32), expected (61, 64)"),
        (not_finite, "decoder.model.layers.2.mlp.up_proj.weight"),
        (several_dtypes, "different dtypes in different layers"),
    ],
)
def test_broken_weights_are_refused_in_a_sentence(whole, broken, said, tmp_path):
    lm, file = (shutil.copytree(whole[0], tmp_path / "lm"), shutil.copy(whole[1], tmp_path))
    broken(lm, Path(file))
    words = ("import-official", f"--checkpoint={file}", f"--backbone={lm}", f"--output={tmp_path / 'out'}")
    if broken in (drop_shard, name_no_file, leave_folder):
        words = ("import-hf", f"--backbone={lm}", f"--output={tmp_path / 'out'}", "--encoder-layers=2")
        assert said in refusal("inspect", lm)
    elif broken not in (other_width, not_finite, several_dtypes):
        assert said in refusal("inspect", lm if broken is other_architecture else file)
    message = refusal(*words)
    assert said in message
    if broken is not_finite:
        assert "encoder.model.norm.weight" in message and "2 tensor(s)" in message
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_not_written_into(whole, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine")
    words = (f"--backbone={whole[0]}", f"--output={tmp_path / 'out'}", "--encoder-layers=2")
    assert "exists and is not empty" in refusal("import-hf", *words)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["note"]


def test_a_tensor_in_two_files_is_refused(whole, tmp_path):
    lm = shutil.copytree(whole[0], tmp_path / "lm")
    first, second = sorted(lm.glob("model-*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: load_file(first)[name]}, second)
    assert f"several files contain {name}" in refusal("inspect", lm)


def test_what_an_official_file_says_itself_cannot_be_told(whole, tmp_path):
    words = (f"--checkpoint={whole[1]}", f"--backbone={whole[0]}", f"--output={tmp_path / 'out'}")
    said = refusal("import-official", *words, "compression.alpha_fine=4", "lora.rank=3", "compression.fine=false")
    assert "compression.alpha_fine=4, lora.rank=3 cannot be set, as the checkpoint determines it" in said


# --- PyTorch's own files ----------------------------------------------------------------------------------------------


class Harmful:
    """Unpickled by a careless reader, it runs code."""

    def __reduce__(self):
        return (Path.touch, (Path("harmed"),))


def test_bin_files_are_read_as_plain_tensors(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = {
        name.replace("encoder.", "icae.", 1) if name.startswith("encoder.") else name: torch.from_numpy(x).bfloat16()
        for name, x in load_file(whole[1]).items()
    }
    names = sorted(tensors)
    parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    (tmp_path / "bin").mkdir()
    for file, own in parts.items():
        torch.save({name: tensors[name] for name in own}, tmp_path / "bin" / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (tmp_path / "bin" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    ours = import_official(tmp_path / "bin", whole[0], tmp_path / "comi")
    command("export-official", f"--checkpoint={ours}", f"--output={tmp_path / 'back.safetensors'}")
    back = load_file(tmp_path / "back.safetensors")
    want = {name.replace("icae.", "encoder.", 1): x.view(torch.int16).numpy() for name, x in tensors.items()}
    assert_same({name: x.view(np.int16) for name, x in back.items()}, want)


@pytest.mark.parametrize("held", [{"a": Harmful()}, [1, 2], {"a": {"b": torch.zeros(2)}}, {"a": 3}])
def test_a_bin_file_that_is_more_than_tensors_is_refused(whole, held, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(held, tmp_path / "w.bin")
    said = refusal("inspect", tmp_path / "w.bin")
    assert "cannot be read as a PyTorch file of plain tensors" in said or "flat dictionary of tensors" in said
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("text", [b"", b"\x80\x04]\x94.", b"PK\x03\x04 no archive"])
def test_a_bin_file_that_is_none_is_refused(text, tmp_path):
    (tmp_path / "w.bin").write_bytes(text)
    assert "cannot be read as a PyTorch file of plain tensors" in refusal("inspect", tmp_path / "w.bin")


# --- streaming --------------------------------------------------------------------------------------------------------


def test_every_process_reads_only_what_its_devices_keep(tmp_path, monkeypatch):
    """On 4 devices each block of a sharded tensor is read once, and nothing is read whole."""
    backbone = tiny_models.BACKBONES["qwen2"]
    language_model(tmp_path, "qwen2")
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = hf.lm_specs(backbone, 3, embed=True, head=True)
    rules = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}
    placed = {
        path: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*(rules.get(axis) for axis in spec.axes)))
        for path, spec in flatten(specs).items()
    }
    read, original = {}, files.Tensors.read

    def counted(self, name, index=()):
        block = original(self, name, index)
        read.setdefault(name, []).append(block.size)
        return block

    monkeypatch.setattr(files.Tensors, "read", counted)
    arrays = hf.load_parts(tmp_path, backbone, {"lm": specs}, lambda path: (None, placed[path.partition("/")[2]]))
    whole = flatten(hf.load_backbone(tmp_path, backbone))
    for path, array in arrays.items():
        own = path.partition("/")[2]
        assert array.sharding.is_equivalent_to(placed[own], array.ndim)
        np.testing.assert_array_equal(array, whole[own])
    name = "model.layers.1.self_attn.o_proj.weight"
    assert read[name] == [32 * 32 // 4] * 4 + [32 * 32]  # the last by load_backbone
    assert unflatten(arrays)["lm"]["layers"]["q"].addressable_shards[0].data.shape == (3, 16, 2, 8)
