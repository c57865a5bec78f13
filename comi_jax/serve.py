"""Serve a trained model to OpenAI's clients: ``python -m comi_jax.serve --checkpoint=DIR``."""

import argparse
import importlib.util
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from comi_jax import cli
from comi_jax.devices import compilations, sharding
from comi_jax.errors import ConfigError
from comi_jax.runs.selection import choose_step
from comi_jax.serving.compressor import Comi
from comi_jax.serving.settings import LOOPBACK, SINGLE_MESSAGE, Settings, trained_rates

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")  # the extra [serve]
SHORTEST_KEY = 16


def main(arguments: list[str] | None = None) -> None:
    """Load a checkpoint, listen, and serve until a signal."""
    options = parser().parse_args(arguments)
    with cli.one_way_out():
        check_extra()
        compilations.keep()
        keys = keys_of(options)
        step = choose_step(options.checkpoint, options.step)
        mesh = sharding.make_mesh(options.mesh) if options.mesh else None
        model = Comi.load(options.checkpoint, overrides=options.set, step=step, mesh=mesh)
        settings = settings_of(options, model)
        start_log()
        if not settings.auto:
            logging.getLogger(__name__).info("rate=auto is refused: %s", why_not_auto(model, settings.rates))
        from comi_jax.serving.http import lifecycle  # needs the extra

        ended = lifecycle.serve(model, settings, options.host, options.port, keys)
    if not ended:
        os._exit(1)  # the engine is in a program, or has failed: Python's own end would wait for it, or crash beside it


def parser() -> cli.Parser:
    """The arguments of the command."""
    made = cli.Parser(prog="python -m comi_jax.serve", description="Serve a trained model to OpenAI's clients.")
    made.add_argument("--checkpoint", type=cli.path, required=True, help="folder of a training run")
    made.add_argument("--step", default="newest", help='step of the checkpoint, "best" or "newest" (default)')
    made.add_argument("--set", action="append", default=[], metavar="path=value", help="override a setting")
    cli.add_mesh(made)
    made.add_argument("--name", help="name of the model in requests (default: that of the folder)")
    made.add_argument("--host", default=LOOPBACK[0], help="address to listen on (default: this machine only)")
    made.add_argument("--port", type=cli.at_least(0), default=8000)
    made.add_argument("--api-key-file", type=cli.path, help=f"keys, one per line, of {SHORTEST_KEY} characters or more")
    made.add_argument("--no-auth", action="store_true", help="let everybody who reaches the address ask")
    made.add_argument("--cors", default="", metavar="ORIGIN", help="origin whose pages may ask (default: none)")
    made.add_argument(
        "--decoder", metavar="URL", help="vLLM's /v1 that decodes (--enable-prompt-embeds), not this server"
    )
    made.add_argument("--decoder-key-file", type=cli.path, help="the key for that endpoint, in one line")
    made.add_argument("--documents", type=cli.path, metavar="DIR", help="save uploaded files, for other servers too")
    made.add_argument("--single-message", choices=SINGLE_MESSAGE, default="refuse", help="one message, no context")
    made.add_argument(
        "--rates", type=_rates, help="rates that may be asked for, e.g. 16,32,1 (default: the trained, 1)"
    )
    whole, seconds = cli.at_least(1), _seconds
    for name, kind, text in (
        ("slots", whole, "answers decoded at once"),
        ("slot-length", whole, "positions of a slot: memory vectors, question and answer"),
        ("queue", cli.at_least(0), "requests that may wait; more get 429"),
        ("deadline", seconds, "seconds until a request gets 408"),
        ("drain", seconds, "seconds for accepted requests after SIGTERM"),
        ("body-seconds", seconds, "seconds in which a body must arrive"),
        ("max-context", whole, "tokens of a context"),
        ("max-question", whole, "tokens of a question"),
        ("max-tokens", whole, "tokens of an answer"),
        ("max-body", whole, "bytes of a request"),
        ("max-file", whole, "bytes of an uploaded text"),
        ("max-files", whole, "uploaded files"),
        ("store-bytes", whole, "bytes of the device for documents"),
        ("host-bytes", cli.at_least(0), "bytes of host memory for documents"),
    ):
        made.add_argument(f"--{name}", type=kind, metavar="N", help=text)
    return made


def start_log() -> None:
    """Write what this package and uvicorn have to say to standard error; other libraries keep their own ways."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for name in ("comi_jax", "uvicorn"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        logger.propagate = False


def check_extra() -> None:
    """Raise ConfigError if a package of the extra is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} is not installed; run pip install 'comi-jax[serve]'")


def decoder_key_of(options: argparse.Namespace) -> str:
    """The key for the endpoint of --decoder. Raises ConfigError where there is something to fix."""
    if options.decoder is None:
        if options.decoder_key_file is not None:
            raise ConfigError("--decoder-key-file is for --decoder; give both or none")
        return ""
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("--decoder sends prompts as torch tensors, and torch is not installed; run pip install torch")
    if options.decoder_key_file is None:
        return ""
    key = Path(options.decoder_key_file).read_text(encoding="utf-8").strip()
    if not key.isascii() or len(key.split()) != 1:
        raise ConfigError(f"--decoder-key-file={options.decoder_key_file} must hold one key of ASCII characters")
    return key


def keys_of(options: argparse.Namespace) -> list[str]:
    """The keys of the file. Raises ConfigError if there are none where they are needed."""
    if options.api_key_file is None:
        if options.host not in LOOPBACK and not options.no_auth:
            raise ConfigError(
                f"--host={options.host} can be reached from other machines; give keys with --api-key-file, or say "
                "--no-auth"
            )
        return []
    if options.no_auth:
        raise ConfigError("both --api-key-file and --no-auth are given; give one of them")
    try:
        lines = Path(options.api_key_file).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(f"--api-key-file={options.api_key_file} is not UTF-8 text") from None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys or any(len(key) < SHORTEST_KEY or not key.isascii() or " " in key for key in keys):
        raise ConfigError(
            f"--api-key-file={options.api_key_file} must hold keys, one per line, each of at least "
            f"{SHORTEST_KEY} ASCII characters and without spaces"
        )
    return keys


def settings_of(options: argparse.Namespace, model: Comi) -> Settings:
    """The limits of the server: those given, and for the others what model and run allow."""
    config, positions = model.run.config, model.run.backbone.max_position_embeddings
    if config.system != "comi":
        raise ConfigError(
            f"{options.checkpoint} is a run of system={config.system}; only those of system=comi are served"
        )
    names = set(Settings.__dataclass_fields__) - {"name", "rates", "auto"}
    given = {name: value for name, value in vars(options).items() if name in names and value is not None}
    name = options.name or os.path.basename(os.path.abspath(options.checkpoint))
    length = given.setdefault("slot_length", min(Settings.slot_length, positions))
    given.setdefault("max_tokens", min(Settings.max_tokens, length // 2))
    given.setdefault("max_context", config.data.max_context)
    given.setdefault("max_question", min(Settings.max_question, config.data.max_query))
    for limit, most in (("max_context", config.data.max_context), ("max_question", config.data.max_query)):
        if given[limit] > most:
            raise ConfigError(
                f"--{limit.replace('_', '-')} is {given[limit]}, more than the {most} of the run; raise it with --set"
            )
    given["decoder_key"] = decoder_key_of(options)
    rates = options.rates or trained_rates(config)
    return Settings(name=name, rates=rates, auto=not why_not_auto(model, rates), **given)


def why_not_auto(model: Comi, rates: Sequence[int]) -> str:
    """Why a server of ``rates`` cannot choose among them; empty if it can."""
    try:
        calibration = model.calibration()
    except ConfigError as error:
        return str(error)
    missing = sorted(set(calibration.rates) - set(rates))
    return f"it also chooses the rate {missing[0]}, which --rates leaves out" if missing else ""


def _rates(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.isascii() and word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text} is no list of whole numbers, as 16,32,1")
    return tuple(int(word) for word in words)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


if __name__ == "__main__":
    main()
