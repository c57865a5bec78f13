"""Weights in and out: what comes in goes out byte for byte, and a run or a model card goes on from it."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import train_fixtures
from convert_fixtures import (
    KINDS,
    assert_same,
    batch_of,
    change_config,
    command,
    import_hf,
    import_official,
    language_model,
    official_file,
    refusal,
    remember_and_score,
    tensors_of,
)
from safetensors.numpy import load_file, save_file

from comi_jax import Comi
from comi_jax.config import Compression, Lora
from comi_jax.devices import sharding
from comi_jax.errors import ConfigError
from comi_jax.model.architecture import SCALARS
from comi_jax.runs import description, stored_weights
from comi_jax.weights import hf_config, inspection, official
from comi_jax.weights.starting_model import StartingModel

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


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


def first_logits(model, ids):
    return np.asarray(remember_and_score(model.params, batch_of(ids[:16], ids[16:]), model.architecture)[1])


def test_the_scalars_go_out_as_they_are_whatever_the_dtype_of_the_weights(tmp_path):
    ours = import_hf(language_model(tmp_path / "lm", "qwen2"), tmp_path / "comi", "compression.alpha_fine=1.1")
    command("export-official", f"--checkpoint={ours}", f"--output={tmp_path / 'out.safetensors'}", "--dtype=bfloat16")
    tensors = load_file(tmp_path / "out.safetensors")
    kinds = {name: tensor.dtype for name, tensor in tensors.items() if tensor.dtype != jnp.bfloat16}
    assert len(kinds) == 4 and set(kinds.values()) == {np.dtype("float32")}
    assert [float(tensors[name]) for name in kinds if tensors[name] != 1] == [float(np.float32(1.1))]


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
    assert f"Weights after step 0, checksum {weights[:16]}." in card(row)
    # What is less than that is called less.
    assert "| COMI, the first 4 of 512 only | 0 |" in card(row | {"of": 512}) and "| COMI |" not in card(
        row | {"of": 9}
    )
    assert "| closed book: the contexts withheld | 0 |" in card(closed) and "| COMI |" not in card(closed)
    # What is of other weights, or nobody knows of which, is named and left out.
    other = card(row | {"weights": "f" * 64, "step": 7})
    assert "No measured results" in other and f"other weights (step 7, checksum {'f' * 16})" in other
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
