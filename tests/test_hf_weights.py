"""Weights of Hugging Face folders: byte for byte in and out, the numbers of transformers; broken ones are refused."""

import functools
import json
import shutil

import hf_fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from hf_fixtures import KINDS, config_of
from safetensors.numpy import load_file, save_file

from comi_jax.model import architecture
from comi_jax.model import backbone as lm
from comi_jax.params import flatten, unflatten
from comi_jax.weights import files, hf, hf_config
from comi_jax.weights.layout import WeightsError

folders = hf_fixtures.folders


@functools.partial(jax.jit, static_argnums=2)
def logits(params, ids, backbone):
    states, _ = lm.forward(params, lm.embed_tokens(params, ids, jnp.float32), backbone)
    return lm.logits(params, states)


def specs_of(backbone):
    return lm.specs(backbone, backbone.num_hidden_layers, embed=True, head=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_folder_computes_what_transformers_computes(kind, dtype, shard, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    tiny_models.transformers_model(kind).to(getattr(torch, dtype)).save_pretrained(tmp_path, max_shard_size=shard)
    sharded = (tmp_path / "model.safetensors.index.json").is_file()
    assert sharded == (shard == "20KB") and len(list(tmp_path.glob("*.safetensors"))) > 2 * sharded
    params = hf.load_backbone(tmp_path, hf_config.read_config(tmp_path))
    assert {str(leaf.dtype) for leaf in flatten(params).values()} == {dtype}
    ids = np.random.default_rng(0).integers(0, 61, (2, 16))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        want = theirs(torch.from_numpy(ids)).logits.numpy()
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    got = logits(params, jnp.asarray(ids), tiny_models.BACKBONES[kind])
    scale = np.abs(want).max()
    np.testing.assert_allclose(got / scale, want / scale, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_in_and_out_again_is_byte_identical(kind, folders, tmp_path):
    folder, _ = folders(kind)
    specs = specs_of(tiny_models.BACKBONES[kind])
    hf.save_backbone(tmp_path, specs, hf.load_backbone(folder, hf_config.read_config(folder)), config_of(folder))
    theirs, ours = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape
        assert ours[name].tobytes() == tensor.tobytes(), name
    assert config_of(tmp_path) == config_of(folder)


@pytest.fixture
def copy(folders, tmp_path):
    """kind -> a folder of our own to break, the tensors in it and a way to write them back."""

    def make(kind):
        source, _ = folders(kind)
        shutil.copytree(source, tmp_path, dirs_exist_ok=True)
        path = tmp_path / "model.safetensors"
        tensors = load_file(path)
        return tmp_path, tensors, lambda: save_file(tensors, path, metadata={"format": "pt"})

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_model_is_cut_from_one_language_model(kind, folders):
    folder, _ = folders(kind)
    arch = tiny_models.architecture(kind)
    fresh = hf.load_parts(folder, arch.backbone, architecture.parts_of_backbone(arch))
    want = {path: spec.shape for path, spec in flatten(architecture.specs(arch)).items() if not path.startswith("mig/")}
    assert {path: x.shape for path, x in fresh.items()} == want
    whole = flatten(hf.load_backbone(folder, arch.backbone))
    for path, array in fresh.items():
        np.testing.assert_array_equal(array, whole[path.partition("/")[2]][: len(array)], err_msg=path)


def load(folder):
    return hf.load_backbone(folder, hf_config.read_config(folder))


def test_a_tied_head_may_be_repeated_and_old_frequencies_stored(copy):
    folder, tensors, write = copy("qwen3")
    assert "lm_head.weight" not in tensors
    without = load(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)
    write()
    repeated = load(folder)
    assert jax.tree.structure(repeated) == jax.tree.structure(without)
    jax.tree.map(np.testing.assert_array_equal, repeated, without)


def test_every_tensor_that_does_not_fit_is_listed(copy):
    folder, tensors, write = copy("qwen2")
    del tensors["lm_head.weight"], tensors["model.layers.1.self_attn.k_proj.bias"]
    tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((56, 32), np.float32)
    tensors["model.embed_token.weight"] = np.zeros(1, np.float32)
    tensors["model.layers.2.self_attn.q_proj.weight"] = np.zeros((32, 31), np.float32)
    tensors["model.norm.weight"] = np.zeros((32, 1), np.float32)
    write()
    with pytest.raises(WeightsError) as error:
        load(folder)
    message = str(error.value)
    assert message.count("\n") == 6 and "6 problem(s)" in message
    for line in (
        "missing lm_head.weight (61, 32)",
        "missing model.layers.1.self_attn.k_proj.bias (16,)",
        "unexpected model.layers.3.mlp.up_proj.weight (56, 32)",
        "unexpected model.embed_token.weight (1,)",
        "model.layers.2.self_attn.q_proj.weight has shape (32, 31), expected (32, 32)",
        "model.norm.weight has shape (32, 1), expected (32,)",
    ):
        assert line in message


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.language_"])
def test_a_prefix_of_every_name_is_said_in_one_line(copy, prefix):
    folder, tensors, write = copy("qwen2")
    for name in list(tensors):
        tensors[prefix + name] = tensors.pop(name)
    write()
    with pytest.raises(
        WeightsError, match=f"model.safetensors has '{prefix}' before the name of every tensor"
    ) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_a_truncated_file_is_refused(copy):
    folder, _, _ = copy("llama2")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="model.safetensors cannot be read as safetensors"):
        load(folder)
    path.write_bytes(b"")
    with pytest.raises(WeightsError, match="model.safetensors cannot be read as safetensors"):
        load(folder)
    path.unlink()
    with pytest.raises(WeightsError, match="has none of model.safetensors, model.safetensors.index.json, "):
        load(folder)


@pytest.fixture
def sharded(folders, tmp_path):
    _, model = folders("llama2")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    path = tmp_path / "model.safetensors.index.json"
    return tmp_path, path, json.loads(path.read_text())


def test_a_missing_shard_is_refused(sharded):
    folder, _, index = sharded
    (folder / index["weight_map"]["model.norm.weight"]).unlink()
    with pytest.raises(WeightsError, match=f"files that are not there: {index['weight_map']['model.norm.weight']}"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["../model-00001-of-00002.safetensors", "/etc/model.safetensors", "a/b.safetensors", 3]
)
def test_an_index_that_names_files_outside_is_refused(sharded, name):
    folder, path, index = sharded
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="outside its own folder"):
        load(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}'])
def test_an_index_that_is_none_is_refused(sharded, text):
    folder, path, _ = sharded
    path.write_text(text)
    with pytest.raises(WeightsError, match="is not an index of weight files"):
        load(folder)


def test_what_an_index_says_of_its_files_is_not_believed(sharded):
    """They are asked themselves, as transformers does; a tensor that none of the named files has is missing."""
    folder, path, index = sharded
    right, file = load(folder), index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    path.write_text(json.dumps(index))
    jax.tree.map(np.testing.assert_array_equal, load(folder), right)
    tensors = load_file(folder / file)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / file)
    with pytest.raises(WeightsError, match="missing model.norm.weight"):
        load(folder)


def test_every_process_reads_only_what_its_devices_keep(folders, monkeypatch):
    """On 4 devices each block of a sharded tensor is read once, and nothing is read whole."""
    backbone = tiny_models.BACKBONES["qwen2"]
    source, _ = folders("qwen2")
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
    arrays = hf.load_parts(source, backbone, {"lm": specs}, lambda path: (None, placed[path.partition("/")[2]]))
    whole = flatten(hf.load_backbone(source, backbone))
    for path, array in arrays.items():
        own = path.partition("/")[2]
        assert array.sharding.is_equivalent_to(placed[own], array.ndim)
        np.testing.assert_array_equal(array, whole[own])
    name = "model.layers.1.self_attn.o_proj.weight"
    assert read[name] == [32 * 32 // 4] * 4 + [32 * 32]  # the last by load_backbone
    assert unflatten(arrays)["lm"]["layers"]["q"].addressable_shards[0].data.shape == (3, 16, 2, 8)
