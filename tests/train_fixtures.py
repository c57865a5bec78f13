"""A tiny random Qwen2 with its tokenizer and data in files, and one run trained from them that the tests share."""

import functools
import json

import numpy as np
import tiny_models
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from comi_jax import backbone as lm
from comi_jax import hf, train
from comi_jax.config import Backbone

COLOURS = "red blue green white black brown pink grey".split()
THINGS = "key coin ring cup pen lamp silver_coin gold_ring old_brass_lamp".split()
WORDS = "the box holds a . what does hold ? in".split() + COLOURS + sorted({w for t in THINGS for w in t.split("_")})
SPECIAL = ["<unk>", "<bos>", "<eos>"]
STEPS = 6


def backbone(**changes):
    values = {
        "model_type": "qwen2", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "rope_scaling": None, "max_position_embeddings": 128, "tie_word_embeddings": True, "qkv_bias": True,
        "qk_norm": False,
    } | changes  # fmt: skip
    return Backbone(**values)


def tokenizer():
    """Words as tokens. It adds a BOS wherever special tokens are wanted, as LLaMA's does."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")


def language_model(folder, **changes):
    """``folder`` as Hugging Face would have it: config.json, model.safetensors and the tokenizer."""
    shape = backbone(**changes)
    folder.mkdir(parents=True)
    weights = tiny_models.shaken(lm.specs(shape, shape.num_hidden_layers, embed=True, head=True))
    names = set(hf.READ) & set(Backbone.__dataclass_fields__)
    config = {name: getattr(shape, name) for name in names} | {"eos_token_id": 2, "hidden_act": "silu"}
    hf.save_backbone(folder, weights, config)
    tokenizer().save_pretrained(folder)
    return folder


def records(count, seed=0, facts=4):
    """JSON objects: what each of some boxes holds, and a question about one of them."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        colours = [COLOURS[i] for i in rng.permutation(len(COLOURS))[:facts]]
        things = [THINGS[i].replace("_", " ") for i in rng.permutation(len(THINGS))[:facts]]
        context = [f"the {c} box holds a {t} ." for c, t in zip(colours, things, strict=True)]
        asked = int(rng.integers(facts))
        question = f"what does the {colours[asked]} box hold ?"
        out.append({"input": context, "prompt": question, "answer": [things[asked], f"a {things[asked]}"]})
    return out


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def command(model, data, output, *more):
    """The command line of a tiny run."""
    return [
        "--config=qwen2", f"model.path={model}", "model.dtype=float32", f"data.train={data}", f"train.output={output}",
        "compression.encoder_layers=1", "compression.rates=2,4", "compression.segment_size=32", "data.max_context=64",
        "data.buckets=32", "data.on_long=refuse", "optimizer.accumulate=1", "optimizer.learning_rate=0.01",
        "optimizer.schedule=constant", "optimizer.warmup=0", f"train.steps={STEPS}", "train.batch_size=8",
        "train.log_every=2", "train.checkpoint_every=2", "generation.max_new_tokens=4", *more,
    ]  # fmt: skip


@functools.cache
def world(factory):
    """A folder with lm/ (the language model), train.jsonl and dev.jsonl."""
    folder = factory.mktemp("world")
    language_model(folder / "lm")
    write(folder / "train.jsonl", records(16))
    write(folder / "dev.jsonl", records(6, seed=1))
    return folder


@functools.cache
def trained(factory):
    """The folder of a finished run with a closing table. Tests copy it before they change it."""
    folder = world(factory)
    train.main(command(folder / "lm", folder / "train.jsonl", folder / "run", f"data.eval={folder / 'dev.jsonl'}"))
    return folder / "run"
