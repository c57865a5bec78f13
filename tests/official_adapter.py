"""The six functions through which comi_jax is compared with golden outputs of the official release."""

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from comi_jax.config import Compression, Generation, max_groups
from comi_jax.kernels.merge import merge
from comi_jax.model import architecture, comi, encoder
from comi_jax.model import backbone as lm
from comi_jax.model import generate as generation
from comi_jax.model.architecture import Architecture
from comi_jax.model.batch import Batch
from comi_jax.model.compress import compress as compress_batch
from comi_jax.params import combine, partition
from comi_jax.weights import hf_config, official

SWITCHES = {
    "encoder_layers": "encoder_layers",
    "num_mem_fusion_layers": "lsa_layers",
    "segment_size": "segment_size",
    "coarse_grained_on": "coarse",
    "fine_grained_on": "fine",
    "redun_coarse": "coarse_redundancy",
    "redun_fine": "fine_redundancy",
    "use_transform_layer": "lsa",
}
SCALARS = {
    "alpha_select_init": "alpha_coarse",
    "beta_select_init": "beta_coarse",
    "alpha_merge_init": "alpha_fine",
    "beta_merge_init": "beta_fine",
}


@dataclass
class Model:
    params: dict
    arch: Architecture
    rate: int
    stop: tuple[int, ...]


def compress(context, query, rate, alpha_coarse, beta_coarse, alpha_fine, beta_fine):
    scalars = (alpha_coarse, beta_coarse, alpha_fine, beta_fine)
    out = jax.jit(lambda *states: _compress(*states, rate, scalars))(context, query)
    found = int(out.mask.sum())
    sizes = np.asarray(out.aux.group_sizes[0])
    return {"memory": np.asarray(out.memory[0, :found]), "group_sizes": sizes[: max_groups(len(context), rate)]}


def compress_vjp(context, query, cotangent, rate, alpha_coarse, beta_coarse, alpha_fine, beta_fine):
    scalars = (alpha_coarse, beta_coarse, alpha_fine, beta_fine)

    def memory(context, query):
        return _compress(context, query, rate, scalars).memory[0, : len(cotangent)]

    @jax.jit
    def pull(context, query, cotangent):
        return jax.vjp(memory, context, query)[1](cotangent)

    grads = pull(*(jnp.asarray(x, jnp.float32) for x in (context, query, cotangent)))
    return tuple(np.asarray(g) for g in grads)


def _compress(context, query, rate, scalars):
    context, query = (jnp.asarray(x, jnp.float32) for x in (context, query))
    named = {name: jnp.float32(value) for name, value in zip(architecture.SCALARS, scalars, strict=True)}
    lengths, rates = jnp.array([len(context)], jnp.int32), jnp.array([rate], jnp.int32)
    settings = Compression(rates=(rate,))
    return compress_batch(context[None], query[None], lengths, rates, named, settings, max_groups(len(context), rate))


def load(checkpoint, backbone, options):
    compression = Compression(
        rates=(options["merge_size"],),
        **{ours: options[theirs] for theirs, ours in SWITCHES.items() if theirs in options},
    )
    alpha = options.get("lora_alpha")
    alpha = None if alpha is None else float(alpha)
    params, arch = official.load(checkpoint, hf_config.read_config(backbone), compression, alpha)
    arch = dataclasses.replace(arch, lora=dataclasses.replace(arch.lora, dropout=0.0))
    params["mig"] |= {ours: np.float32(options[theirs]) for theirs, ours in SCALARS.items() if theirs in options}
    return Model(jax.tree.map(jnp.asarray, params), arch, options["merge_size"], hf_config.stop_tokens(backbone))


def _batch(model, input_ids, query_ids, labels):
    """The example as a batch of one."""
    return Batch(
        context=jnp.asarray(input_ids, jnp.int32)[None],
        context_length=jnp.array([len(input_ids)], jnp.int32),
        query=jnp.asarray(query_ids, jnp.int32)[None],
        query_length=jnp.array([len(query_ids)], jnp.int32),
        answer=jnp.asarray(labels, jnp.int32)[None],
        answer_length=jnp.array([len(labels)], jnp.int32),
        rate=jnp.array([model.rate], jnp.int32),
    )


@functools.partial(jax.jit, static_argnames=("arch", "rate"))
def _memory(params, arch, batch, rate):
    return comi.memory_of(params, arch, batch, rate)


@functools.partial(jax.jit, static_argnames="arch")
def _first_segment(params, arch, batch, aux):
    """Encoder states of [X; Q] of the first segment, and what its states were merged into."""
    first = batch.context[:, : arch.compression.segment_size]
    length = jnp.minimum(batch.context_length, first.shape[1])
    rows, _ = encoder.join_rows(first, length, batch.query, batch.query_length)
    x = lm.embed_tokens(params["encoder"], rows, arch.dtype)
    hidden, _ = lm.forward(params["encoder"], x, arch.backbone, runtime=arch.runtime)
    states = hidden[:, : first.shape[1]].astype(jnp.float32)
    # The softmax of log w is w: the merge of (7), (8) once more, before the LSA.
    return hidden, merge(states, jnp.log(aux.weights[:1]), aux.group[:1], aux.group_sizes.shape[1])[0]


@functools.partial(jax.jit, static_argnames="arch")
def _score(params, arch, memory, batch):
    logits = comi.answer_logits(params, arch, memory, batch)
    return logits, comi.sum_loss(logits, batch.answer, batch.answer_length)


@functools.partial(jax.jit, static_argnames=("arch", "options", "stop"))
def _continue(params, arch, memory, batch, options, stop):
    prompt = comi.prompt(params, arch, memory, batch)
    return generation.greedy(params, arch, prompt.rows, prompt.length, options, stop)


def _remember(model, batch):
    # The answer plays no part in it; one of a fixed length lets forward and generate share a compilation.
    return _memory(model.params, model.arch, batch.replace(answer=batch.answer[:, :1]), model.rate)


def forward(model, input_ids, query_ids, labels):
    batch, arch = _batch(model, input_ids, query_ids, labels), model.arch
    memory = _remember(model, batch)
    hidden, merged = _first_segment(model.params, arch, batch, memory.aux[0])
    logits, sums = _score(model.params, arch, memory, batch)
    sizes = np.asarray(memory.aux[0].group_sizes[0])
    groups = sizes.size if arch.compression.coarse else int((sizes > 0).sum())
    return {
        "encoder_hidden": np.asarray(hidden[0]),
        "group_sizes": sizes[:groups],
        "memory_before_lsa": np.asarray(merged[0, : int((sizes > 0).sum())]),
        "memory": np.asarray(memory.vectors[0, : int(memory.length[0])]),
        "answer_logits": np.asarray(logits[0]),
        "loss": np.asarray(sums.loss / sums.tokens),
    }


def grad_norms(model, input_ids, query_ids, labels):
    batch = _batch(model, input_ids, query_ids, labels)
    trained, frozen = partition(model.params, lambda path: architecture.is_trained(path, model.arch))

    def mean_loss(trained, frozen, batch):
        sums = comi.loss(combine(trained, frozen), model.arch, batch, model.rate)
        return sums.loss / sums.tokens

    grads = jax.jit(jax.grad(mean_loss))(trained, frozen, batch)
    return {name: float(np.linalg.norm(g)) for name, g in official.tensors(combine(grads), model.arch).items()}


def generate(model, input_ids, query_ids, max_new_tokens, repetition_penalty):
    batch = _batch(model, input_ids, query_ids, [0])
    options = Generation(max_new_tokens=max_new_tokens, repetition_penalty=repetition_penalty)

    out = _continue(model.params, model.arch, _remember(model, batch), batch, options, model.stop)
    return [int(i) for i in out.ids[0, : int(out.length[0])]]
