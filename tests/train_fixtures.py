"""A tiny random Qwen2 with its tokenizer and data in files, and one run trained from them that the tests share."""

import contextlib
import dataclasses
import io
import json
import logging
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_models
from filelock import FileLock
from jax.experimental.compilation_cache import compilation_cache
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from comi_jax import train
from comi_jax.backbone import Backbone
from comi_jax.model import backbone as backbone_module
from comi_jax.weights import hf
from comi_jax.weights.hf_attributes import ATTRIBUTES

COLOURS = "red blue green white black brown pink grey".split()
THINGS = "key coin ring cup pen lamp silver_coin gold_ring old_brass_lamp".split()
WORDS = "the box holds a . what does hold ? in".split() + COLOURS + sorted({w for t in THINGS for w in t.split("_")})
SPECIAL = ["<unk>", "<bos>", "<eos>"]
STEPS, SAVE_EVERY, LOG_EVERY = 30, 15, 5


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
    specs = backbone_module.specs(shape, shape.num_hidden_layers, embed=True, head=True)
    names = set(ATTRIBUTES) & set(Backbone.__dataclass_fields__)
    config = {name: getattr(shape, name) for name in names} | {"eos_token_id": 2, "hidden_act": "silu"}
    hf.save_backbone(folder, specs, tiny_models.shaken(specs), config)
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
        "--config=qwen2", f"model.path={model}", "model.dtype=float32", "model.attention=dense", "model.remat=off",
        f"data.train={data}", f"train.output={output}", "compression.encoder_layers=1", "compression.rates=2,4",
        "compression.segment_size=32", "data.max_context=64", "data.buckets=32", "data.on_long=refuse",
        "optimizer.accumulate=1", "optimizer.learning_rate=0.01", "optimizer.schedule=linear", f"train.steps={STEPS}",
        "train.batch_size=8", f"train.log_every={LOG_EVERY}", f"train.checkpoint_every={SAVE_EVERY}",
        "generation.max_new_tokens=4", *more,
    ]  # fmt: skip


@dataclasses.dataclass
class Outcome:
    """What a command left: all it printed, for how many shapes of micro-batches gradients were compiled, and how often
    the update was."""

    printed: str
    compiled: int
    updates: int


def run(arguments):
    """``python -m comi_jax.train`` with ``arguments``, in this process."""
    compiled = {"add_gradients": 0, "apply_gradients": 0}

    class Count(logging.Handler):
        def emit(self, record):
            for name in compiled:
                compiled[name] += f"Compiling jit({name})" in record.getMessage()

    handler, printed = Count(), io.StringIO()
    logging.getLogger("jax").addHandler(handler)
    try:
        with jax.log_compiles(), contextlib.redirect_stdout(printed):
            train.main(arguments)
    finally:
        logging.getLogger("jax").removeHandler(handler)
    return Outcome(printed.getvalue(), *compiled.values())


@dataclasses.dataclass
class World:
    """Files that the tests share and do not change: a language model, data, and a finished run on them."""

    lm: Path
    data: Path
    dev: Path
    run: Path
    outcome: Outcome

    def command(self, output, *more):
        """The command line of that run, into another folder or with other settings."""
        return command(self.lm, self.data, output, f"data.eval={self.dev}", "train.compare_mean_pooling=true", *more)


def make_world(folder):
    """What is in ``folder``; the first process that asks makes it, and others wait."""
    made = World(folder / "lm", folder / "train.jsonl", folder / "dev.jsonl", folder / "run", Outcome("", 0, 0))
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "outcome.json").exists():
            language_model(made.lm)
            write(made.data, records(16))
            write(made.dev, records(6, seed=1))
            outcome = run(made.command(made.run))
            (folder / "outcome.json").write_text(json.dumps(dataclasses.asdict(outcome)))
    made.outcome = Outcome(**json.loads((folder / "outcome.json").read_text()))
    return made


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(tmp_path_factory):
    """Some programs are compiled by several tests, in functions of their own: the second time they come from a file."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "compilations"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def world(quick_compilation, tmp_path_factory):
    """Made once, whichever test module of whichever of pytest-xdist's processes asks first."""
    base = tmp_path_factory.getbasetemp()
    return make_world((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "world")
