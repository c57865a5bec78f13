"""``python -m comi_jax.answer``: a conversation, files of questions, several texts; one sentence for what cannot be."""

import builtins
import io
import json
import re

import pytest
import train_fixtures

from comi_jax import answer
from comi_jax.serving.compressor import Comi

quick_compilation, world = train_fixtures.quick_compilation, train_fixtures.world

TEXTS = ["the red box holds a key .", "the blue box holds a coin .", "the green box holds a ring ."]
QUESTIONS = ["what does the red box hold ?", "what holds a coin ?"]


@pytest.fixture
def texts(tmp_path):
    """A folder with two files, one of them deeper down, and a file beside it."""
    (tmp_path / "folder" / "below").mkdir(parents=True)
    (tmp_path / "folder" / "a.txt").write_text(TEXTS[0], encoding="utf-8")
    (tmp_path / "folder" / "below" / "b.md").write_text(TEXTS[1], encoding="utf-8")
    (tmp_path / "folder" / ".hidden").write_bytes(b"\xff")
    (tmp_path / "c.txt").write_text(TEXTS[2], encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def answers(world):
    """To both questions about all three texts, at two rates."""
    model = Comi.load(world.run)
    context = "\n".join(TEXTS)
    return {rate: model.answer([context] * 2, QUESTIONS, rate=rate) for rate in (2, 4)}


def command(world, texts, *more):
    answer.main([f"--checkpoint={world.run}", "--context", str(texts / "folder"), str(texts / "c.txt"), *more])


def test_questions_of_a_file_are_answered_in_lines(world, texts, answers, capsys):
    (texts / "questions.jsonl").write_text(f'"{QUESTIONS[0]}"\n\n{json.dumps({"question": QUESTIONS[1]})}\n')
    command(world, texts, f"--questions={texts / 'questions.jsonl'}", "--rate=4")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        {
            "question": question,
            "answer": said.text,
            "finish_reason": said.finish_reason,
            "context_tokens": said.context_tokens,
            "memory_vectors": said.memory_vectors,
            "rate": 4,
        }
        for question, said in zip(QUESTIONS, answers[4], strict=True)
    ]


def test_a_conversation(world, texts, answers, capsys, monkeypatch):
    """What is wrong with one line is told, and the next one is answered."""
    typed = [QUESTIONS[0], "/rate 4", "/rate x", "/rat 4", "  ", QUESTIONS[1], "what " * 600, "/quit", QUESTIONS[0]]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(typed)))
    command(world, texts)
    printed = capsys.readouterr()
    said = [line for line in printed.out.replace("> ", "").splitlines() if line]
    assert said == [answers[2][0].text, answers[4][1].text]
    assert printed.err.count("first token after") == 2 and f"in {answers[4][1].memory_vectors} memory" in printed.err
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert [error.split(";")[0] for error in errors[:2]] == ["error: the rate is x", "error: there is no command /rat"]
    assert "the question has 600 tokens" in errors[2] and len(errors) == 3
    assert printed.err.count("[encoded 21 tokens in ") == 1  # for all questions


def test_explain_writes_the_page_of_the_last_question(world, texts, answers, capsys, monkeypatch):
    """At the rate that it was answered at; a page is not written over, and what cannot be is told."""
    monkeypatch.chdir(texts)
    typed = ["/explain", QUESTIONS[0], "/rate 4", QUESTIONS[1], "/rate 2", "/explain", "/explain", "/explain x.html",
             "/explain no/x.html", "/explain folder", "/rate 1", QUESTIONS[1], "/explain", "/quit"]  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(typed)))
    command(world, texts)
    printed = capsys.readouterr().err
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 4 and "there is no question to explain yet" in errors[0]
    assert "no/x.html cannot be written" in errors[1] and "folder cannot be written" in errors[2]
    assert "at rate 1 nothing is compressed" in errors[3]
    names = ["explanation_1.html", "explanation_2.html", "x.html"]
    assert sorted(path.name for path in texts.glob("*.html")) == names
    for name in names:
        assert f"at rate 4: {(texts / name).resolve()}]" in printed
    shown = re.search(r"<script [^>]*application/json[^>]*>(.*?)</script>", (texts / "x.html").read_text(), re.DOTALL)
    (view,) = json.loads(shown[1])["views"]
    want = answers[4][1]
    assert (view["question"], view["rate"], view["answer"]) == (QUESTIONS[1], 4, want.text)
    assert view["memory_vectors"] == want.memory_vectors and json.loads(shown[1])["text"] == "\n".join(TEXTS)


def test_ctrl_c_leaves_the_answer_and_then_the_conversation(world, texts, answers, capsys, monkeypatch):
    typed = iter([QUESTIONS[0], QUESTIONS[1]])

    def type_in(prompt):
        try:
            return next(typed)
        except StopIteration:
            raise KeyboardInterrupt from None

    def interrupted(*given, **options):
        monkeypatch.undo()
        monkeypatch.setattr(builtins, "input", type_in)
        raise KeyboardInterrupt

    monkeypatch.setattr(builtins, "input", type_in)
    monkeypatch.setattr(Comi, "stream", interrupted)
    command(world, texts)
    assert [line for line in capsys.readouterr().out.splitlines() if line] == [answers[2][1].text]


def test_options_of_decoding_reach_the_answer(world, texts, capsys):
    model = Comi.load(world.run)
    options = {"temperature": 2.0, "top_k": 20, "top_p": 0.95, "seed": 1, "stop_strings": ["ring"]}
    want = model.answer("\n".join(TEXTS), QUESTIONS[1], max_new_tokens=8, **options)
    flags = ["--temperature=2", "--top-k=20", "--top-p=0.95", "--seed=1", "--stop=ring", "--max-new-tokens=8"]
    command(world, texts, f"--question={QUESTIONS[1]}", *flags)
    assert capsys.readouterr().out == want.text + "\n"


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "--questions=.* holds no question; give a line for each"),
        ("{", "questions.jsonl, line 1 is not JSON"),
        ('"a"\n{"prompt": "b"}', "questions.jsonl, line 2 holds no question"),
        ("[1]", "line 1 holds no question"),
        ('""', "line 1 holds no question"),
        (b"\xff", "cannot be read as UTF-8 text"),
    ],
)
def test_a_file_of_no_questions_is_refused(world, texts, content, message):
    content = content if isinstance(content, bytes) else content.encode()
    (texts / "questions.jsonl").write_bytes(content)
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        command(world, texts, f"--questions={texts / 'questions.jsonl'}")


def test_what_cannot_be_read_is_refused(world, texts):
    (texts / "empty").mkdir()
    base = [f"--checkpoint={world.run}"]
    for words, message in (
        (["--context", str(texts / "empty"), "--question=what ?"], "is a folder without files"),
        (["--context=-"], "--context=- reads standard input, where questions are typed too"),
        (
            ["--context", str(texts / "c.txt"), "--question=what ?", "--temperature=-1"],
            "generation.temperature is -1.0",
        ),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            answer.main(base + words)
