"""Ask a question about a text: ``python -m comi_jax.answer --checkpoint=DIR --context=FILE --question=TEXT``."""

import sys
from pathlib import Path

from comi_jax import cli
from comi_jax.config import ConfigError
from comi_jax.devices import compilations
from comi_jax.runs.selection import choose_step
from comi_jax.serving.compressor import Comi


def main(arguments: list[str] | None = None) -> None:
    """Answer one question about one text file."""
    parser = cli.Parser(prog="python -m comi_jax.answer", description="Ask a question about a text.")
    parser.add_argument("--checkpoint", type=cli.path, required=True, help="folder of a training run")
    parser.add_argument("--step", default="newest", help='step of the checkpoint, "best" or "newest" (default)')
    parser.add_argument("--context", type=cli.path, required=True, help="text file (UTF-8), or - for standard input")
    parser.add_argument("--question", required=True, help="passed to the model verbatim, e.g. 'Question: ... Answer:'")
    parser.add_argument("--rate", type=int, help="context tokens per memory vector")
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--repetition-penalty", type=float, help="on generated tokens; 1 is off, the release used 1.3")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="path=value",
        help="override a setting, e.g. data.on_long=truncate",
    )
    options = parser.parse_args(arguments)
    with cli.one_way_out():
        compilations.keep()
        context = _read_text(options.context)
        step = choose_step(options.checkpoint, options.step)
        model = Comi.load(options.checkpoint, overrides=options.set, step=step)
        answer = model.answer(
            context,
            options.question,
            rate=options.rate,
            max_new_tokens=options.max_new_tokens,
            repetition_penalty=options.repetition_penalty,
        )
    print(answer.text)
    print(
        f"[{answer.context_tokens} context tokens{' (truncated)' if 'context' in answer.cut else ''} in "
        f"{answer.memory_vectors} memory vectors: ratio {answer.ratio:.1f}"
        f"{'; the question lost its beginning' if 'question' in answer.cut else ''}]",
        file=sys.stderr,
    )


def _read_text(path: str) -> str:
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = content.decode("utf-8-sig")  # whatever the locale; a byte order mark is no text
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--context={path} cannot be read as UTF-8 text: {error}") from None
    if not text.strip():
        raise ConfigError(f"--context={path} is empty; give a file that holds text")
    return text


if __name__ == "__main__":
    main()
