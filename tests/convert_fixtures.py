"""Tiny language models and official checkpoints in files, and the command that converts them."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import train_fixtures
from safetensors.numpy import load_file, save_file

from comi_jax import convert
from comi_jax.model import architecture, comi
from comi_jax.model.batch import Batch
from comi_jax.weights import official

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


def change_config(lm, **values):
    path = lm / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
