"""Ask questions about texts: ``python -m comi_jax.answer --checkpoint=DIR --context=FILE [--question=TEXT]``.

With ``--question`` one answer is printed, with ``--questions`` the answers to a file of questions as JSON Lines. With
neither, questions are read from the terminal, one a line; ``/rate N`` changes the rate, ``/explain`` writes the page of
what was kept for the last question (``comi_jax.explain``), and ``/quit`` ends.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from comi_jax import cli
from comi_jax.data.records import Record
from comi_jax.devices import compilations, sharding
from comi_jax.errors import ConfigError, UserError
from comi_jax.runs.selection import choose_step
from comi_jax.serving import explanation
from comi_jax.serving.answers import Answer
from comi_jax.serving.compressor import Comi
from comi_jax.serving.documents import Document
from comi_jax.serving.explanation_page import page
from comi_jax.serving.generation import Options
from comi_jax.serving.rates import AUTO, Rate

BATCH = 16  # questions of a file that are decoded together
AT_ONCE = 4 * BATCH  # per call; at most so many answers are lost if the process dies
HELP = (
    "a question about the text, /rate N (context tokens per memory vector, or auto), /explain [FILE] (a page of what "
    "was kept for the last question), or /quit"
)


def main(arguments: list[str] | None = None) -> None:
    """Answer one question, a file of questions, or those typed in."""
    options = _parser().parse_args(arguments)
    with cli.one_way_out():
        compilations.keep()
        if options.question is None and options.questions is None and "-" in options.context:
            raise ConfigError("--context=- reads standard input, where questions are typed too; give --question")
        questions = _read_questions(options.questions) if options.questions else []
        text = Record(tuple(cli.read_text(path) for path in cli.files(options.context)), "", ()).context_text()
        step = choose_step(options.checkpoint, options.step)
        rows = BATCH if options.questions else 1
        mesh = sharding.make_mesh(options.mesh) if options.mesh else None
        model = Comi.load(options.checkpoint, overrides=options.set, step=step, batch_size=rows, mesh=mesh)
        asked = Session(model, text, options, step)
        if options.questions:
            asked.file(questions)
        elif options.question is not None:
            asked.one(options.question)
        else:
            asked.conversation()


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="python -m comi_jax.answer", description="Ask questions about texts.")
    parser.add_argument("--checkpoint", type=cli.path, required=True, help="folder of a training run")
    parser.add_argument("--step", default="newest", help='step of the checkpoint, "best" or "newest" (default)')
    parser.add_argument(
        "--context",
        type=cli.path,
        required=True,
        nargs="+",
        help="text files (UTF-8), folders of such files, or - for standard input; several are joined by newlines",
    )
    asking = parser.add_mutually_exclusive_group()
    asking.add_argument("--question", help="passed to the model verbatim, e.g. 'Question: ... Answer:'")
    asking.add_argument(
        "--questions", type=cli.path, help='JSON Lines file, each line {"question": TEXT} or a text in quotes'
    )
    parser.add_argument("--rate", type=_rate, help="context tokens per memory vector; auto: chosen for each question")
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--repetition-penalty", type=float, help="on generated tokens; 1 is off, the release used 1.3")
    parser.add_argument("--temperature", type=float, help="0 is greedy; above, tokens are drawn")
    parser.add_argument("--top-k", type=int, help="draw from so many tokens; 0 is all")
    parser.add_argument("--top-p", type=float, help="draw from the best tokens of this total probability; 1 is all")
    parser.add_argument("--seed", type=int, help="of the draws")
    parser.add_argument("--stop", action="append", help="end the answer before this text; may be given several times")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="path=value",
        help="override a setting, e.g. data.on_long=truncate",
    )
    cli.add_mesh(parser)
    return parser


class Session:
    """Questions about one text, which is encoded once."""

    def __init__(self, model: Comi, text: str, given: argparse.Namespace, step: int):
        self.model, self.text, self.rate = model, text, given.rate
        self.account = explanation.account(model, given.checkpoint, step)
        self.context, self.seconds = _encoded(model, text)
        self.last: tuple[str, int | None] | None = None  # the question that was answered last, and its rate
        self.options: Options = {
            "max_new_tokens": given.max_new_tokens,
            "repetition_penalty": given.repetition_penalty,
            "temperature": given.temperature,
            "top_k": given.top_k,
            "top_p": given.top_p,
            "seed": given.seed,
            "stop_strings": given.stop,
        }

    def one(self, question: str) -> None:
        """Print the answer to ``question`` as it comes, and on standard error what it took."""
        stream = self.model.stream(self.context, question, rate=self.rate, **self.options)
        for piece in stream:
            print(piece, end="", flush=True)
        print(flush=True)
        if stream.answer is not None:
            self.last = question, stream.answer.rate
            print(_speed(stream.answer, stream.timings), _made_of(stream.answer), sep="\n", file=sys.stderr)

    def file(self, questions: Sequence[str]) -> None:
        """Print the answers to ``questions`` as JSON Lines."""
        for first in range(0, len(questions), AT_ONCE):
            some = questions[first : first + AT_ONCE]
            contexts: Any = [self.context] * len(some)
            answers = self.model.answer(contexts, some, rate=self.rate, **self.options)
            for question, answer in zip(some, answers, strict=True):
                print(json.dumps(_row(question, answer), ensure_ascii=False), flush=True)

    def conversation(self) -> None:
        """Answer the questions that are typed, until /quit or the end of the input. What is wrong with one question is
        told, and the next one is asked for; Ctrl-C leaves an answer."""
        print(HELP, file=sys.stderr)
        for line in _typed():
            try:
                if line.startswith("/"):
                    self._command(line)
                else:
                    self.one(line)
            except KeyboardInterrupt:
                print(flush=True)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)

    def _command(self, line: str) -> None:
        name, _, value = line.partition(" ")
        if name == "/explain":
            self._explain(value.strip())
            return
        if name != "/rate":
            raise ConfigError(f"there is no command {name}; type {HELP}")
        try:
            self.rate = _rate(value.strip())
        except argparse.ArgumentTypeError:
            raise ConfigError(
                f"the rate is {value.strip() or 'missing'}; type a whole number of at least 1 or auto: /rate 16"
            ) from None

    def _explain(self, name: str) -> None:
        """Write the page of what was kept for the last question to the file ``name``, or to the first of
        explanation_1.html, explanation_2.html, ... in this folder that does not exist."""
        if not isinstance(self.context, Document):
            explanation.check_system(self.model)
            return
        if self.last is None:
            raise ConfigError("there is no question to explain yet; ask one first")
        path = Path(cli.path(name)) if name else _free("explanation_{}.html")
        if not path.parent.is_dir() or path.is_dir():
            raise ConfigError(f"{path} cannot be written: its folder does not exist, or it is one; give another path")
        source = explanation.source_of(self.model, self.text, self.context, self.seconds)
        view = explanation.explain(self.model, source, *self.last, **self.options)
        content = page(explanation.as_json(source, [view], self.account)).encode("utf-8", "surrogatepass")
        path.write_bytes(content)
        print(f"[what was kept for {self.last[0]!r} at rate {view.rate}: {path.resolve()}]", file=sys.stderr)


def _free(pattern: str) -> Path:
    """The first file of ``pattern``, numbered from 1, that does not exist."""
    return next(path for number in itertools.count(1) if not (path := Path(pattern.format(number))).exists())


def _encoded(model: Comi, text: str) -> tuple[str | Document, float]:
    """``text`` as a document, which is encoded once for all questions, and the seconds that took; the text itself for
    other systems than COMI, which have no documents."""
    if model.architecture.system != "comi":
        return text, 0.0
    since = time.perf_counter()
    with Console(stderr=True).status(f"encoding {len(text):,} characters"):
        document = model.encode(text)
        jax.block_until_ready([segment.kept for segment in document.segments])
    took, size = time.perf_counter() - since, document.nbytes / 1e6
    print(f"[encoded {document.tokens:,} tokens in {took * 1000:,.0f} ms, {size:,.1f} MB]", file=sys.stderr)
    return document, took


def _typed() -> Iterator[str]:
    """The lines of the input that are not empty, until /quit."""
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print(flush=True)
            return
        if line == "/quit":
            return
        if line:
            yield line


def _speed(answer: Answer, timings: dict[str, float]) -> str:
    """What an answer took; a first one includes the compilation of the programs."""
    compressed, first = (f"{timings[name] * 1000:,.0f} ms" for name in ("compressed", "first token"))
    said = f"[compressed in {compressed}, first token after {first}"
    further, seconds = len(answer.tokens) - 1, timings["end"] - timings["first token"]
    return f"{said}, then {further / seconds:,.1f} tokens/s]" if further else f"{said}]"


def _made_of(answer: Answer) -> str:
    at = "" if answer.rate is None else f" at rate {answer.rate}"
    return (
        f"[{answer.context_tokens} context tokens{' (truncated)' if 'context' in answer.cut else ''} in "
        f"{answer.memory_vectors} memory vectors{at}: ratio {answer.ratio:.1f}"
        f"{'; the question lost its beginning' if 'question' in answer.cut else ''}]"
    )


def _row(question: str, answer: Answer) -> dict[str, Any]:
    return {
        "question": question,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "context_tokens": answer.context_tokens,
        "memory_vectors": answer.memory_vectors,
        "rate": answer.rate,
    } | ({"truncated": answer.cut} if answer.truncated else {})


def _rate(text: str) -> Rate:
    """A type of --rate."""
    return AUTO if text == AUTO else cli.at_least(1)(text)


def _read_questions(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--questions={path} cannot be read as UTF-8 text: {error}") from None
    questions = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}, line {number} is not JSON: {error}") from None
        question = value.get("question") if isinstance(value, dict) else value
        if not isinstance(question, str) or not question.strip():
            raise ConfigError(f'{path}, line {number} holds no question; write {{"question": "..."}} or "..."')
        questions.append(question)
    if not questions:
        raise ConfigError(f"--questions={path} holds no question; give a line for each")
    return questions


if __name__ == "__main__":
    main()
