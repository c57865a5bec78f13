"""The official release: its checkpoints, every tensor accounted for, and what it computes from them, within 2e-4."""

import json
from pathlib import Path

import numpy as np
import official_adapter as adapter
import pytest
import tiny_models
from safetensors.numpy import load_file, save_file

from comi_jax.config import Compression
from comi_jax.errors import ConfigError
from comi_jax.model import architecture
from comi_jax.params import flatten
from comi_jax.weights import hf, hf_config, official
from comi_jax.weights.layout import WeightsError

GOLDEN = Path(__file__).resolve().parent / "golden"
WHOLE_GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
TOLERANCE = 2e-4
ALPHA = 4.0


# --- parity -----------------------------------------------------------------------------------------------------------


def cases(folder):
    """(name, its json, its arrays) of every golden case in ``folder``, named "compress/x" or "qwen2/full/r4"."""
    for index in sorted(folder.glob("**/c*.json")):
        if index.name not in ("cases.json", "compress.json"):
            continue
        where = "compress" if index.stem == "compress" else index.parent.name
        with np.load(index.with_suffix(".npz")) as arrays:
            for name, case in json.loads(index.read_text()).items():
                own = {key.removeprefix(name + "/"): arrays[key] for key in arrays if key.startswith(name + "/")}
                yield f"{where}/{name}", case, own


def wrong(got, want):
    """What differs by more than TOLERANCE of the largest golden value, array by array; sizes and ids must be equal."""
    problems = []
    for name, golden in want.items():
        ours, golden = np.asarray(got[name]), np.asarray(golden)
        if golden.dtype.kind in "iu":
            same = ours.shape == golden.shape and (ours == golden).all()
        else:
            same = ours.shape == golden.shape and np.abs(ours - golden).max() <= TOLERANCE * np.abs(golden).max()
        if not same:
            problems.append(name)
    return problems


def compare_compression(case, arrays):
    scalars = case["r"], case["alpha_coarse"], case["beta_coarse"], case["alpha_fine"], case["beta_fine"]
    got = adapter.compress(arrays["context"], arrays["query"], *scalars)
    grads = adapter.compress_vjp(arrays["context"], arrays["query"], arrays["cotangent"], *scalars)
    got |= dict(zip(("grad_context", "grad_query"), grads, strict=True))
    return wrong(got, {k: arrays[k] for k in ("group_sizes", "memory", "grad_context", "grad_query")})


def compare_model(folder, name, case, arrays):
    arch, kind, _ = name.split("/")
    model = adapter.load(folder / arch / f"official_{kind}.safetensors", folder / arch / "hf", case["options"])
    inputs = arrays["input_ids"], arrays["query_ids"], arrays["labels"]
    outputs = "encoder_hidden", "group_sizes", "memory_before_lsa", "memory", "answer_logits", "loss"
    problems = wrong(adapter.forward(model, *inputs), {k: arrays[k] for k in outputs})
    if "grad_norms" in case:
        norms = adapter.grad_norms(model, *inputs)
        if set(norms) == set(case["grad_norms"]):
            both = ({"grad_norms": np.array([n[k] for k in sorted(norms)])} for n in (norms, case["grad_norms"]))
            problems += wrong(*both)
        else:
            problems.append(f"gradients of {sorted(set(norms) ^ set(case['grad_norms']))}")
    if "generated" in case:
        ids = adapter.generate(model, *inputs[:2], 20, 1.3)
        problems += [] if ids == case["generated"] else [f"generated {ids}, not {case['generated']}"]
    return problems


def compare(folder, name, case, arrays):
    return (
        compare_compression(case, arrays) if name.startswith("compress/") else compare_model(folder, name, case, arrays)
    )


SUBSET = {name: (case, arrays) for name, case, arrays in cases(GOLDEN)}


@pytest.mark.parametrize("name", SUBSET)
def test_what_the_release_computes(name):
    assert compare(GOLDEN, name, *SUBSET[name]) == []


def test_the_subset_covers_what_it_should():
    """To be quick, not everything of every case; gradients and generation of the whole set are in the slow test."""
    assert {name.rsplit("/", 1)[0] for name in SUBSET} == {"compress", "llama2/full", "qwen2/full", "qwen3/lora"}
    assert {part for case, _ in SUBSET.values() for part in case} > {"grad_norms", "generated"}


@pytest.mark.slow
@pytest.mark.skipif(not WHOLE_GOLDEN.is_dir(), reason="the whole golden set is not beside this checkout")
def test_all_that_the_release_computes():
    found = {name: compare(WHOLE_GOLDEN, name, case, arrays) for name, case, arrays in cases(WHOLE_GOLDEN)}
    assert len(found) == 56
    assert {name: problems for name, problems in found.items() if problems} == {}


@pytest.mark.parametrize(
    "got", [[1.0, 2.0, 3.001], [1.0, 2.0], [1.0, 2.0, np.nan], [[1.0, 2.0, 3.0]]], ids=["off", "short", "nan", "rank"]
)
def test_the_comparison_can_fail(got):
    want = {"x": np.array([1.0, 2.0, 3.0])}
    assert wrong({"x": [1.0, 2.0, 3.0005]}, want) == []
    assert wrong({"x": got}, want) == ["x"]
    assert wrong({"x": [1, 3]}, {"x": np.array([1, 2])}) == ["x"]


# --- checkpoints ------------------------------------------------------------------------------------------------------

KINDS = [("qwen2", 0), ("qwen2", 2), ("qwen3", 2)]


def checkpoint(kind, lora, **extra):
    """Official tensors of a random tiny model, and its architecture."""
    arch = tiny_models.architecture(kind, lora=lora)
    tensors = official.tensors(tiny_models.shaken(architecture.specs(arch)), arch)
    return {name: np.asarray(x) for name, x in tensors.items()} | extra, arch


def load(tensors, arch, path, alpha=ALPHA):
    save_file(tensors, path / "model.safetensors")
    # Rates and segment size are what no tensor holds; layer counts are given wrongly, to be read off.
    given = Compression(rates=arch.compression.rates, segment_size=arch.compression.segment_size, encoder_layers=1)
    return official.load(path / "model.safetensors", arch.backbone, given, alpha)


@pytest.mark.parametrize("kind, lora", KINDS)
def test_out_and_in_again_is_byte_identical(kind, lora, tmp_path):
    tensors, arch = checkpoint(kind, lora)
    params, found = load(tensors, arch, tmp_path)
    assert found.compression == arch.compression
    assert (found.lora.rank, found.lora.scale) == (lora, ALPHA / lora if lora else 0.0)
    again = official.tensors(params, found)
    assert set(again) == set(tensors)
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype and again[name].shape == tensor.shape
        assert again[name].tobytes() == tensor.tobytes(), name
    shapes = {path: spec.shape for path, spec in flatten(architecture.specs(found)).items()}
    assert {path: np.shape(x) for path, x in flatten(params).items()} == shapes


@pytest.mark.parametrize("arch_name, kind", [("llama2", "full"), ("qwen2", "full"), ("qwen3", "lora")])
def test_a_real_checkpoint_comes_back_without_what_nothing_computes_with(arch_name, kind):
    path = GOLDEN / arch_name / f"official_{kind}.safetensors"
    params, arch = official.load(
        path, hf_config.read_config(GOLDEN / arch_name / "hf"), Compression(encoder_layers=1), ALPHA
    )
    assert (arch.compression.encoder_layers, arch.compression.lsa_layers) == (2, 1)
    theirs, ours = load_file(path), official.tensors(params, arch)
    unused = {"memory_fusion_layer.lm_head.weight", "semantic_alignment_layer.weight", "semantic_alignment_layer.bias"}
    assert set(theirs) - set(ours) == (unused if arch_name == "llama2" else set()) and not set(ours) - set(theirs)
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


def test_each_part_goes_where_its_name_says(tmp_path):
    tensors, arch = checkpoint("qwen3", 2)
    tensors["alpha_select"], tensors["beta_select"] = np.array(5, np.float32), np.array(6, np.float32)
    tensors["alpha_merge"], tensors["beta_merge"] = np.array(7, np.float32), np.array(8, np.float32)
    params, _ = load(tensors, arch, tmp_path)
    assert {k: float(v) for k, v in params["mig"].items()} == {
        "alpha_coarse": 5.0, "beta_coarse": 6.0, "alpha_fine": 7.0, "beta_fine": 8.0,
    }  # fmt: skip
    layer = "model.layers.1.self_attn."
    np.testing.assert_array_equal(
        params["encoder"]["layers"]["q"][1].reshape(32, -1).T, tensors[f"encoder.{layer}q_proj.weight"]
    )
    np.testing.assert_array_equal(
        params["lsa"]["layers"]["down"][0].T, tensors["memory_fusion_layer.model.layers.0.mlp.down_proj.weight"]
    )
    peft = f"decoder.base_model.model.{layer}"
    np.testing.assert_array_equal(
        params["decoder"]["layers"]["o"][1].reshape(-1, 32).T, tensors[f"{peft}o_proj.base_layer.weight"]
    )
    np.testing.assert_array_equal(params["lora"]["k"]["a"][1].T, tensors[f"{peft}k_proj.lora_A.default.weight"])
    np.testing.assert_array_equal(params["lora"]["k"]["b"][1].T, tensors[f"{peft}k_proj.lora_B.default.weight"])
    assert f"{peft}k_norm.weight" in tensors  # what PEFT does not adapt keeps its name


def test_names_of_older_files_are_understood(tmp_path):
    tensors, arch = checkpoint("qwen2", 0)
    old = {
        name.replace("encoder.", "icae.", 1) if name.startswith("encoder.") else name: x for name, x in tensors.items()
    }
    assert sum(name.startswith("icae.") for name in old) > 10
    params, found = load(old, arch, tmp_path)
    assert official.tensors(params, found).keys() == tensors.keys()
    both = tensors | {"icae.model.norm.weight": np.zeros(32, np.float32)}
    with pytest.raises(WeightsError, match="under encoder. too: .*model.norm.weight"):
        load(both, arch, tmp_path)


def test_tensors_that_nothing_computes_with_may_be_there(tmp_path):
    table = np.zeros((61, 32), np.float32)
    tensors, arch = checkpoint("qwen3", 2)
    tensors |= {
        "encoder.lm_head.weight": table,
        "memory_fusion_layer.lm_head.weight": table,
        "memory_fusion_layer.model.embed_tokens.weight": table,
        "decoder.base_model.model.lm_head.weight": tensors["decoder.base_model.model.model.embed_tokens.weight"],
        "semantic_alignment_layer.weight": np.zeros((32, 32), np.float32),
        "semantic_alignment_layer.bias": np.zeros(32, np.float32),
    }
    params, _ = load(tensors, arch, tmp_path)
    assert "head" not in params["decoder"] and "embed" not in params["lsa"]


@pytest.mark.parametrize("lora", [0, 2])
def test_a_tied_head_of_its_own_is_refused(lora, tmp_path):
    """The release ties the two: which of them it computes with is the one that its state dict happens to end with."""
    tensors, arch = checkpoint("qwen3", lora)
    prefix = "decoder.base_model.model." if lora else "decoder."
    head, embeddings = f"{prefix}lm_head.weight", f"{prefix}model.embed_tokens.weight"
    same = tensors | {head: tensors[embeddings].copy()}
    assert "head" not in load(same, arch, tmp_path)[0]["decoder"]
    same[head][60, 31] += 1
    with pytest.raises(WeightsError, match=f"{head} differs from {embeddings}, though config.json has tie_word"):
        load(same, arch, tmp_path)
    unread = tensors | {"encoder.lm_head.weight": same[head]}  # heads of encoder and LSA compute nothing
    load(unread, arch, tmp_path)


@pytest.mark.parametrize("kind, lora", KINDS)
def test_every_key_that_does_not_fit_is_listed(kind, lora, tmp_path):
    tensors, arch = checkpoint(kind, lora)
    base = "decoder.base_model.model.model" if lora else "decoder.model"
    down = f"{base}.layers.2.mlp.down_proj.weight"
    shape = tensors[down].shape
    for name in (
        "beta_merge",
        "encoder.model.norm.weight",
        "memory_fusion_layer.model.layers.0.self_attn.v_proj.weight",
    ):
        del tensors[name]
    tensors |= {
        "encoder.model.embed_tokens.weights": np.zeros(2, np.float32),
        "decoder.extra": np.zeros(3, np.float32),
        down: np.zeros(shape[::-1], np.float32),
        "semantic_alignment_layer.weight": np.zeros((1, 32), np.float32),
    }
    lines = [
        "missing beta_merge ()",
        "missing encoder.model.norm.weight (32,)",
        "missing memory_fusion_layer.model.layers.0.self_attn.v_proj.weight",
        "unexpected encoder.model.embed_tokens.weights (2,)",
        "unexpected decoder.extra (3,)",
        f"{down} has shape {shape[::-1]}, expected {shape}",
        "semantic_alignment_layer.weight has shape (1, 32), expected (32, 32)",
    ]
    if lora:
        del tensors["decoder.base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"]
        lines.append("missing decoder.base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight (")
        tensors["decoder.model.layers.0.self_attn.q_proj.weight"] = np.zeros((32, 32), np.float32)
        lines.append("unexpected decoder.model.layers.0.self_attn.q_proj.weight")
    with pytest.raises(WeightsError) as error:
        load(tensors, arch, tmp_path)
    message = str(error.value)
    assert f"{len(lines)} problem(s)" in message and message.count("\n") == len(lines)
    for line in lines:
        assert line in message


def test_what_the_file_cannot_say_must_be_given(tmp_path):
    tensors, arch = checkpoint("qwen2", 2)
    with pytest.raises(ConfigError, match="adapters of rank 2; their alpha is not stored"):
        load(tensors, arch, tmp_path, alpha=None)
    with pytest.raises(WeightsError, match="no tensors for lsa_layers"):
        load({k: v for k, v in tensors.items() if not k.startswith("memory_fusion_layer.")}, arch, tmp_path)
    name = "decoder.base_model.model.model.layers.1.self_attn.o_proj.lora_A.default.weight"
    with pytest.raises(WeightsError, match=r"several ranks \[2, 3\]"):
        load(tensors | {name: np.zeros((3, 32), np.float32)}, arch, tmp_path)


def test_a_plain_language_model_is_no_comi_checkpoint(tmp_path):
    arch = tiny_models.architecture("llama2")
    decoder = architecture.specs(arch)["decoder"]
    hf.save_backbone(tmp_path, decoder, tiny_models.shaken(decoder), {})
    with pytest.raises(WeightsError, match="is not an official COMI checkpoint"):
        official.load(tmp_path / "model.safetensors", arch.backbone, arch.compression)
