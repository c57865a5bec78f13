"""A store of documents: within its bounds at every moment, and each document the same wherever it has been."""

import errno
import os
import threading

import jax
import numpy as np
import pytest
import train_fixtures

from comi_jax.errors import ConfigError
from comi_jax.model.mig import Norms
from comi_jax.runs.checksums import DamageError
from comi_jax.serving.compressor import Comi
from comi_jax.serving.documents import Document
from comi_jax.serving.segments import Contents, DocumentError, Kept, Origin, Segment, Stored
from comi_jax.serving.store import DEVICE, DISK, HOST, DocumentStore

quick_compilation, world = train_fixtures.quick_compilation, train_fixtures.world

ORIGIN = Origin("a model", "weights", "tokenizer", "float32", 32)


def segment(seed, tokens):
    """A segment of random arrays, in host memory."""
    draw = np.random.default_rng(seed).standard_normal
    norms = Norms(*draw((2, tokens)).astype(np.float32))
    kept = Kept(Stored(draw((tokens, 4)).astype(np.float32)), None, None, norms)
    return Segment(np.arange(tokens, dtype=np.int32) + seed % 1000, None, kept)


def document(seed, tokens):
    """A document without a model: what is appended, "SEED TOKENS", is a segment of random arrays too."""

    def encode(text, characters, before):
        seed, tokens = map(int, text.split())
        return [segment(seed, tokens)], False

    return Document(Contents(ORIGIN, (segment(seed, tokens),), 1, False), encode)


def content(document):
    """All that a question reads."""
    return [(s.ids.tobytes(), *(np.asarray(x).tobytes() for x in jax.tree.leaves(s.kept))) for s in document.segments]


def size(tokens):
    return 24 * tokens


class World:
    """A store beside a plain dictionary of what its documents must be; every operation checks both."""

    def __init__(self, folder, seed):
        budget, host = size(40), size(25)
        self.moves, self.full = [], False
        self.store = DocumentStore(budget, host, folder, self.told)
        self.expected, self.last, self.folder = {}, [], folder
        self.rng = np.random.default_rng(seed)
        self.bounds = {DEVICE: budget, HOST: host}

    def told(self, message):
        self.moves.append(message)
        self.check_bounds()

    def check_bounds(self):
        for place, most in self.bounds.items():
            assert self.store.used(place) <= most

    def check(self):
        self.check_bounds()
        assert self.store.names() == self.last and set(self.last) == set(self.expected)
        for name in self.last:
            arrays = [x for s in self.store._entries[name].document.segments for x in jax.tree.leaves(s.kept)]
            kind = {DEVICE: jax.Array, HOST: np.ndarray, DISK: np.memmap}[self.store.place(name)]
            assert all(isinstance(x, kind) for x in arrays)
        files = len(list(self.folder.iterdir())) if self.folder.exists() else 0
        assert files == sum(e.file is not None for e in self.store._entries.values())

    def step(self, number):
        names = list(self.expected)
        what = self.rng.choice(["put", "ask", "append", "drop", "peek"], p=[0.2, 0.45, 0.15, 0.05, 0.15])
        if what == "put" and len(names) < 12 or not names:
            what, name = "put", f"../document {number}"  # no path comes from a name
        else:
            name = names[self.rng.integers(len(names))]
        before = [(n, self.store.place(n)) for n in self.store.names()]
        try:
            getattr(self, what)(name, number)
        except DocumentError as error:
            assert "budget_bytes" in str(error) or self.full and "No space left" in str(error)
            now = [(n, self.store.place(n)) for n in self.store.names()]
            if what == "append" and self.store.place(name) == DEVICE:  # the growth failed after the document came back
                assert [n for n, _ in now if n != name] == [n for n, _ in before if n != name]
                self.last = [n for n in self.last if n != name] + [name]
            else:
                assert now == before
        self.check()

    def used(self, name):
        self.last = [n for n in self.last if n != name] + [name]

    def put(self, name, number):
        if name in self.expected:
            with pytest.raises(DocumentError, match="already"):
                self.store.put(name, document(0, 1))
            return
        made = document(number, int(self.rng.integers(1, 45)))
        want = content(made)
        self.store.put(name, made)
        self.expected[name] = want
        self.used(name)

    def ask(self, name, number):
        assert content(self.store.get(name)) == self.expected[name]
        assert self.store.place(name) == DEVICE
        self.used(name)

    def peek(self, name, number):
        """Ask through a reference that the store does not know of, without moving anything."""
        assert content(self.store._entries[name].document) == self.expected[name]

    def append(self, name, number):
        tokens = int(self.rng.integers(1, 6))
        self.store._entries[name].document.append(f"{number} {tokens}")
        self.expected[name] = [*self.expected[name], *content(document(number, tokens))]
        self.used(name)

    def drop(self, name, number):
        gone = self.store._entries[name].document
        self.store.drop(name)
        assert content(gone) == self.expected.pop(name) and gone.admit is None
        self.last.remove(name)


@pytest.mark.parametrize("operations", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_any_operations_keep_every_document_and_the_bounds(tmp_path, operations, monkeypatch):
    world = World(tmp_path / "store", seed=operations)
    write = os.fsync

    def sometimes_full(file):
        if world.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file)

    monkeypatch.setattr(os, "fsync", sometimes_full)
    for number in range(operations):
        world.full = number % 10 == 9
        world.step(number)
    said = " ".join(world.moves)
    for move in ("from device to host", "from host to disk", "from device to disk", "from disk to device"):
        assert move in said


def test_a_document_that_is_larger_than_the_budget_is_refused(tmp_path):
    store = DocumentStore(size(10), size(10), tmp_path)
    store.put("a", document(0, 9))
    with pytest.raises(DocumentError, match=r"'b' has 264 bytes, more than the store's budget_bytes, 240; raise it"):
        store.put("b", document(1, 11))
    before = content(store.get("a"))
    with pytest.raises(DocumentError, match="'a' has 264 bytes, more than"):
        store.get("a").append("5 2")
    assert content(store.get("a")) == before and store.names() == ["a"]


def test_without_a_folder_a_full_store_says_so_and_stays_as_it_is():
    store = DocumentStore(size(10), size(10))
    store.put("a", document(0, 9))
    store.put("b", document(1, 9))
    with pytest.raises(DocumentError, match="no room for the document 'c': .* drop a document, raise host_bytes"):
        store.put("c", document(2, 9))
    assert [(n, store.place(n)) for n in store.names()] == [("a", HOST), ("b", DEVICE)]
    store.drop("b")
    assert content(store.get("a")) == content(document(0, 9))


@pytest.mark.parametrize("budget, host", [(0, 1), (-1, 0), (1, -1)])
def test_bounds_that_are_none_are_refused(budget, host):
    with pytest.raises(ConfigError, match=f"budget_bytes is {budget} and its host_bytes {host}"):
        DocumentStore(budget, host)


def test_names_that_are_unknown_or_taken_and_documents_of_a_store_are_refused(tmp_path):
    store, other = DocumentStore(size(10)), DocumentStore(size(10))
    one = document(0, 3)
    store.put("a", one)
    for refused in (lambda: store.put("b", one), lambda: other.put("a", one)):
        with pytest.raises(DocumentError, match="is in a store already"):
            refused()
    with pytest.raises(DocumentError, match="has a document 'a' already; drop it first"):
        store.put("a", document(1, 3))
    for method in (store.get, store.drop, store.place):
        with pytest.raises(DocumentError, match="no document 'c'"):
            method("c")
    store.drop("a")
    other.put("a", one)
    assert len(store) == 0 and "a" in other


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "swap"])
def test_a_damaged_file_is_told_and_the_others_are_answered_as_before(tmp_path, damage):
    store = DocumentStore(size(10), 0, tmp_path)
    for seed, name in enumerate("abc"):
        store.put(name, document(seed, 9))
    files = {name: store._entries[name].file for name in "ab"}
    content_of = {name: file.read_bytes() for name, file in files.items()}
    flipped = bytearray(content_of["a"])
    flipped[len(flipped) // 2] ^= 4
    draft = tmp_path / "draft"  # in place, a mapped file would change under its reader
    draft.write_bytes({"flip": flipped, "cut": flipped[:-9], "swap": content_of["b"]}.get(damage, b""))
    if damage == "remove":
        files["a"].unlink()
        draft.unlink()
    else:
        draft.replace(files["a"])
    for _ in range(2):
        with pytest.raises(DamageError, match="the document 'a' cannot come back from disk"):
            store.get("a")
    for seed, name in ((1, "b"), (2, "c"), (1, "b")):
        assert content(store.get(name)) == content(document(seed, 9))
    store.drop("a")
    assert store.names() == ["c", "b"]


def test_a_file_that_was_damaged_while_its_document_was_away_is_written_again(tmp_path):
    store = DocumentStore(size(10), 0, tmp_path)
    store.put("a", document(0, 9))
    store.put("b", document(1, 9))
    store.get("a")
    store._entries["a"].file.unlink()
    store.get("b")
    assert content(store.get("a")) == content(document(0, 9))


def test_threads_that_use_one_store_get_their_own_documents(tmp_path):
    store = DocumentStore(size(20), size(10), tmp_path)
    for seed in range(5):
        store.put(str(seed), document(seed, 8))
    wrong = []

    def use(seed):
        for _ in range(20):
            if content(store.get(str(seed))) != content(document(seed, 8)):
                wrong.append(seed)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and store.used(DEVICE) <= size(20) and store.used(HOST) <= size(10)


def test_answers_are_the_same_wherever_a_document_has_been(world, tmp_path):
    model = Comi.load(world.run, batch_size=2)
    texts = [f"the {c} box holds a {t} ." for c, t in (("red", "key"), ("blue", "coin"), ("green", "ring"))]
    question = "what does the blue box hold ?"
    documents = model.encode(texts)
    memories = [model.compress(document, question).vectors for document in documents]
    one = documents[0].nbytes
    store = DocumentStore(one, one, tmp_path)
    for text, document in zip(texts, documents, strict=True):
        store.put(text, document)
    assert [store.place(text) for text in texts] == [DISK, HOST, DEVICE]
    for i in (0, 2, 1, 0, 1, 1, 2):
        np.testing.assert_array_equal(model.compress(store.get(texts[i]), question).vectors, memories[i])
