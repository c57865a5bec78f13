"""Train a compressor: ``python -m comi_jax.train --config=NAME [path=value ...]``.

The same command resumes a stopped run. The run itself is ``training.run``. Exit status: 0 after the last step and the
closing table; 85 if a signal stopped it before, everything saved; 75 if a peer process is gone; 1 or 2 for an error
that the user can fix.
"""

import sys

import jax

from comi_jax import cli
from comi_jax.devices import census, compilations, distributed
from comi_jax.overrides import load
from comi_jax.runs.logs import RunConsole
from comi_jax.training.run import run
from comi_jax.training.signals import STOPPED


def main(arguments: list[str] | None = None) -> None:
    """Train; an error that the user can fix ends in one sentence and exit status 1."""
    parser = cli.Parser(prog="python -m comi_jax.train", description="Train a COMI compressor.")
    parser.add_argument("--config", required=True, help="a name from comi_jax/configs: tiny, qwen2, llama2, qwen3")
    parser.add_argument("--skip-bad-records", action="store_true", help="skip, count and list bad data lines")
    parser.add_argument(
        "--allow-config-change", action="store_true", help="resume a run with settings other than it began with"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="do everything but train and evaluate, and write nothing"
    )
    cli.add_ignore_config(parser)
    parser.add_argument(
        "--allow-fewer-devices", action="store_true", help="leave devices of the machine, or nodes of the job, idle"
    )
    parser.add_argument("overrides", nargs="*", metavar="path=value", help="settings, e.g. train.steps=100")
    options = parser.parse_intermixed_args(arguments)
    overrides = options.overrides + ["data.skip_bad_records=true"] * options.skip_bad_records
    overrides += cli.ignore_config(options)
    try:
        with cli.one_way_out(distributed.leave):
            distributed.start()
            compilations.keep()
            # No markup, as paths and data may hold brackets; only the first process prints.
            console = RunConsole(width=cli.width(), soft_wrap=True, markup=False, quiet=not distributed.is_first())
            config = load(options.config, overrides)
            seen = census.take()
            console.print(census.sentence(seen), highlight=False)
            if not options.allow_fewer_devices:
                census.check(seen)
            if not run(config, console, allow_change=options.allow_config_change, dry_run=options.dry_run):
                sys.exit(STOPPED)
    except jax.errors.JaxRuntimeError as error:
        distributed.leave(*distributed.failed(error))
    except Exception as error:
        distributed.leave(distributed.unexpected(error))


if __name__ == "__main__":
    main()
