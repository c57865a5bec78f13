"""Every setting of a run with its default, as frozen dataclasses; ``checks`` has their limits.

The letters of array shapes, used in annotations, einsums and name suffixes:

    B batch           C contexts of a batch     G segments of a context
    X context tokens, S of a segment            Q query tokens      A answer tokens
    M groups, which are the memory slots        T tokens of a row   L layers         V vocabulary
    D model width     N query heads             K key/value heads   H head width     F feed-forward width
    R rank of a low-rank adapter

The tests check annotated shapes in every call. Containers are marked ``no_type_check``, because JAX also builds them
with other leaves than arrays (shardings, abstract shapes).

A config file ``configs/<name>.py`` has one function, ``get_config() -> Config``. ``overrides.load("qwen2",
["train.steps=10"])`` imports it and applies typed overrides.
"""

from dataclasses import dataclass, field
from typing import Any

from comi_jax import checks
from comi_jax.backbone import Backbone
from comi_jax.checks import require


@dataclass(frozen=True)
class Compression:
    """COMI's settings (docs/method.md: the paper's section 4, and the switches of its Table 2)."""

    rates: tuple[int, ...] = (16, 32)  # training draws one per example; answering uses the first by default
    encoder_layers: int = 8
    lsa_layers: int = 1
    segment_size: int = 32_768  # context tokens that are encoded and compressed together
    coarse: bool = True  # re-allocate group sizes by MIG; off: near-equal groups
    fine: bool = True  # merge a group's tokens by softmax(MIG); off: plain mean
    coarse_redundancy: bool = True
    fine_redundancy: bool = True
    lsa: bool = True
    exact_groups: bool = False  # with coarse off: groups of exactly the rate, the last one shorter, as in GMSA
    alpha_coarse: float = 1.0
    beta_coarse: float = 1.0
    alpha_fine: float = 1.0
    beta_fine: float = 1.0
    # The query vector is encoded after the context, as in the paper; off: alone, and documents keep states only.
    query_reads_context: bool = True
    learn_mig: bool = False  # train the four scalars above (the coarse two have no gradient: sizes are integers)

    def __post_init__(self):
        checks.compression(self)

    def segments(self, context: int) -> list[int]:
        """The lengths of the segments of a context of ``context`` tokens."""
        return [min(self.segment_size, context - first) for first in range(0, context, self.segment_size)]

    def check(self, backbone: Backbone) -> None:
        """Raises ConfigError if a layer count exceeds the number of layers of ``backbone``."""
        for name in ("encoder_layers", "lsa_layers"):
            require(
                getattr(self, name) <= backbone.num_hidden_layers,
                f"compression.{name} is {getattr(self, name)}; the backbone has {backbone.num_hidden_layers} layers",
            )


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on the decoder's W_Q W_K W_V W_O. Rank 0 trains these matrices themselves, as in the paper."""

    rank: int = 0
    alpha: float = 32.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q", "k", "v", "o")

    def __post_init__(self):
        checks.lora(self)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 0.0


@dataclass(frozen=True)
class Gmsa:
    """Settings of system=gmsa (docs/baselines.md)."""

    autoencoding: float = 1 / 3  # fraction of train.steps in which the context is reconstructed from its memory

    def __post_init__(self):
        checks.gmsa(self)


@dataclass(frozen=True)
class Icae:
    """Settings of system=icae (docs/baselines.md): memory tokens of a segment, and the encoder's adapters."""

    autoencoding: float = 1 / 3  # fraction of train.steps in which the context is reconstructed from its memory
    memory_tokens: int = 128  # learned embeddings: the most memory vectors that a segment can have
    rank: int = 128
    alpha: float = 32.0
    dropout: float = 0.05

    def __post_init__(self):
        checks.icae(self)

    @property
    def lora(self) -> Lora:
        """The encoder's adapters."""
        return Lora(self.rank, self.alpha, self.dropout)


@dataclass(frozen=True)
class Beacon:
    """Settings of system=beacon (docs/baselines.md)."""

    # Context tokens that beacons are interleaved with at a time; an unfinished last window stays as it is.
    window: int = 1024

    def __post_init__(self):
        checks.beacon(self)


@dataclass(frozen=True)
class Model:
    path: str = ""  # Hugging Face folder of the pretrained backbone, a COMI run, or "tiny" for the bundled model
    hub: str = ""  # where that folder is published, for the message when it is missing
    made_by: str = ""  # or the command that makes it
    tokenizer: str = ""  # folder of the tokenizer; empty: model.path
    ignore_config: tuple[str, ...] = ()  # unknown attributes of that folder's config.json that compute nothing
    attention: str = ""  # attention implementation (cudnn and splash take no KV cache); empty: chosen by the backend
    kernels: str = ""  # implementation of the compression kernels; empty: chosen by the backend
    dtype: str = "bfloat16"  # of activations and frozen weights; trained weights are float32
    # What the backward pass recomputes in a block: nothing ("off"), all but matrix products and attention ("products"),
    # the feed-forward layer too ("projections"), everything but attention ("attention"), everything ("full"), as
    # "attention" with the kept arrays in host memory ("offload"), or the least of these, but the last, that fits the
    # devices' memory by estimate ("auto").
    remat: str = "auto"

    def __post_init__(self):
        checks.model(self)

    @staticmethod
    def upgraded(values: dict[str, Any]) -> dict[str, Any]:
        """``values`` with the remat of older runs, true or false, as a name."""
        names = {True: "attention", False: "off", "true": "attention", "false": "off"}
        return values | {"remat": names.get(values["remat"], values["remat"])} if "remat" in values else values


@dataclass(frozen=True)
class Data:
    """The data. Each entry of ``train`` and ``eval`` is [SCHEMA:]PLACE[@WEIGHT], or generated data alone:

        train.jsonl  'part-*.jsonl.gz'   JSON Lines, plain or gzipped; a glob
        prepared/                        a folder written by comi_jax.prepare
        hotpotqa:hotpot.jsonl@0.5        a published schema; an epoch takes half of the examples (@2: each one twice)
        hf://OWNER/NAME[/CONFIG][#SPLIT] a dataset of the Hugging Face hub
        synthetic                        generated; or synthetic-documents, each with options (``data.generated``)

    Without SCHEMA, all fields of an example decide. ``comi_jax.data.sources`` reads them. Files are JSON Lines or CSV
    (plain, .gz, .bz2, .xz, .zst) or Parquet; ~ is the home folder, and a comma in a path is written ``\\,``.
    ``fields`` maps a schema of one's own:

        context:passage,question:q,answer:gold        context:article,answer:highlights        answer:answers.text

    It applies to examples that have all these fields. Without a question, the prompt asks for a summary.
    """

    train: tuple[str, ...] = ()
    eval: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    examples_per_source: int = 0  # at most, drawn by comi_jax.prepare from each entry of data.train; 0: all
    eval_examples: int = 0  # how many records of data.eval to use, from the first; 0: all
    synthetic_examples: int = 0  # how many training records are generated
    max_context: int = 32_768  # tokens
    max_query: int = 256
    max_answer: int = 64  # including the end-of-sequence token
    # A context, question or answer above its maximum: "refuse", or "truncate" (counted, reported). Contexts and answers
    # lose their end, questions their beginning.
    on_long: str = "refuse"
    skip_bad_records: bool = False
    # Lengths that contexts are padded to; longer ones are padded to whole segments. Empty: training fits at most
    # max_buckets of them to the data, answering uses 2^n and 1.5 · 2^n up to a segment.
    buckets: tuple[int, ...] = ()
    max_buckets: int = 12

    def __post_init__(self):
        checks.data(self)


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 1e-5
    schedule: str = "linear"  # decay after warm-up: "linear", "cosine" or "constant"
    warmup: float = 0.1  # fraction of all steps
    weight_decay: float = 0.01
    clip_norm: float = 1.0  # 0: no clipping
    beta1: float = 0.9
    beta2: float = 0.999
    accumulate: int = 1  # micro-batches per update; 0: as many as leave each device one context at a time

    def __post_init__(self):
        checks.optimizer(self)


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis; the axis set to 0 takes the remaining devices."""

    data: int = 0  # splits contexts, replicates weights
    fsdp: int = 1  # splits contexts and weights
    tensor: int = 1  # splits heads and the feed-forward width
    context: int = 1  # splits the tokens of a row, and weights

    def __post_init__(self):
        checks.mesh(self)


MEASURES = ("em", "f1_max", "f1_first", "acc_subspan", "acc_subspan_firstline", "rougeL")  # of evaluation.metrics


@dataclass(frozen=True)
class Train:
    output: str = ""  # folder of the run; empty: runs/<config name>
    steps: int = 1000
    batch_size: int = 64  # examples per update, over all devices and micro-batches
    # Up to this many consecutive examples with the same context are batched together, and the context is encoded once.
    # All of them share one copy of its states, keys and values.
    share_context: int = 1
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0  # evaluate on data.eval, after saving; 0: only at the end
    checkpoint_every: int = 0  # 0: only at the end. A failed save is reported; the second in a row ends the run
    keep_checkpoints: int = 2  # how many of the newest to keep, besides the best evaluated one
    best_by: str = "f1_max"  # the metric that the best checkpoint is chosen by
    max_skipped: int = 10  # consecutive steps with a non-finite loss or gradient after which the run stops
    compare_mean_pooling: bool = False  # also train group mean-pooling on the same data, for the closing table

    def __post_init__(self):
        checks.train(self, MEASURES)


@dataclass(frozen=True)
class Generation:
    """How answers are decoded. ``repetition_penalty`` acts on generated tokens only; the release uses 20 tokens and a
    penalty of 1.3."""

    max_new_tokens: int = 20
    repetition_penalty: float = 1.0
    temperature: float = 0.0  # 0: the best token; else tokens are drawn from softmax(logits / temperature)
    top_k: int = 0  # draw from the so many best tokens; 0: from all
    top_p: float = 1.0  # draw from the fewest best tokens whose probabilities sum to this
    seed: int = 0  # the same seed draws the same answer
    stop_strings: tuple[str, ...] = ()  # an answer ends before the first of them

    def __post_init__(self):
        checks.generation(self)

    @property
    def method(self) -> str:
        """The name of the decoding method."""
        return "sampling" if self.temperature else "greedy"


# The trained systems by name, with their titles in tables; model/systems.py has what each computes.
SYSTEMS = {
    "comi": "COMI",
    "full_prompt": "full prompt, tuned",
    "gmsa": "GMSA",
    "icae": "ICAE",
    "beacon": "Activation Beacon",
}


@dataclass(frozen=True)
class Config:
    name: str = ""
    system: str = "comi"  # what is trained: one of SYSTEMS
    model: Model = field(default_factory=Model)
    compression: Compression = field(default_factory=Compression)
    lora: Lora = field(default_factory=Lora)
    gmsa: Gmsa = field(default_factory=Gmsa)
    icae: Icae = field(default_factory=Icae)
    beacon: Beacon = field(default_factory=Beacon)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    mesh: Mesh = field(default_factory=Mesh)
    train: Train = field(default_factory=Train)
    generation: Generation = field(default_factory=Generation)

    def __post_init__(self):
        checks.config(self, SYSTEMS)

    @property
    def title(self) -> str:
        """The title of the trained system in tables."""
        return SYSTEMS[self.system]

    @property
    def autoencoding_steps(self) -> int:
        """The number of steps, from the first, in which the context is reconstructed from its memory."""
        fraction = {"gmsa": self.gmsa.autoencoding, "icae": self.icae.autoencoding}.get(self.system, 0.0)
        return round(fraction * self.train.steps)


def max_groups(length: int, rate: int) -> int:
    """The number of memory slots that ``length`` tokens need at ``rate`` or any higher rate (static)."""
    return -(-length // rate)


def beacons_of(beacon: Beacon, context: int, rate: int) -> tuple[int, int]:
    """The beacons of the full windows of ``context`` tokens, and the tokens of the unfinished last one."""
    windows, rest = divmod(context, beacon.window)
    return windows * max_groups(beacon.window, rate), rest


def memory_length(system: str, compression: Compression, beacon: Beacon, context: int, rate: int) -> int:
    """The most entries of the decoder's KV cache that stand for a context of ``context`` tokens."""
    if system == "full_prompt":
        return context
    if system == "beacon":
        return sum(beacons_of(beacon, context, rate))
    return sum(max_groups(segment, rate) for segment in compression.segments(context))
