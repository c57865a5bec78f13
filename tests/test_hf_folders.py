"""Hugging Face folders as they are found on disks: what transformers computes from them, or a refusal that says why."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from safetensors import SafetensorError

from comi_jax.model import backbone as lm
from comi_jax.weights import hf, hf_config, hf_folder, inspection
from comi_jax.weights.layout import WeightsError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@functools.cache
def tensors(kind, seed=0):
    """The tensors of a random tiny model, under Hugging Face's names; of tied embeddings, one."""
    found = {name: x.detach().clone() for name, x in tiny_models.transformers_model(kind, seed).state_dict().items()}
    return {n: x for n, x in found.items() if n != HEAD or not tiny_models.BACKBONES[kind].tie_word_embeddings}


def folder_of(path, kind, **changes):
    """A folder with a config.json alone; None takes an entry away."""
    tiny_models.transformers_config(kind).save_pretrained(path)
    values = json.loads((path / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]} | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return path


def safe(path, held, name=WHOLE):
    safetensors.save_file({n: x.contiguous() for n, x in held.items()}, path / name, metadata={"format": "pt"})


def pickled(path, held, name="pytorch_model.bin"):
    torch.save(held, path / name)


def shards(path, held, write=safe, stem="model", ending="safetensors", index=INDEX, **listed):
    """Two shards and their index, to which ``listed`` adds entries."""
    names, weight_map = sorted(held), {}
    for number, own in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-{number:05}-of-00002.{ending}"
        write(path, {name: held[name] for name in own}, file)
        weight_map |= dict.fromkeys(own, file)
    weight_map |= {name.replace("__", "."): file for name, file in listed.items()}
    (path / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def bins(path, held, **listed):
    shards(path, held, pickled, "pytorch_model", "bin", "pytorch_model.bin.index.json", **listed)


def theirs(path, ids):
    """transformers' logits, or None where it does not load the folder."""
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        )
    except (OSError, ValueError, SafetensorError):
        return None
    with torch.no_grad():
        return model.eval()(torch.from_numpy(ids)).logits.numpy()


@functools.partial(jax.jit, static_argnums=2)
def logits(params, ids, backbone):
    states, _ = lm.forward(params, lm.embed_tokens(params, ids, jnp.float32), backbone)
    return lm.logits(params, states)


def ours(path, ids):
    backbone = hf_config.read_config(path)
    params = jax.tree.map(lambda x: x.astype(np.float32), hf.load_backbone(path, backbone))
    return np.asarray(logits(params, jnp.asarray(ids), backbone))


# --- what is read -----------------------------------------------------------------------------------------------------


def whole(path):
    safe(folder_of(path, "qwen2"), tensors("qwen2"))


def sharded(path):
    shards(folder_of(path, "qwen2"), tensors("qwen2"))


def sharded_bin(path):
    bins(folder_of(path, "qwen2"), tensors("qwen2"))


def new_file_beside_old_shards(path):
    sharded(path)
    safe(path, tensors("qwen2", 1))


def whole_file_beside_an_index_without_its_shards(path):
    new_file_beside_old_shards(path)
    for file in path.glob("model-*"):
        file.unlink()


def shards_beside_shards_of_another_save(path):
    sharded(path)
    safe(path, tensors("qwen2", 1), "model-00001-of-00001.safetensors")


def safetensors_beside_bin(path):
    sharded_bin(path)
    pickled(path, tensors("qwen2"))
    safe(path, tensors("qwen2", 1))


def shards_beside_bin(path):
    pickled(folder_of(path, "qwen2"), tensors("qwen2"))
    shards(path, tensors("qwen2", 1))


def bin_beside_shards_of_bin(path):
    sharded_bin(path)
    pickled(path, tensors("qwen2", 1))


def config_that_names_its_file(path):
    whole(path)
    safe(folder_of(path, "qwen2", transformers_weights="new.safetensors"), tensors("qwen2", 1), "new.safetensors")


def config_that_names_its_index(path):
    whole(path)
    shards(folder_of(path, "qwen2", transformers_weights=INDEX), tensors("qwen2", 1))


def bin_of_parameters(path):
    pickled(folder_of(path, "llama2"), {n: torch.nn.Parameter(x) for n, x in tensors("llama2").items()})


def bin_of_bfloat16_parameters(path):
    pickled(folder_of(path, "llama2"), {n: torch.nn.Parameter(x.bfloat16()) for n, x in tensors("llama2").items()})


def buffers_that_nothing_reads(path):
    """Rotary frequencies, masks and positions, as old versions stored them, which the index does not list."""
    held = dict(tensors("llama2"))
    bins(folder_of(path, "llama2"), held)
    file = path / "pytorch_model-00002-of-00002.bin"
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4, dtype=torch.float64),
        "model.layers.1.self_attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "model.position_ids": torch.arange(8)[None],
    }
    torch.save(torch.load(file) | buffers, file)


def index_with_more_keys_than_the_files(path):
    bins(folder_of(path, "llama2"), tensors("llama2"), model__rope__inv_freq="pytorch_model-00001-of-00002.bin")


def index_that_puts_a_tensor_into_another_file(path):
    shards(folder_of(path, "llama2"), tensors("llama2"), model__norm__weight="model-00001-of-00002.safetensors")


def tied_without_a_head(path):
    safe(folder_of(path, "qwen3"), tensors("qwen3"))


def tied_with_its_head_repeated(path):
    held = tensors("qwen3")
    safe(folder_of(path, "qwen3"), held | {HEAD: held[EMBED].clone()})


def tied_with_its_head_repeated_in_another_dtype(path):
    held = tensors("qwen3")
    held = held | {EMBED: held[EMBED].bfloat16()}
    safe(folder_of(path, "qwen3"), held | {HEAD: held[EMBED].float()})


def tied_with_the_head_alone(path):
    held = dict(tensors("qwen3"))
    safe(folder_of(path, "qwen3"), {HEAD: held.pop(EMBED)} | held)


def tied_under_the_names_of_a_base_model(path):
    safe(folder_of(path, "qwen3"), {n.removeprefix("model."): x for n, x in tensors("qwen3").items()})


def untied_in_a_config_that_is_silent(path):
    safe(folder_of(path, "qwen2", tie_word_embeddings=None), tensors("qwen2"))


def tensors_of_no_use(path):
    more = {"model.layers.3.mlp.up_proj.weight": torch.ones(56, 32), "score.weight": torch.ones(2, 32)}
    safe(folder_of(path, "llama2"), tensors("llama2") | more)


def layers_of_several_dtypes(path):
    held = {n: x.bfloat16() if ".1." in n else x.half() if ".2." in n else x for n, x in tensors("qwen2").items()}
    safe(folder_of(path, "qwen2"), held)


def norms_of_another_dtype(path):
    safe(folder_of(path, "qwen2"), {n: x if "norm" in n else x.bfloat16() for n, x in tensors("qwen2").items()})


READ = [
    whole, sharded, sharded_bin, new_file_beside_old_shards, whole_file_beside_an_index_without_its_shards,
    shards_beside_shards_of_another_save, safetensors_beside_bin, shards_beside_bin, bin_beside_shards_of_bin,
    config_that_names_its_file, config_that_names_its_index, bin_of_parameters, bin_of_bfloat16_parameters,
    buffers_that_nothing_reads, index_with_more_keys_than_the_files, index_that_puts_a_tensor_into_another_file,
    tied_without_a_head, tied_with_its_head_repeated,
    tied_with_its_head_repeated_in_another_dtype, tied_with_the_head_alone, tied_under_the_names_of_a_base_model,
    untied_in_a_config_that_is_silent, tensors_of_no_use, layers_of_several_dtypes, norms_of_another_dtype,
]  # fmt: skip
IDS = np.random.default_rng(0).integers(0, 61, (2, 16))


@pytest.mark.parametrize("make", READ, ids=lambda make: make.__name__)
def test_a_folder_is_what_transformers_takes_it_for(make, tmp_path):
    make(tmp_path)
    want = theirs(tmp_path, IDS)
    scale = np.abs(want).max()
    np.testing.assert_allclose(ours(tmp_path, IDS) / scale, want / scale, atol=1e-4)
    found = inspection.inspect(tmp_path)
    assert found.kind == "Hugging Face causal language model" and not found.missing


# --- what is refused --------------------------------------------------------------------------------------------------


def index_without_its_shards(path):
    sharded(path)
    next(path.glob("model-00001*")).unlink()


def index_without_its_shards_beside_bin(path):
    index_without_its_shards(path)
    pickled(path, tensors("qwen2"))


def tensor_in_two_shards(path):
    sharded(path)
    names = sorted(tensors("qwen2"))
    held = tensors("qwen2", 1)
    safe(path, {name: held[name] for name in [*names[1::2], names[0]]}, "model-00002-of-00002.safetensors")


def config_that_names_nothing(path):
    whole(path)
    folder_of(path, "qwen2", transformers_weights="new.safetensors")


def config_that_names_a_file_elsewhere(path):
    safe(path, tensors("qwen2"), "elsewhere.safetensors")
    (path / "lm").mkdir()
    safe(folder_of(path / "lm", "qwen2", transformers_weights="../elsewhere.safetensors"), tensors("qwen2"))
    shutil.copytree(path / "lm", path, dirs_exist_ok=True)


def variant_alone(path):
    safe(folder_of(path, "qwen2"), tensors("qwen2"), "model.fp16.safetensors")


def no_weights(path):
    folder_of(path, "qwen2")


def pointer_to_a_large_file(path):
    (folder_of(path, "qwen2") / WHOLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n")


REFUSED = [
    (index_without_its_shards, "names files that are not there: model-00001-of-00002.safetensors"),
    (index_without_its_shards_beside_bin, "names files that are not there: model-00001-of-00002.safetensors"),
    (config_that_names_nothing, "names the weights 'new.safetensors', which do not exist"),
    (config_that_names_a_file_elsewhere, "'../elsewhere.safetensors', which is not a file in its own folder"),
    (variant_alone, "has none of model.safetensors, .* it holds model.fp16.safetensors"),
    (no_weights, "has none of model.safetensors, "),
    (pointer_to_a_large_file, "is a Git LFS pointer, not the file"),
]


@pytest.mark.parametrize("make, said", REFUSED, ids=[make.__name__ for make, _ in REFUSED])
def test_what_transformers_does_not_load_is_refused(make, said, tmp_path):
    make(tmp_path)
    assert theirs(tmp_path, IDS) is None
    with pytest.raises(WeightsError, match=said):
        ours(tmp_path, IDS)


def adapter_beside_a_model(path):
    whole(path)
    (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/model"}))


def tied_with_a_head_of_its_own(path):
    safe(folder_of(path, "qwen3"), tensors("qwen3") | {HEAD: torch.randn(61, 32)})


def untied_without_a_head(path):
    safe(folder_of(path, "qwen2"), {name: x for name, x in tensors("qwen2").items() if name != HEAD})


def layer_that_is_missing(path):
    safe(folder_of(path, "qwen2"), {name: x for name, x in tensors("qwen2").items() if ".2." not in name})


def whole_numbers_for_weights(path):
    safe(folder_of(path, "qwen2"), tensors("qwen2") | {NORM: torch.ones(32, dtype=torch.int64)})


AMBIGUOUS = [
    (
        adapter_beside_a_model,
        "with peft installed, transformers loads the adapter on top of it, without peft the model",
    ),
    (tied_with_a_head_of_its_own, "transformers 5 computes with that head, transformers 4 with the embeddings"),
    (untied_without_a_head, "missing lm_head.weight"),
    (layer_that_is_missing, "missing model.layers.2.input_layernorm.weight"),
    (tensor_in_two_shards, "transformers uses the one in model-00002-of-00002.safetensors, not in model-00001"),
    (whole_numbers_for_weights, "model.norm.weight is int64"),
]


@pytest.mark.parametrize("make, said", AMBIGUOUS, ids=[make.__name__ for make, _ in AMBIGUOUS])
def test_what_transformers_loads_and_another_takes_otherwise_is_refused(make, said, tmp_path):
    make(tmp_path)
    assert theirs(tmp_path, IDS) is not None
    with pytest.raises(WeightsError, match=said):
        ours(tmp_path, IDS)


def test_transformers_computes_with_a_head_of_its_own(tmp_path):
    """Why such a head is refused: it is neither left out nor the embeddings'."""
    tied_with_a_head_of_its_own(tmp_path)
    want = theirs(tmp_path, IDS)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('gs": true', 'gs": false'))
    np.testing.assert_allclose(ours(tmp_path, IDS), want, atol=1e-4 * np.abs(want).max())


def test_an_adapter_alone_is_named(tmp_path):
    safe(tmp_path, {"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/model"}))
    for read in (inspection.inspect, hf_config.read_config):
        with pytest.raises(ValueError, match="is an adapter of peft for someone/model, not a model: merge it"):
            read(tmp_path)


# --- what is told -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, said",
    [
        (new_file_beside_old_shards, f"{WHOLE} is read, as transformers does; not read: {INDEX} beside it"),
        (safetensors_beside_bin, "not read: pytorch_model.bin, pytorch_model.bin.index.json beside it"),
        (tensors_of_no_use, "2 tensor(s) that this model does not have are not read: model.layers.3.mlp.up_proj"),
        (
            buffers_that_nothing_reads,
            "2 tensor(s) that this model does not have are not read: model.layers.1.self_attn",
        ),
        (layers_of_several_dtypes, "layers differ in dtype and are read in float32: model.layers.0.input_layernorm"),
        (whole, ""),
        (tied_with_its_head_repeated, ""),
    ],
)
def test_what_is_not_read_is_told(make, said, tmp_path, caplog):
    hf_folder.tell.cache_clear()
    make(tmp_path)
    for _ in range(2):
        hf.load_backbone(tmp_path, hf_config.read_config(tmp_path))
    told = [record.getMessage() for record in caplog.records if record.name == "comi_jax"]
    assert len(told) == bool(said) and all(said in line for line in told)
    notes = inspection.inspect(tmp_path).notes
    assert bool(said) == bool(notes) and any(said.partition(" not read: ")[2] in note for note in notes) == bool(said)


def test_inspect_tells_an_adapter_beside_a_model(tmp_path):
    adapter_beside_a_model(tmp_path)
    assert any("adapter_config.json lies beside a model" in note for note in inspection.inspect(tmp_path).notes)


def test_inspect_tells_all_that_a_folder_is_refused_for(tmp_path):
    tied_with_a_head_of_its_own(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | {"eos_token_id": None, "some_scale": False}
    (tmp_path / "config.json").write_text(json.dumps(values))
    notes = inspection.inspect(tmp_path).notes
    for said in ("some_scale=False", "names no eos_token_id", "lm_head.weight differs from model.embed_tokens.weight"):
        assert sum(said in note for note in notes) == 1
