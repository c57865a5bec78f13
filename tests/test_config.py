"""Settings that cannot work are refused by name; overrides and files give back exactly what they were given."""

import dataclasses
import json
import pkgutil
import sys
import types

import pytest
import tiny_models

import comi_jax.configs
from comi_jax import config as c
from comi_jax import overrides
from comi_jax.backbone import Backbone
from comi_jax.errors import ConfigError

# class, settings, what the message must name
REFUSED = [
    (c.Compression, {"rates": ()}, "rates"),
    (c.Compression, {"rates": (16, 0)}, "rates"),
    (c.Compression, {"encoder_layers": 0}, "encoder_layers"),
    (c.Compression, {"lsa_layers": 0}, "lsa_layers"),
    (c.Compression, {"rates": (16, 32), "segment_size": 31}, "segment_size"),
    (c.Lora, {"rank": -1}, "rank"),
    (c.Lora, {"dropout": 1.0}, "dropout"),
    (c.Model, {"dtype": "float16"}, "dtype"),
    (c.Model, {"attention": "flash"}, "attention"),
    (c.Data, {"on_long": "drop"}, "on_long"),
    (c.Data, {"max_context": 0}, "max_context"),
    (c.Data, {"max_query": 0}, "max_query"),
    (c.Data, {"max_answer": 0}, "max_answer"),
    (c.Data, {"buckets": (128, 64)}, "buckets"),
    (c.Data, {"max_buckets": 0}, "max_buckets"),
    (c.Data, {"examples_per_source": -1}, "examples_per_source"),
    (c.Data, {"buckets": (0, 64)}, "buckets"),
    (c.Optimizer, {"schedule": "step"}, "schedule"),
    (c.Optimizer, {"learning_rate": 0.0}, "learning_rate"),
    (c.Optimizer, {"warmup": 1.0}, "warmup"),
    (c.Optimizer, {"clip_norm": -1.0}, "clip_norm"),
    (c.Optimizer, {"weight_decay": -0.1}, "weight_decay"),
    (c.Optimizer, {"beta2": 1.0}, "beta2"),
    (c.Train, {"seed": -1}, "seed"),
    (c.Data, {"eval_examples": -1}, "eval_examples"),
    (c.Data, {"synthetic_examples": -1}, "synthetic_examples"),
    (c.Model, {"attention": "cudnn", "dtype": "float32"}, "needs bfloat16"),
    (c.Lora, {"alpha": float("nan")}, "alpha"),
    (c.Optimizer, {"accumulate": -1}, "accumulate"),
    (c.Mesh, {"fsdp": 0}, "at most one of them 0"),
    (c.Mesh, {"data": -1}, "data"),
    (c.Train, {"steps": 0}, "steps"),
    (c.Train, {"batch_size": 0}, "batch_size"),
    (c.Generation, {"max_new_tokens": 0}, "max_new_tokens"),
    (c.Generation, {"repetition_penalty": 0.0}, "repetition_penalty"),
    (c.Config, {"train": c.Train(batch_size=6), "optimizer": c.Optimizer(accumulate=4)}, "accumulate"),
]


@pytest.mark.parametrize("cls, values, named", REFUSED)
def test_numbers_that_cannot_work_are_refused_by_name(cls, values, named):
    with pytest.raises(ConfigError, match=named):
        cls(**values)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "multiple"),
        ({"head_dim": 7}, "head_dim"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ],
)
def test_backbones_that_cannot_be_are_refused(change, named):
    with pytest.raises(ConfigError, match=named):
        dataclasses.replace(tiny_models.BACKBONES["qwen2"], **change)


@pytest.mark.parametrize("field", ["encoder_layers", "lsa_layers"])
def test_layer_counts_go_up_to_all_of_the_backbones(field):
    backbone = tiny_models.BACKBONES["qwen2"]
    most = backbone.num_hidden_layers
    c.Compression(**({"encoder_layers": 1} | {field: most})).check(backbone)
    with pytest.raises(ConfigError, match=f"{field} is {most + 1}.* {most} layers"):
        c.Compression(**({"encoder_layers": 1} | {field: most + 1})).check(backbone)


CHANGED = c.Config(
    name="changed",
    compression=c.Compression(rates=(4, 8), coarse=False, alpha_fine=2.5, segment_size=64),
    lora=c.Lora(rank=8, alpha=4.0),
    data=c.Data(train=("a.jsonl", "b.jsonl.gz"), buckets=(64, 128)),
    train=c.Train(output="out", steps=7),
)


def test_dict_and_back_is_the_identity():
    assert overrides.from_dict(c.Config, json.loads(json.dumps(overrides.to_dict(CHANGED)))) == CHANGED
    assert CHANGED != c.Config()
    backbone = tiny_models.BACKBONES["llama3"]  # a nested dataclass that may be None
    assert backbone.rope_scaling is not None
    assert overrides.from_dict(Backbone, overrides.to_dict(backbone)) == backbone
    assert (
        overrides.from_dict(Backbone, overrides.to_dict(tiny_models.BACKBONES["qwen2"]))
        == tiny_models.BACKBONES["qwen2"]
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"trian": {}}, "unknown entries .*'trian'.* known are"),
        ({"train": {"step": 1}}, r"config.train has unknown entries \['step'\]"),
        ({"train": {"steps": 1.5}}, "config.train.steps is 1.5, not a whole number"),
        ({"train": {"steps": True}}, "config.train.steps is True, not a whole number"),
        ({"lora": {"alpha": "32"}}, "config.lora.alpha is '32', not a number"),
        ({"lora": {"alpha": float("nan")}}, "config.lora.alpha is nan"),
        ({"compression": {"coarse": 1}}, "config.compression.coarse is 1, not true or false"),
        ({"compression": {"rates": 16}}, "config.compression.rates is 16; expected a list"),
        ({"compression": 3}, "config.compression is 3; expected an object"),
    ],
)
def test_wrong_entries_of_a_file_are_refused_with_their_place(change, message):
    with pytest.raises(ConfigError, match=message):
        overrides.from_dict(c.Config, overrides.to_dict(c.Config()) | change)


def test_overrides_are_typed_by_the_setting():
    words = [
        "train.steps=1_000", "optimizer.learning_rate=2e-3", "compression.fine=False", "compression.rates=4,8,",
        "data.train=a=b.jsonl,c.jsonl", "model.path=/x y", "lora.alpha=3", "train.output=",
    ]  # fmt: skip
    config = overrides.override(c.Config(), words)
    assert config.train.steps == 1000
    assert config.optimizer.learning_rate == 2e-3
    assert config.compression.fine is False
    assert config.compression.rates == (4, 8)
    assert config.data.train == ("a=b.jsonl", "c.jsonl")
    assert config.model.path == "/x y"
    assert config.lora.alpha == 3.0 and isinstance(config.lora.alpha, float)
    assert dataclasses.replace(config, train=dataclasses.replace(config.train, steps=1)).train.output == ""
    assert overrides.override(CHANGED, []) == CHANGED


def test_overrides_that_need_each_other_go_together():
    # Each alone would be refused: 6 is no multiple of 4, and 64 none of 5.
    config = overrides.override(
        c.Config(optimizer=c.Optimizer(accumulate=4)), ["train.batch_size=10", "optimizer.accumulate=5"]
    )
    assert (config.train.batch_size, config.optimizer.accumulate) == (10, 5)


@pytest.mark.parametrize(
    "word, message",
    [
        ("train.steps", "not an override; write path=value"),
        ("train.stepz=1", "no setting 'train.stepz'; the nearest are train.steps"),
        ("steps=1", "no setting 'steps'.*train.steps"),
        ("name=x", "no setting 'name'"),
        ("train=1", "no setting 'train'"),
        ("=1", "no setting ''"),
        ("train.steps=ten", "train.steps=ten is not a whole number"),
        ("train.steps=1e3", "train.steps=1e3 is not a whole number"),
        ("lora.alpha=x", "lora.alpha=x is not a number"),
        ("lora.alpha=inf", "lora.alpha is inf"),
        ("compression.fine=yes", "compression.fine is 'yes'; it can be 'true', 'false'"),
        ("compression.rates=4,x", "compression.rates=x is not a whole number"),
        ("compression.rates=", "compression.rates is empty"),
        ("train.steps=0", "train.steps is 0"),
    ],
)
def test_wrong_overrides_are_refused_with_what_would_do(word, message):
    with pytest.raises(ConfigError, match=message):
        overrides.override(c.Config(), [word])


@pytest.fixture
def toy_configs(tmp_path, monkeypatch):
    """comi_jax.configs replaced by a folder with the one config ``toy``."""
    (tmp_path / "toy.py").write_text(
        "from comi_jax.config import Config, Train\n\n\ndef get_config():\n    return Config(train=Train(steps=3))\n"
    )
    package = types.ModuleType("comi_jax.configs")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "comi_jax.configs", package)
    monkeypatch.setattr(comi_jax, "configs", package)
    monkeypatch.delitem(sys.modules, "comi_jax.configs.toy", raising=False)


def test_load_names_the_config_and_applies_overrides(toy_configs):
    config = overrides.load("toy", ["train.batch_size=8"])
    assert (config.name, config.train.steps, config.train.batch_size) == ("toy", 3, 8)
    sys.modules.pop("comi_jax.configs.toy")


def test_an_unknown_config_is_refused_with_the_nearest_and_all(toy_configs):
    with pytest.raises(ConfigError, match="there is no config 'toyy'; the nearest are toy; there are: toy"):
        overrides.load("toyy")


def test_every_config_that_is_shipped_loads_and_survives_its_file():
    names = [module.name for module in pkgutil.iter_modules(comi_jax.configs.__path__)]
    assert names
    for name in names:
        config = overrides.load(name)
        assert config.name == name
        assert overrides.from_dict(c.Config, overrides.to_dict(config)) == config
