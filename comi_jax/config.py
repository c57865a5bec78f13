"""Every setting of a run, as frozen dataclasses that refuse numbers which cannot work.

The letters of array shapes, in annotations, einsums and name suffixes:

    B batch           C contexts of a batch     G segments of a context
    X context tokens, S of a segment            Q query tokens      A answer tokens
    M groups, which are the memory slots        T tokens of a row   L layers         V vocabulary
    D model width     N query heads             K key/value heads   H head width     F feed-forward width
    R rank of a low-rank adapter

Tests check them in every call. Containers are marked ``no_type_check``: their annotations hold for the model, while JAX
also builds them with other leaves (shardings, numpy arrays).

A config file ``configs/<name>.py`` has one function, ``get_config() -> Config``. ``load("qwen2", ["train.steps=10"])``
imports it and applies typed overrides.
"""

import dataclasses
import math
import reprlib
from dataclasses import dataclass, field
from typing import Any

from comi_jax.errors import UserError


class ConfigError(UserError):
    """A setting that does not exist or cannot work; the message says which and what would."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxlong = _SHOWN.maxother = 80


def shown(value: Any) -> str:
    """``repr`` for a message: short however large or deep ``value`` is, and printable."""
    return _SHOWN.repr(value)


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    require(value in choices, f"{name} is {shown(value)}; it can be {', '.join(map(repr, choices))}")


@dataclass(frozen=True)
class Llama3Rope:
    """LLaMA-3.1's frequency scaling of rotary embeddings (Hugging Face's ``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self):
        require(
            self.factor > 0 and 0 < self.low_freq_factor < self.high_freq_factor,
            f"the backbone's rope_scaling has factor {self.factor} and frequency factors {self.low_freq_factor} and "
            f"{self.high_freq_factor}; they must be positive, and the high one above the low one",
        )


@dataclass(frozen=True)
class Backbone:
    """The shape of a causal language model, under Hugging Face's names. ``comi_jax.weights.hf_config`` reads it from a
    config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Rope | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool

    def __post_init__(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "rope_theta",
            "rms_norm_eps",
        ):
            require(getattr(self, name) > 0, f"the backbone's {name} is {getattr(self, name)}; it must be positive")
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"the backbone has {self.num_attention_heads} attention heads over {self.num_key_value_heads} key/value "
            "heads; the first must be a multiple of the second",
        )
        require(self.head_dim % 2 == 0, f"the backbone's head_dim is {self.head_dim}; rotary embeddings need it even")


@dataclass(frozen=True)
class Compression:
    """COMI's own settings (docs/method.md: the paper's section 4, and the switches of its Table 2)."""

    rates: tuple[int, ...] = (16, 32)  # training draws one per example; answering uses the first unless told
    encoder_layers: int = 8
    lsa_layers: int = 1
    segment_size: int = 32_768  # context tokens that are encoded and compressed together
    coarse: bool = True  # re-allocate group sizes by MIG; off: near-equal groups
    fine: bool = True  # merge a group's tokens by softmax(MIG); off: plain mean
    coarse_redundancy: bool = True
    fine_redundancy: bool = True
    lsa: bool = True
    alpha_coarse: float = 1.0
    beta_coarse: float = 1.0
    alpha_fine: float = 1.0
    beta_fine: float = 1.0
    learn_mig: bool = False  # train the four scalars above (the coarse two have no gradient: sizes are integers)

    def __post_init__(self):
        require(bool(self.rates), "compression.rates is empty; give at least one rate, e.g. 16,32")
        for rate in self.rates:
            require(rate >= 1, f"compression.rates holds {rate}; a rate is a whole number of at least 1")
        require(self.encoder_layers >= 1, f"compression.encoder_layers is {self.encoder_layers}; at least 1 is needed")
        require(
            self.lsa_layers >= 1, f"compression.lsa_layers is {self.lsa_layers}; at least 1 (or compression.lsa=false)"
        )
        require(
            self.segment_size >= max(self.rates),
            f"compression.segment_size is {self.segment_size}, below the largest rate {max(self.rates)}: "
            "a segment would be less than one group",
        )

    def segments(self, context: int) -> list[int]:
        """The lengths of the segments that a context of so many tokens is cut into."""
        return [min(self.segment_size, context - first) for first in range(0, context, self.segment_size)]

    def check(self, backbone: Backbone) -> None:
        """Refuse layer counts that ``backbone`` does not have."""
        for name in ("encoder_layers", "lsa_layers"):
            require(
                getattr(self, name) <= backbone.num_hidden_layers,
                f"compression.{name} is {getattr(self, name)}; the backbone has {backbone.num_hidden_layers} layers",
            )


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on the decoder's W_Q W_K W_V W_O. Rank 0 trains those matrices themselves, as the paper
    does."""

    rank: int = 0
    alpha: float = 32.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q", "k", "v", "o")

    def __post_init__(self):
        require(self.rank >= 0, f"lora.rank is {self.rank}; it is 0 (off) or positive")
        require(math.isfinite(self.alpha), f"lora.alpha is {self.alpha}; it must be finite")
        require(
            bool(self.targets) and set(self.targets) <= set("qkvo") and len(set(self.targets)) == len(self.targets),
            f"lora.targets is {','.join(self.targets)!r}; give some of q,k,v,o, each once",
        )
        require(0.0 <= self.dropout < 1.0, f"lora.dropout is {self.dropout}; it must lie in [0, 1)")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 0.0


@dataclass(frozen=True)
class Model:
    path: str = ""  # Hugging Face folder of the pretrained backbone, or "tiny" for the one the package carries
    hub: str = ""  # where that folder is published, for the message when it is missing
    tokenizer: str = ""  # folder of the tokenizer; empty: the same
    ignore_config: tuple[str, ...] = ()  # attributes of that folder's config.json that are known to compute nothing
    attention: str = ""  # implementation by name, of whole rows (cudnn and splash take no cache); empty: chosen
    kernels: str = ""  # of the compression, the same
    dtype: str = "bfloat16"  # of activations and frozen weights; trained weights are kept in float32
    # What of a block the backward pass computes again: nothing ("off"), the feed-forward layer ("projections"), all but
    # attention, all ("full"), or all but attention with what is kept in the host's memory ("offload").
    remat: str = "attention"

    def __post_init__(self):
        one_of("model.dtype", self.dtype, ("float32", "bfloat16"))
        one_of("model.attention", self.attention, ("", "dense", "blocked", "cudnn", "splash"))
        one_of("model.kernels", self.kernels, ("", "xla", "tpu", "gpu", "interpret"))
        require(
            self.dtype == "bfloat16" or self.attention not in ("cudnn", "splash"),
            f"model.attention={self.attention} computes in bfloat16, but model.dtype is {self.dtype}; change one",
        )
        one_of("model.remat", self.remat, ("off", "projections", "attention", "full", "offload"))

    @staticmethod
    def upgraded(values: dict[str, Any]) -> dict[str, Any]:
        """``values`` of runs that knew remat as true or false."""
        names = {True: "attention", False: "off", "true": "attention", "false": "off"}
        return values | {"remat": names.get(values["remat"], values["remat"])} if "remat" in values else values


@dataclass(frozen=True)
class Data:
    """What is read. A word of ``train`` or ``eval`` is [SCHEMA:]PLACE[@WEIGHT], or "synthetic" alone:

        train.jsonl  'part-*.jsonl.gz'  prepared/  hotpotqa:hotpot.jsonl@0.5  nq:nq.jsonl.gz@2  hf://OWNER/NAME#train

    a file, files by a glob, a folder that comi_jax.prepare made, a file of a published schema (which the fields tell
    where no word does) of which an epoch takes a half, or every example twice, and a dataset of the Hugging Face hub,
    hf://OWNER/NAME[/CONFIG][#SPLIT]. ``comi_jax.data.sources`` reads them. Files are JSON Lines or CSV (plain, .gz,
    .bz2, .xz, .zst) or Parquet; ~ is the home folder, and a comma in a path is written ``\\,``. ``fields`` says where
    the parts of an example stand in a schema of one's own:

        context:passage,question:q,answer:gold        context:article,answer:highlights        answer:answers.text

    Examples that have all these fields are read so; of others, their fields tell. Without a question, the prompt asks
    for a summary.
    """

    train: tuple[str, ...] = ()
    eval: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    examples_per_source: int = 0  # comi_jax.prepare draws at most so many from each word of data.train; 0: all
    eval_examples: int = 0  # the first so many of data.eval; 0: all
    synthetic_examples: int = 0  # how many records "synthetic" makes for training
    max_context: int = 32_768  # tokens
    max_query: int = 256
    max_answer: int = 64  # end-of-sequence token included
    # A context, question or answer above its maximum: "refuse", or "truncate" (counted, reported): a context and an
    # answer lose their end, a question its beginning.
    on_long: str = "refuse"
    skip_bad_records: bool = False
    buckets: tuple[int, ...] = ()  # lengths that contexts are padded to, beyond them whole segments; empty: in training
    max_buckets: int = 12  # at most so many, fitted to the data, in answering powers of two and halves up to a segment

    def __post_init__(self):
        one_of("data.on_long", self.on_long, ("refuse", "truncate"))
        parts = [word.partition(":")[0] for word in self.fields if word.partition(":")[2]]
        require(
            sorted(parts) in ([], ["answer", "context"], ["answer", "context", "question"])
            and len(parts) == len(self.fields),
            f"data.fields is {shown(','.join(self.fields))}; say once each where context, question and answer stand, "
            "e.g. context:passage,question:q,answer:gold",
        )
        for name in ("max_context", "max_query", "max_answer", "max_buckets"):
            require(getattr(self, name) >= 1, f"data.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("examples_per_source", "eval_examples", "synthetic_examples"):
            require(getattr(self, name) >= 0, f"data.{name} is {getattr(self, name)}; it must not be negative")
        require(
            tuple(sorted(set(self.buckets))) == self.buckets and all(b > 0 for b in self.buckets),
            f"data.buckets is {self.buckets}; give rising positive lengths",
        )


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 1e-5
    schedule: str = "linear"  # decay after warm-up: "linear", "cosine" or "constant"
    warmup: float = 0.1  # share of all steps
    weight_decay: float = 0.01
    clip_norm: float = 1.0  # 0: no clipping
    beta1: float = 0.9
    beta2: float = 0.999
    accumulate: int = 1  # micro-batches per update; 0: so many that a device has one context at a time

    def __post_init__(self):
        one_of("optimizer.schedule", self.schedule, ("linear", "cosine", "constant"))
        require(self.learning_rate > 0, f"optimizer.learning_rate is {self.learning_rate}; it must be positive")
        require(0.0 <= self.warmup < 1.0, f"optimizer.warmup is {self.warmup}; it is a share of all steps, in [0, 1)")
        for name in ("weight_decay", "clip_norm"):
            require(getattr(self, name) >= 0, f"optimizer.{name} is {getattr(self, name)}; it must not be negative")
        for name in ("beta1", "beta2"):
            require(
                0.0 <= getattr(self, name) < 1.0, f"optimizer.{name} is {getattr(self, name)}; it must lie in [0, 1)"
            )
        require(self.accumulate >= 0, f"optimizer.accumulate is {self.accumulate}; it must be at least 1, or 0")


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis; the one that is 0 takes all that are left."""

    data: int = 0  # contexts are split over them, weights are repeated
    fsdp: int = 1  # contexts and weights are split over them
    tensor: int = 1  # heads and feed-forward are split over them
    context: int = 1  # the tokens of a row, and weights, are split over them

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        require(min(sizes) >= 0 and sizes.count(0) <= 1, f"mesh sizes must be positive, one of them may be 0: {self}")


MEASURES = ("em", "f1_max", "f1_first", "acc_subspan", "acc_subspan_firstline", "rougeL")  # of evaluation.metrics


@dataclass(frozen=True)
class Train:
    output: str = ""  # folder of the run; empty: runs/<config name>
    steps: int = 1000
    batch_size: int = 64  # examples per update, over all devices and micro-batches
    # Up to so many neighbouring examples about one context are taken together, encoding it once. The encoder's keys and
    # values of the context are kept for each of them: with long contexts and large models that is much memory.
    share_context: int = 1
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0  # evaluate on data.eval, after saving; 0: only at the end
    checkpoint_every: int = 0  # 0: only at the end. A save that fails is told; the second in a row ends the run
    keep_checkpoints: int = 2  # the newest so many, and besides them the best evaluated one
    best_by: str = "f1_max"  # the metric of the evaluations that says which is best
    max_skipped: int = 10  # stop after so many steps in a row whose loss or gradient is not finite
    compare_mean_pooling: bool = False  # also train group mean-pooling on the same data, for the closing table

    def __post_init__(self):
        for name in ("steps", "batch_size", "share_context", "log_every", "keep_checkpoints", "max_skipped"):
            require(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("eval_every", "checkpoint_every"):
            require(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}; it is 0 (at the end) or more")
        require(0 <= self.seed < 2**32, f"train.seed is {self.seed}; it is a whole number from 0 to 2**32 - 1")
        one_of("train.best_by", self.best_by, MEASURES)


@dataclass(frozen=True)
class Generation:
    """How answers are decoded. ``repetition_penalty`` acts on generated tokens only; the release used 1.3 and 20
    tokens."""

    max_new_tokens: int = 20
    repetition_penalty: float = 1.0

    def __post_init__(self):
        require(self.max_new_tokens >= 1, f"generation.max_new_tokens is {self.max_new_tokens}; at least 1 is needed")
        require(
            self.repetition_penalty > 0, f"generation.repetition_penalty is {self.repetition_penalty}; 1 means none"
        )


@dataclass(frozen=True)
class Config:
    name: str = ""
    model: Model = field(default_factory=Model)
    compression: Compression = field(default_factory=Compression)
    lora: Lora = field(default_factory=Lora)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    mesh: Mesh = field(default_factory=Mesh)
    train: Train = field(default_factory=Train)
    generation: Generation = field(default_factory=Generation)

    def __post_init__(self):
        require(
            self.train.batch_size % (max(self.optimizer.accumulate, 1) * self.train.share_context) == 0,
            f"train.batch_size {self.train.batch_size} is not a multiple of optimizer.accumulate "
            f"{self.optimizer.accumulate or 1} x train.share_context {self.train.share_context}",
        )


def max_groups(length: int, rate: int) -> int:
    """The static number of memory slots that ``length`` tokens need at ``rate`` or any higher rate."""
    return -(-length // rate)
