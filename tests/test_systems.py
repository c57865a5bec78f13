"""Systems that need no training: what they choose, against plain twins; what they refuse; what they are charged."""

import dataclasses
import json
import math
import sys

import jax
import numpy as np
import pytest
import torch
import train_fixtures
from transformers import AutoModelForCausalLM

from comi_jax.config import Generation, Mesh
from comi_jax.data.encode import LengthError, token_ids
from comi_jax.data.records import Record
from comi_jax.devices import sharding
from comi_jax.errors import ConfigError
from comi_jax.evaluation import predictions
from comi_jax.evaluation.systems import SYSTEMS, check_names, llmlingua2
from comi_jax.evaluation.systems.answerer import SystemAnswerer
from comi_jax.evaluation.systems.bm25 import BM25
from comi_jax.evaluation.systems.llmlingua2 import CompressedTextError, LLMLingua2
from comi_jax.evaluation.systems.longllmlingua import SENTENCE, LongLLMLingua, ranking
from comi_jax.evaluation.systems.protocol import bucket
from comi_jax.evaluation.systems.snapkv import SnapKV
from comi_jax.evaluation.systems.streaming import Streaming
from comi_jax.evaluation.systems.texts import documents, passages
from comi_jax.evaluation.systems.truncation import Truncation
from comi_jax.model import flops
from comi_jax.overrides import load
from comi_jax.serving.language_model import LanguageModel

quick_compilation = train_fixtures.quick_compilation
OPTIONS = Generation(max_new_tokens=4)
SYSTEMS_HERE = [name for name in SYSTEMS if name not in ("llmlingua2", "snapkv_published")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return train_fixtures.language_model(tmp_path_factory.mktemp("made") / "lm", max_position_embeddings=512)


@pytest.fixture(scope="module")
def config(folder):
    return load("qwen2", [f"model.path={folder}", "model.dtype=float32", "data.max_context=400"])


@pytest.fixture(scope="module")
def model(config):
    return LanguageModel.open(config, batch_size=4)


@pytest.fixture(scope="module")
def theirs(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()


def records(facts=(3, 5, 7)):
    rows = [train_fixtures.records(1, seed=i, facts=count)[0] for i, count in enumerate(facts)]
    return [Record(tuple(row["input"]), row["prompt"], tuple(row["answer"])) for row in rows]


def answerer(name, model, config, rate=4, system=None, options=OPTIONS):
    return SystemAnswerer(name, system or SYSTEMS[name].system, model, config.data, options, rate)


def question(model, config, record):
    return answerer("original", model, config).encode([record])[0][0]


@pytest.mark.parametrize("name", SYSTEMS_HERE)
def test_an_answer_in_a_batch_is_the_answer_alone(name, model, config):
    """Contexts of 20 to 60 tokens in one batch, and the shortest in a batch of its copies, with less padding."""
    together = answerer(name, model, config)
    examples, _ = together.encode(records())
    answers = together.answer(examples)
    assert together.answer(examples[:1]) == answers[:1]
    for example, answer in zip(examples, answers, strict=True):
        budget = {"closed_book": 0, "original": len(example.context)}.get(name, -(-len(example.context) // 4))
        assert answer.account.entries == budget or (
            answer.account.entries < budget and name in ("bm25", "longllmlingua_ranking")
        )
        assert answer.context_tokens == (len(example.context) if budget else 0)


def test_the_original_prompt_gets_the_answer_of_transformers(model, theirs, config):
    examples, _ = answerer("original", model, config).encode(records())
    for example, answer in zip(examples, answerer("original", model, config).answer(examples), strict=True):
        ids = torch.tensor(np.concatenate([example.context, example.query]))[None]
        with torch.no_grad():
            for _ in range(len(answer.tokens)):
                ids = torch.cat([ids, theirs(input_ids=ids).logits[:, -1].argmax(-1)[None]], dim=1)
        assert ids[0, -len(answer.tokens) :].tolist() == list(answer.tokens)


def test_all_devices_answer_as_one(model, config):
    split = LanguageModel.open(config, batch_size=4, mesh=sharding.make_mesh(Mesh(data=2, fsdp=2)))
    for name in ("truncation_both", "snapkv", "streaming_rerotated"):
        examples, _ = answerer(name, model, config).encode(records())
        assert answerer(name, split, config).answer(examples) == answerer(name, model, config).answer(examples)
    tokens = LanguageModel.open(config, batch_size=4, mesh=sharding.make_mesh(Mesh(data=2, context=2)))
    assert answerer("original", tokens, config).answer(examples) == answerer("original", model, config).answer(examples)


# --- what is chosen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kept, expected", [("head", [0, 1, 2, 3, 4]), ("tail", [6, 7, 8, 9, 10]), ("both", [0, 1, 2, 9, 10])]
)
def test_truncation(model, config, kept, expected):
    asked = dataclasses.replace(question(model, config, records()[0]), context=np.arange(11, dtype=np.int32))
    assert Truncation(kept).select(model, asked, 5)[0].tolist() == expected
    assert Truncation(kept).select(model, asked, 11)[0].tolist() == list(range(11))


def lucene(texts, query, k1=1.5, b=0.75):
    """Lucene's BM25, word by word."""
    documents = [text.lower().split() for text in texts]
    mean = sum(map(len, documents)) / len(documents)
    scores = np.zeros(len(documents))
    for word in query.lower().split():
        having = sum(word in document for document in documents)
        for i, document in enumerate(documents):
            f = document.count(word)
            idf = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
            scores[i] += idf * f / (f + k1 * (1 - b + b * len(document) / mean))
    return scores


def test_bm25_scores():
    texts = ["a red box holds a key", "the blue box", "a b c", "red red key a", "lamp"]
    for query in ("red key a", "box box lamp", "a"):
        np.testing.assert_allclose(BM25().scores(texts, query), lucene(texts, query), rtol=1e-5)
    assert BM25().scores(texts, "unknown words").tolist() == [0.0] * 5
    assert BM25().scores(["one text"], "one")[0] > 0  # Robertson's idf is clipped to 0 here


def test_bm25_keeps_the_best_passages_in_the_order_of_the_context(model, config):
    record = Record(("the red cup .", "a blue key .", "the red pen .", "a grey key ."), "what holds grey red ?", ("x",))
    asked = question(model, config, record)

    def kept(budget, prompt):
        again = dataclasses.replace(asked, record=dataclasses.replace(record, prompt=prompt))
        return model.tokenizer.decode(BM25().select(model, again, budget)[0])

    assert kept(8, "grey red") == "the red cup . a grey key ."  # grey first; then the first of two equals
    assert kept(8, "silver") == "the red cup . a blue key ."  # without a known word: from the beginning
    assert kept(7, "grey red") == "a grey key ."  # a second one does not fit
    assert kept(16, "pen") == "the red cup . a blue key . the red pen . a grey key ."


def test_passages_are_whole_sentences_and_the_context_again(model):
    record = Record(("the red cup . a blue key . the red pen .", "a grey key ."), "what ?", ("x",))
    for size, largest, count in ((4, 9, 4), (8, 9, 3), (99, 99, 2), (1, 3, 8), (1, 4, 4)):
        found = passages(record, model.tokenizer, size, largest)
        assert len(found) == count and max(len(p.ids) for p in found) <= max(min(size, largest), min(4, largest))
        assert np.concatenate([p.ids for p in found]).tolist() == token_ids(model.tokenizer, [record.context_text()])[0]
    assert "".join(p.text for p in passages(record, model.tokenizer, 4, 9)) == record.context_text()
    assert [p.text for p in documents(record, model.tokenizer)] == [record.context[0], "\n" + record.context[1]]


def losses(theirs, ids):
    """transformers' NLL of each token but the first."""
    ids = torch.tensor(np.asarray(ids, np.int64))
    with torch.no_grad():
        scores = theirs(input_ids=ids[None]).logits[0].log_softmax(-1)
    return -scores[:-1].gather(1, ids[1:, None])[:, 0].numpy()


def test_longllmlingua_ranks_by_the_loss_of_the_question(model, theirs, config):
    record = records((7,))[0]
    asked = np.array(token_ids(model.tokenizer, [record.prompt + SENTENCE])[0], np.int32)
    found = [d.ids for d in documents(record, model.tokenizer)]
    ours, flop = ranking(model, found, asked)
    want = [losses(theirs, np.concatenate([ids, asked]))[len(ids) - 1 :].mean() for ids in found]
    np.testing.assert_allclose(ours, want, atol=1e-5)
    lengths = [len(ids) + len(asked) for ids in found]
    backbone = model.backbone
    assert flop == sum(flops.read(model.architecture, 0, n) + flops.head(backbone, n).forward for n in lengths)
    chosen, _ = LongLLMLingua(token_stage=False).select(
        model, question(model, config, record), 2 * max(map(len, found))
    )
    best, second = (found[i].tolist() for i in np.argsort(want)[:2])
    assert chosen.tolist()[: len(best) + len(second)] == best + second


def test_longllmlingua_drops_the_tokens_that_the_question_explains_least(model, theirs, config):
    """One segment, so that all losses are of uncompressed text."""
    asked = question(model, config, records((4,))[0])
    ranked = [d.ids for d in documents(asked.record, model.tokenizer)]
    ids = np.concatenate(ranked)
    plain = np.array([0, *losses(theirs, ids)])
    given = losses(theirs, np.concatenate([asked.query, ids]))[len(asked.query) - 1 :]
    scores = plain - given
    scores[0] = 0
    kept, _ = LongLLMLingua(dynamic=0.0).tokens(model, ranked, asked.query, 12)
    ends = np.cumsum([0, *map(len, ranked)])
    goal = np.floor(12 * ends / len(ids) + 0.5).astype(int)
    want = [
        ids[start + np.sort(np.argsort(-scores[start:end])[: b - a])]
        for start, end, a, b in zip(ends[:-1], ends[1:], goal[:-1], goal[1:], strict=True)
    ]
    assert kept.tolist() == np.concatenate(want).tolist() and len(kept) == 12


def test_longllmlingua_keeps_the_budget_and_more_of_better_documents():
    system = LongLLMLingua()
    for lengths, budget in (([50, 20, 30], 25), ([10] * 8, 60), ([7], 3), ([5, 400], 100)):
        ratios = system.ratios(lengths, budget)
        assert (ratios * lengths).sum() == pytest.approx(budget)
        assert all(0 <= b <= a <= 1 for a, b in zip(ratios, ratios[1:], strict=False))
    np.testing.assert_allclose(np.diff(system.ratios([30, 30, 30], 45)), [-0.3, -0.3])
    assert system.ratios([4, 4], 20).tolist() == [1, 1]


def test_longllmlingua_in_segments_keeps_the_budget(model, config):
    asked = question(model, config, records((8,))[0])
    for segment in (7, 200):
        kept, flop = dataclasses.replace(LongLLMLingua(), segment=segment).select(model, asked, 17)
        assert len(kept) == 17 and flop > 0


# --- LLMLingua-2 ------------------------------------------------------------------------------------------------------

FAKE = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    words = request["context"].split()
    text = " ".join(words[: int(len(words) * request["keep"])]) if "pen" not in words else " "
    print(json.dumps({"key": request["key"], "text": text}))
"""


# The package's interface, as of 0.2.2: without device_map it wants a GPU, and it prints while it works.
PACKAGE = """
class PromptCompressor:
    def __init__(self, model_name, device_map="cuda", use_llmlingua2=False):
        assert (model_name, device_map, use_llmlingua2) == ("a model", "cpu", True)
    def compress_prompt(self, context, rate):
        print("working")
        return {"compressed_prompt": context[: int(len(context) * rate)]}
"""


def test_the_program_of_llmlingua2_runs_without_a_gpu(tmp_path, monkeypatch):
    (tmp_path / "llmlingua.py").write_text(PACKAGE)
    (tmp_path / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: False)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    texts, wanted = tmp_path / "texts.jsonl", [{"key": "1", "context": "a red cup", "keep": 0.6}]
    llmlingua2.run([sys.executable, str(llmlingua2.PROGRAM), "a model"], wanted, texts)
    assert json.loads(texts.read_text()) == {"key": "1", "text": "a red"}


def test_llmlingua2_is_a_program_and_its_texts(model, config, tmp_path):
    texts = tmp_path / "texts.jsonl"
    rows = [
        Record(("the red cup . a blue key .",), "what ?", ("x",)),
        Record(("the red pen . a key .",), "what ?", ("x",)),
    ]
    questions = [question(model, config, row) for row in rows]
    wanted = llmlingua2.requests(questions + questions, [4, 2, 4, 2], {})
    assert [r["keep"] for r in wanted] == [0.5, 2 / 7]
    llmlingua2.run([sys.executable, "-c", FAKE], wanted, texts)
    system = LLMLingua2.open(texts)
    assert model.tokenizer.decode(system.select(model, questions[0], 4)[0]) == "the red cup ."
    assert system.refusal(questions[0], 4) == ""
    assert "left nothing of it" in system.refusal(questions[1], 2)
    assert "no compressed text" in system.refusal(questions[0], 3)
    assert "no compressed text" in LLMLingua2().refusal(questions[0], 4)
    assert (
        llmlingua2.requests(questions, [4, 3], llmlingua2.read_texts(system.texts, system.content))[0]["keep"] == 3 / 7
    )
    (answer,) = answerer("llmlingua2", model, config, 2, system).answer(questions[:1])
    assert (answer.account.entries, answer.context_tokens) == (4, 8)
    with pytest.raises(CompressedTextError, match="failed: .*exit status 3"):
        llmlingua2.run([sys.executable, "-c", "raise SystemExit(3)"], wanted, texts)
    with pytest.raises(CompressedTextError, match="no text for 2 contexts"):
        llmlingua2.run([sys.executable, "-c", "pass"], wanted, texts)
    texts.write_text('{"key": 1}\n')
    with pytest.raises(CompressedTextError, match="texts.jsonl, line 1: not a compressed text"):
        LLMLingua2.open(texts).text(questions[0], 4)


# --- accounts ---------------------------------------------------------------------------------------------------------


def test_reading_in_two_parts_costs_what_reading_at_once_does(model):
    arch = model.architecture
    assert flops.read(arch, 0, 30) + flops.read(arch, 30, 12) == pytest.approx(flops.read(arch, 0, 42))
    assert flops.read(arch, 0, 42) == flops.blocks(arch.backbone, 2, 42, (False, False)).forward


def test_accounts(model, config):
    """Of a context of n tokens and a question of q at 4x, in a model of 2 layers, 2 kv heads of 8 and 4 query heads."""
    arch, head = model.architecture, flops.head(model.backbone, 1).forward
    examples, _ = answerer("original", model, config).encode(records())
    for name in (
        "original",
        "closed_book",
        "truncation_tail",
        "streaming",
        "snapkv",
        "snapkv_reread",
        "snapkv_agnostic",
    ):
        for asked, answer in zip(examples, answerer(name, model, config).answer(examples), strict=True):
            n, q = len(asked.context), len(asked.query)
            m = -(-n // 4)
            votes = {"snapkv": (m // 2) * (n + q), "snapkv_reread": (m // 2) * (n + q), "snapkv_agnostic": (m // 2) * n}
            dense = {"snapkv": n + q, "snapkv_reread": n + q, "original": n, "closed_book": 0, "truncation_tail": m}
            cost, entries = answer.account, {"original": n, "closed_book": 0}.get(name, m)
            assert (cost.entries, cost.kv_bytes) == (entries, entries * 2 * 2 * 2 * 8 * 4)
            assert cost.ingest_flop == flops.read(arch, 0, dense.get(name, n)) + 2 * 2 * votes.get(name, 0) * 4 * 8
            last = (entries + q - 1, 1) if name == "snapkv" else (entries, q)
            assert cost.question_flop == flops.read(arch, *last) + head


def test_an_evaluation_is_resumed_and_says_what_it_cost(model, config, tmp_path, monkeypatch):
    rows = records((3, 4, 5, 6, 7, 8, 3, 5, 4))
    one = dataclasses.replace(model, batch_size=1)  # eight at a time
    asked = answerer("truncation_tail", one, config)
    answer, calls = SystemAnswerer.answer, []

    def fails(self, examples):
        calls.append(len(examples))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer(self, examples)

    monkeypatch.setattr(SystemAnswerer, "answer", fails)
    with pytest.raises(KeyboardInterrupt):
        predictions.evaluate(asked, rows, tmp_path / "out.jsonl")
    result = predictions.evaluate(asked, rows, tmp_path / "out.jsonl")
    assert calls == [8, 1, 1]
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    ratios = [line["context_tokens"] / line["memory_vectors"] for line in lines]
    assert result["account"]["ratio"] == {
        "mean": pytest.approx(np.mean(ratios)),
        "min": min(ratios),
        "max": max(ratios),
    }
    for name in ("kv_bytes", "ingest_flop", "question_flop"):
        assert result["account"][name] == pytest.approx(np.mean([line[name] for line in lines]))
    assert (result["system"], result["rate"], result["query_aware"]) == ("truncation_tail", 4, False)
    assert asked.identity != answerer("truncation_tail", one, config, rate=2).identity
    assert asked.identity != answerer("truncation_head", one, config).identity


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, rate, system, message",
    [
        ("streaming", 8, None, "streaming cannot answer . of 3 records at rate 8, the first is record 1: 3 entries"),
        ("snapkv_published", 2, None, "64 .*lower the rate"),
        ("snapkv", 2, SnapKV(kernel=4), "the pooling kernel is 4"),
        ("truncation_head", 40, None, "its context has .* tokens, fewer than the rate 40"),
        ("llmlingua2", 4, None, "there is no compressed text for it; pass --llmlingua2"),
        ("original", 4, None, "it needs .* positions, but the model has 40"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_sentence(model, config, name, rate, system, message):
    if name == "original":
        backbone = dataclasses.replace(model.backbone, max_position_embeddings=40)
        arch = dataclasses.replace(model.architecture, backbone=backbone)
        model = dataclasses.replace(model, architecture=arch)
    with pytest.raises(LengthError, match=message):
        answerer(name, model, config, rate, system).encode(records())


def test_more_that_is_refused(model, config):
    mesh = sharding.make_mesh(Mesh(data=2, context=2))
    runtime = dataclasses.replace(model.architecture.runtime, mesh=mesh)
    split = dataclasses.replace(model, architecture=dataclasses.replace(model.architecture, runtime=runtime))
    with pytest.raises(
        ConfigError, match="streaming cannot run with the tokens of a row split .* set mesh.context to 1"
    ):
        answerer("streaming", split, config)
    asked = question(model, config, records()[0])
    assert SnapKV().refusal(asked, 1) == "1 entry is fewer than a window of 1 and one more token; lower the rate"
    short = dataclasses.replace(asked, context=asked.context[:4])
    alone = SnapKV(4, query_aware=False, reread=True, narrow=False)
    assert alone.refusal(short, 4) == "its 4 tokens are not more than the window of 4; give it a longer context"
    with pytest.raises(ConfigError, match="the rate of bm25 is 0"):
        answerer("bm25", model, config, rate=0)
    with pytest.raises(ConfigError, match="no system 'snapvk'; the nearest are snapkv"):
        check_names(["bm25", "snapvk"], list(SYSTEMS))
    with pytest.raises(ConfigError, match="kept part of a truncation is 'middle'"):
        Truncation("middle")


def test_buckets():
    assert [bucket(n) for n in (1, 32, 33, 48, 49, 64, 65, 97, 129)] == [32, 32, 48, 48, 64, 64, 96, 128, 192]
    assert jax.tree.map(lambda s: s.rerotate, [Streaming(), SYSTEMS["streaming"].system]) == [True, False]
