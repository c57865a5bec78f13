"""COMI in plain PyTorch, from the folders that ``python -m comi_jax.convert export-hf`` writes.

    python launch/replay_pytorch.py EXPORTED --context=FILE --question=TEXT [--rate=16]

Needs torch and transformers, nothing of comi_jax. It is also the documentation of the method for PyTorch users: the
encoder reads [context; question], the context's states are merged into memory vectors, the LSA aligns them, and the
decoder answers from [memory; embedded question]. Numbers in parentheses are the paper's equations (arXiv 2602.01719).
"""

import argparse
import copy
import json
import re
import types
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast


def load(folder, dtype="auto"):
    """The three models, the tokenizer and what comi.json says."""
    folder = Path(folder)
    return types.SimpleNamespace(
        **json.loads((folder / "comi.json").read_text()),
        # AutoTokenizer would put the own word splitting of some architectures in the place of what tokenizer.json says.
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder / "decoder"),
        encoder=AutoModel.from_pretrained(folder / "encoder", dtype=dtype).eval(),
        aligner=AutoModel.from_pretrained(folder / "lsa", dtype=dtype).eval(),
        decoder=AutoModelForCausalLM.from_pretrained(folder / "decoder", dtype=dtype).eval(),
    )


def token_ids(tokenizer, text):
    """The tokens of a text's letters. It is data: what looks like a control token in it (</s>, <|im_end|>) is none."""
    names = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    marks = [name for name in names if re.fullmatch(r"<.*>|\[.*\]", name.strip(), re.DOTALL)]
    reader = copy.deepcopy(tokenizer.backend_tokenizer)
    reader.add_special_tokens(marks)  # many models have some that are not said to be special
    reader.encode_special_tokens = True
    reader.no_truncation()
    ids = reader.encode(text.removeprefix("\ufeff"), add_special_tokens=False).ids
    never = {*tokenizer.all_special_ids, *(names[name] for name in marks)} - {tokenizer.unk_token_id}
    if found := never.intersection(ids):
        raise ValueError(f"this tokenizer cannot read {tokenizer.convert_ids_to_tokens(list(found))} as letters")
    return torch.tensor(ids)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def redundancy(units):
    """The largest cosine of each vector to another one; 0 for one alone."""
    if len(units) < 2:
        return units.new_zeros(len(units))
    return (units @ units.T).fill_diagonal_(-torch.inf).max(dim=1).values


def gain(relevance, units, alpha, beta, use_redundancy):
    """(1) Marginal information gain."""
    return alpha * relevance - beta * redundancy(units) * use_redundancy


def group_sizes(relevance, units, rate, model):
    """(4)-(6) A size for each of ceil(n / rate) groups; they sum to n."""
    n, scalars = len(units), model.scalars
    if not model.switches["coarse"]:
        groups = max(1, round(n / rate))
        return [n // groups + (i < n % groups) for i in range(groups)]
    chosen = [first + int(part.argmax()) for first, part in zip(range(0, n, rate), relevance.split(rate), strict=True)]
    if len(chosen) == 1:
        return [n]
    alpha, beta = scalars["alpha_coarse"], scalars["beta_coarse"]
    gains = gain(relevance[chosen], units[chosen], alpha, beta, model.switches["coarse_redundancy"])
    quota = n * torch.softmax(-gains, dim=0)
    sizes = quota.floor().long()
    largest_fraction_first = torch.argsort(-(quota - sizes), stable=True)
    sizes[largest_fraction_first[: n - int(sizes.sum())]] += 1
    return sizes.tolist()


def compress(states, query, rate, model):
    """Context states [n, d] and the query vector [d] to memory vectors, one for each group that is not empty."""
    states, query = states.float(), query.float()
    units = unit(states)
    relevance = units @ unit(query)
    sizes = [size for size in group_sizes(relevance, units, rate, model) if size]
    alpha, beta = model.scalars["alpha_fine"], model.scalars["beta_fine"]
    memory = []
    for group in torch.arange(len(states)).split(sizes):
        gains = gain(relevance[group], units[group], alpha, beta, model.switches["fine_redundancy"])
        weights = torch.softmax(gains if model.switches["fine"] else torch.zeros_like(gains), dim=0)
        memory.append(weights @ states[group])  # (7), (8)
    return torch.stack(memory)


@torch.no_grad()
def remember(model, context_ids, question_ids, rate):
    """Token ids to the memory that the decoder reads, segment by segment."""
    memory = []
    for segment in context_ids.split(model.segment_size):
        states = model.encoder(torch.cat([segment, question_ids])[None]).last_hidden_state[0]
        query = states[len(segment) :].float().mean(dim=0)  # (3)
        vectors = compress(states[: len(segment)], query, rate, model).to(states.dtype)
        if model.switches["lsa"]:
            vectors = model.aligner(inputs_embeds=vectors[None]).last_hidden_state[0]
        memory.append(vectors)
    return torch.cat(memory)


@torch.no_grad()
def answer(model, contexts, questions, rate=None, max_new_tokens=None):
    """The greedy answers to several questions, each from its own context: token ids, and the memories they were read
    from. Rows of unlike length are padded on the left, where the attention mask hides the padding."""
    ids = [[token_ids(model.tokenizer, text) for text in pair] for pair in zip(contexts, questions, strict=True)]
    memories = [remember(model, context, question, rate or model.rates[0]) for context, question in ids]
    embed = model.decoder.get_input_embeddings()
    prompts = [torch.cat([m.to(embed.weight.dtype), embed(q)]) for m, (_, q) in zip(memories, ids, strict=True)]
    width = max(map(len, prompts))
    rows = torch.stack([torch.nn.functional.pad(prompt, (0, 0, width - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(prompt) for prompt in prompts]).long()
    length = max_new_tokens or model.generation["max_new_tokens"]
    end = model.tokens["stop"][0]
    out = model.decoder.generate(
        inputs_embeds=rows, attention_mask=mask, max_new_tokens=length, do_sample=False, pad_token_id=end
    )
    return out, memories


def main():
    parser = argparse.ArgumentParser(description="Answer a question from a compressed text, in PyTorch.")
    parser.add_argument("folder", help="written by python -m comi_jax.convert export-hf")
    parser.add_argument("--context", required=True, type=Path, nargs="+", help="text files, one for each question")
    parser.add_argument("--question", required=True, nargs="+")
    parser.add_argument("--rate", type=int, help="context tokens per memory vector")
    given = parser.parse_args()
    model, contexts = load(given.folder), [path.read_text(encoding="utf-8") for path in given.context]
    rows, memories = answer(model, contexts, given.question, given.rate)
    for ids, memory in zip(rows, memories, strict=True):
        print(model.tokenizer.decode(ids, skip_special_tokens=True).strip())
        print(f"[{len(memory)} memory vectors]")


if __name__ == "__main__":
    main()
