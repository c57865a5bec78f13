"""Show what was kept of a text: ``python -m comi_jax.explain --checkpoint=DIR --context=FILE --question=TEXT``.

One page for all questions and rates, two of which are shown side by side: each token shaded by its share of its memory
vector or by its scores, the groups, and the answer. ``--json`` and ``--png`` write the same as JSON and as a picture.
"""

import argparse
import json
import sys
from pathlib import Path

from comi_jax import cli
from comi_jax.data.records import Record
from comi_jax.devices import compilations, sharding
from comi_jax.errors import ConfigError
from comi_jax.runs.selection import choose_step
from comi_jax.serving import explanation, explanation_picture
from comi_jax.serving.compressor import Comi
from comi_jax.serving.explanation import View
from comi_jax.serving.explanation_page import page
from comi_jax.serving.generation import Options


def parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    made = cli.Parser(prog="python -m comi_jax.explain", description="Show what compression kept of a text.")
    add = made.add_argument
    add("--checkpoint", type=cli.path, required=True, help="folder of a training run")
    add("--step", default="newest", help='step of the checkpoint, "best" or "newest" (default)')
    add("--context", type=cli.path, required=True, nargs="+",
        help="text files (UTF-8), folders of such, or - for standard input; joined by newlines")  # fmt: skip
    add("--question", action="append", required=True, help="passed to the model verbatim; may be given several times")
    add("--rates", type=cli.at_least(2), nargs="+", metavar="RATE",
        help="context tokens per memory vector (default: those that the run was trained with)")  # fmt: skip
    add("--output", type=cli.path, help="the page, e.g. page.html")
    add("--json", type=cli.path, help="a file for the same as JSON")
    add("--png", type=cli.path, help="a file for a picture of the first two of question and rate")
    add("--max-new-tokens", type=int)
    add("--repetition-penalty", type=float, help="on generated tokens; 1 is off, the release used 1.3")
    add("--set", action="append", default=[], metavar="path=value",
        help="override a setting, e.g. data.max_context=8192")  # fmt: skip
    cli.add_mesh(made)
    return made


def check(given: argparse.Namespace) -> None:
    """Raise ConfigError for what can be told before the model is loaded."""
    outputs = {name: getattr(given, name) for name in ("output", "json", "png") if getattr(given, name)}
    if not outputs:
        raise ConfigError("nothing would be written; give --output=page.html, --json or --png")
    for name, path in outputs.items():
        folder = Path(path).parent
        if not folder.is_dir():
            raise ConfigError(f"--{name}={path} is in {folder}, which is no folder; make it, or give another path")
        if Path(path).is_dir():
            raise ConfigError(f"--{name}={path} is a folder; give the path of a file")
    if len({Path(path).resolve() for path in outputs.values()}) < len(outputs):
        raise ConfigError("--output, --json and --png name the same file; give each its own")
    if given.png:
        explanation_picture.check()
    for question in given.question:
        if not question.strip():
            raise ConfigError("--question is empty; give it some text")


def write(path: str, content: str | bytes) -> None:
    """Write a file of the explanation, and say so on standard error."""
    content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    Path(path).write_bytes(content)
    print(f"{path}: {len(content) / 1e6:,.2f} MB", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Explain all questions at all rates."""
    given = parser().parse_args(arguments)
    with cli.one_way_out():
        check(given)
        compilations.keep()
        text = Record(tuple(cli.read_text(path) for path in cli.files(given.context)), "", ()).context_text()
        step = choose_step(given.checkpoint, given.step)
        mesh = sharding.make_mesh(given.mesh) if given.mesh else None
        model = Comi.load(given.checkpoint, overrides=given.set, step=step, mesh=mesh)
        options: Options = {
            "max_new_tokens": given.max_new_tokens,
            "repetition_penalty": given.repetition_penalty,
        }
        trained = model.run.config.compression.rates
        rates = dict.fromkeys(given.rates or (rate for rate in trained if rate > 1))
        if not rates:
            raise ConfigError("the model was trained at no rate above 1; give --rates, e.g. --rates 8 16")
        source, views = explanation.encode(model, text), list[View]()
        for question in dict.fromkeys(given.question):
            for rate in rates:
                views.append(explanation.explain(model, source, question, rate, **options))
                said = views[-1].answer
                print(f"rate {rate}, {said.memory_vectors} vectors: {question} {said.text}", flush=True)
        made = explanation.as_json(source, views, explanation.account(model, given.checkpoint, step))
        if given.output:
            write(given.output, page(made))
        if given.json:
            write(given.json, json.dumps(made) + "\n")
        if given.png:
            write(given.png, explanation_picture.draw(made))


if __name__ == "__main__":
    main()
