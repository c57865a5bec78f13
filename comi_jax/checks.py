"""The limits of every setting: one function for each section of ``config``, called when the section is built.

A section comes as ``Any``, because ``config`` imports this file.
"""

import dataclasses
import difflib
import math
import reprlib
from collections.abc import Mapping
from typing import Any

from comi_jax.errors import ConfigError


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxlong = _SHOWN.maxother = 80


def shown(value: Any) -> str:
    """A short, printable ``repr`` for messages, however large or deeply nested ``value`` is."""
    return _SHOWN.repr(value)


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    require(value in choices, f"{name} is {shown(value)}; it can be {', '.join(map(repr, choices))}")


def check_autoencoding(name: str, fraction: float) -> None:
    require(0.0 <= fraction < 1.0, f"{name} is {fraction}; it is a fraction of all steps, in [0, 1)")


def compression(given: Any) -> None:
    require(bool(given.rates), "compression.rates is empty; give at least one rate, e.g. 16,32")
    for rate in given.rates:
        require(rate >= 1, f"compression.rates holds {rate}; a rate is a whole number of at least 1")
    require(given.encoder_layers >= 1, f"compression.encoder_layers is {given.encoder_layers}; at least 1 is needed")
    require(
        given.lsa_layers >= 1, f"compression.lsa_layers is {given.lsa_layers}; at least 1 (or compression.lsa=false)"
    )
    require(
        given.segment_size >= max(given.rates),
        f"compression.segment_size is {given.segment_size}, below the largest rate {max(given.rates)}: "
        "a segment would be less than one group",
    )
    require(
        not (given.coarse and given.exact_groups),
        "compression.exact_groups=true sizes groups by the rate alone; set compression.coarse=false with it",
    )


def lora(given: Any) -> None:
    require(given.rank >= 0, f"lora.rank is {given.rank}; it is 0 (off) or positive")
    require(math.isfinite(given.alpha), f"lora.alpha is {given.alpha}; it must be finite")
    require(
        bool(given.targets) and set(given.targets) <= set("qkvo") and len(set(given.targets)) == len(given.targets),
        f"lora.targets is {','.join(given.targets)!r}; give some of q,k,v,o, each once",
    )
    require(0.0 <= given.dropout < 1.0, f"lora.dropout is {given.dropout}; it must lie in [0, 1)")


def gmsa(given: Any) -> None:
    check_autoencoding("gmsa.autoencoding", given.autoencoding)


def icae(given: Any) -> None:
    check_autoencoding("icae.autoencoding", given.autoencoding)
    for name in ("memory_tokens", "rank"):
        require(getattr(given, name) >= 1, f"icae.{name} is {getattr(given, name)}; it must be at least 1")
    require(math.isfinite(given.alpha), f"icae.alpha is {given.alpha}; it must be finite")
    require(0.0 <= given.dropout < 1.0, f"icae.dropout is {given.dropout}; it must lie in [0, 1)")


def beacon(given: Any) -> None:
    require(given.window >= 1, f"beacon.window is {given.window}; it must be at least 1")


def model(given: Any) -> None:
    one_of("model.dtype", given.dtype, ("float32", "bfloat16"))
    one_of("model.attention", given.attention, ("", "dense", "blocked", "cudnn", "splash"))
    one_of("model.kernels", given.kernels, ("", "xla", "tpu", "gpu", "interpret"))
    require(
        given.dtype == "bfloat16" or given.attention not in ("cudnn", "splash"),
        f"model.attention={given.attention} needs bfloat16, but model.dtype is {given.dtype}; change one of them",
    )
    one_of("model.remat", given.remat, ("auto", "off", "products", "projections", "attention", "full", "offload"))


def data(given: Any) -> None:
    one_of("data.on_long", given.on_long, ("refuse", "truncate"))
    parts = [word.partition(":")[0] for word in given.fields if word.partition(":")[2]]
    require(
        sorted(parts) in ([], ["answer", "context"], ["answer", "context", "question"])
        and len(parts) == len(given.fields),
        f"data.fields is {shown(','.join(given.fields))}; say once each where context, question and answer stand, "
        "e.g. context:passage,question:q,answer:gold",
    )
    for name in ("max_context", "max_query", "max_answer", "max_buckets"):
        require(getattr(given, name) >= 1, f"data.{name} is {getattr(given, name)}; it must be at least 1")
    for name in ("examples_per_source", "eval_examples", "synthetic_examples"):
        require(getattr(given, name) >= 0, f"data.{name} is {getattr(given, name)}; it must not be negative")
    require(
        tuple(sorted(set(given.buckets))) == given.buckets and all(b > 0 for b in given.buckets),
        f"data.buckets is {given.buckets}; give rising positive lengths",
    )


def optimizer(given: Any) -> None:
    one_of("optimizer.schedule", given.schedule, ("linear", "cosine", "constant"))
    require(given.learning_rate > 0, f"optimizer.learning_rate is {given.learning_rate}; it must be positive")
    require(0.0 <= given.warmup < 1.0, f"optimizer.warmup is {given.warmup}; it is a fraction of all steps, in [0, 1)")
    for name in ("weight_decay", "clip_norm"):
        require(getattr(given, name) >= 0, f"optimizer.{name} is {getattr(given, name)}; it must not be negative")
    for name in ("beta1", "beta2"):
        require(0.0 <= getattr(given, name) < 1.0, f"optimizer.{name} is {getattr(given, name)}; it must lie in [0, 1)")
    require(given.accumulate >= 0, f"optimizer.accumulate is {given.accumulate}; it must be at least 1, or 0")


def mesh(given: Any) -> None:
    sizes = dataclasses.astuple(given)
    require(min(sizes) >= 0 and sizes.count(0) <= 1, f"mesh sizes must be positive, and at most one of them 0: {given}")


def train(given: Any, measures: tuple[str, ...]) -> None:
    for name in ("steps", "batch_size", "share_context", "log_every", "keep_checkpoints", "max_skipped"):
        require(getattr(given, name) >= 1, f"train.{name} is {getattr(given, name)}; it must be at least 1")
    for name in ("eval_every", "checkpoint_every"):
        require(getattr(given, name) >= 0, f"train.{name} is {getattr(given, name)}; it is 0 (at the end) or more")
    require(0 <= given.seed < 2**32, f"train.seed is {given.seed}; it is a whole number from 0 to 2**32 - 1")
    one_of("train.best_by", given.best_by, measures)


MAX_STOP_STRINGS = 16


def generation(given: Any) -> None:
    require(given.max_new_tokens >= 1, f"generation.max_new_tokens is {given.max_new_tokens}; at least 1 is needed")
    require(
        0 < given.repetition_penalty < math.inf,
        f"generation.repetition_penalty is {given.repetition_penalty}; it must be positive, and 1 means none",
    )
    require(
        0 <= given.temperature < math.inf,
        f"generation.temperature is {given.temperature}; it is 0 (greedy) or positive",
    )
    require(given.top_k >= 0, f"generation.top_k is {given.top_k}; it is 0 (all tokens) or positive")
    require(0 < given.top_p <= 1, f"generation.top_p is {given.top_p}; it must lie in (0, 1], and 1 means all tokens")
    require(0 <= given.seed < 2**63, f"generation.seed is {given.seed}; it is a whole number from 0 to 2**63 - 1")
    require(
        len(given.stop_strings) <= MAX_STOP_STRINGS,
        f"generation.stop_strings holds {len(given.stop_strings)} texts; give at most {MAX_STOP_STRINGS}",
    )
    require(all(given.stop_strings), "generation.stop_strings holds an empty text; every answer would end at once")


# COMI's steps, which may be off only where they exist.
SWITCHES = ("coarse", "fine", "coarse_redundancy", "fine_redundancy", "query_reads_context")


def config(given: Any, systems: Mapping[str, str]) -> None:
    nearest = ", ".join(difflib.get_close_matches(given.system, systems, cutoff=0.4))
    require(
        given.system in systems,
        f"there is no system {shown(given.system)}{'; the nearest are ' if nearest else ''}{nearest}; there are: "
        f"{', '.join(systems)}",
    )
    if given.system != "comi":
        _rival(given)
    require(
        given.compression.query_reads_context or given.mesh.context == 1,
        f"compression.query_reads_context=false is for contexts on one device each, and mesh.context is "
        f"{given.mesh.context}; set mesh.context=1",
    )
    require(
        given.train.batch_size % (max(given.optimizer.accumulate, 1) * given.train.share_context) == 0,
        f"train.batch_size {given.train.batch_size} is not a multiple of optimizer.accumulate "
        f"{given.optimizer.accumulate or 1} x train.share_context {given.train.share_context}",
    )


def _rival(given: Any) -> None:
    """Refuse settings that only COMI has."""
    off = [f"compression.{name}=false" for name in SWITCHES if not getattr(given.compression, name)]
    off += ["compression.lsa=false"] * (given.system != "gmsa" and not given.compression.lsa)
    set_true = [f"compression.{n}=true" for n in ("learn_mig", "exact_groups") if getattr(given.compression, n)]
    for word in off + set_true:
        raise ConfigError(f"{word} changes COMI, not system={given.system}; leave one of them out")
    require(
        given.system != "beacon" or given.beacon.window >= max(given.compression.rates),
        f"beacon.window is {given.beacon.window}, below the largest rate {max(given.compression.rates)}: a window "
        "would be less than one group of tokens; raise it",
    )
    require(
        given.mesh.context == 1,
        f"mesh.context is {given.mesh.context}, but system={given.system} cannot split the tokens of a row over "
        "devices; set mesh.context=1",
    )
