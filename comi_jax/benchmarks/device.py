"""Measure the accelerator that is there: ``python -m comi_jax.benchmarks.device [--shapes=qwen2-7b] [--minutes=8]``.

Correctness first, then times, the most important first. Each time is shown beside its floor, which is what the device's
own copy and matmul rates of the same minutes allow for the bytes and FLOP that cannot be avoided, and beside the plan's
bound, which is from the compiled program and the chip's data sheet. Random weights; one device.

The measurements run in a process of their own, which is ended when the minutes are over. If one takes it down, the
others go on in another process. Needs jax, flax, optax and numpy.
"""

import dataclasses
import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from comi_jax import cli
from comi_jax.benchmarks.accelerator import annotations as annotations  # before what is annotated
from comi_jax.errors import ConfigError
from comi_jax.training import estimate

MEMORY = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # of a GPU, that JAX takes; its own default is 0.75
RESERVE = 3.0  # seconds of the given time for ending the process and printing
NAMES = ("qwen2-7b", "llama2-7b", "qwen3-8b", "tiny")


def items(shapes: Any) -> dict[str, Callable[[Any], list[Any]]]:
    """Every measurement by name, the most important first; each makes some rows from a ``Kit``."""
    from comi_jax.benchmarks.accelerator import checks, times

    main, *others = shapes.kernel_tokens
    first, *batches = shapes.batches
    return (
        {
            "kernels are right": checks.kernels,
            "attention is right": checks.attentions,
            "bfloat16 is right": checks.bfloat16,
            "rates": times.rates,
            f"kernels, {main} tokens": lambda kit: times.kernels(kit, main),
            "attention": times.attentions,
            "compress": times.compress,
            f"prefill and decode, batch {first}": lambda kit: times.answering(kit, first),
            "next question": times.next_question,
            "train step": times.train_step,
        }
        | {f"kernels, {n} tokens": lambda kit, n=n: times.kernels(kit, n) for n in others}
        | {f"prefill and decode, batch {n}": lambda kit, n=n: times.answering(kit, n) for n in batches}
    )


# --- the process that measures ----------------------------------------------------------------------------------------


def measure(shapes_name: str, seed: int, done: set[str], results: Path) -> None:
    """Run the measurements that are not ``done`` and append a JSON line to ``results`` when each begins and ends."""
    import jax

    from comi_jax.benchmarks.accelerator import kit as accelerator
    from comi_jax.devices import compilations

    compilations.keep()
    name = shapes_name or ("tiny" if jax.default_backend() == "cpu" else NAMES[0])
    kit = accelerator.Kit(accelerator.SHAPES[name], seed)
    with results.open("a", encoding="utf-8") as lines:

        def tell(**values: Any) -> None:
            lines.write(json.dumps(values) + "\n")
            lines.flush()

        tell(about=about(kit))
        for item, function in items(kit.shapes).items():
            if item in done:
                continue
            tell(begun=item)
            since = time.perf_counter()
            try:
                rows = function(kit)
            except Exception as error:  # whatever it is, it is one row, and the others go on
                rows = [accelerator.Row(item, failed=True, note=_reason(error))]
            print(f"{item}: {time.perf_counter() - since:.1f} s", file=sys.stderr, flush=True)
            tell(ended=item, rows=[dataclasses.asdict(row) for row in rows])


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def about(kit: Any) -> dict[str, Any]:
    """What the figures belong to."""
    import flax
    import jax
    import numpy as np

    return {
        "device": kit.device.device_kind, "devices": jax.device_count(), "data sheet": kit.chip and kit.chip.name,
        "shapes": kit.shapes.name, "dtype": kit.shapes.dtype, "seed": kit.seed,
        "date": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()), "python": platform.python_version(),
        "jax": jax.__version__, "flax": flax.__version__, "numpy": np.__version__,
    }  # fmt: skip


# --- the process that waits for it ------------------------------------------------------------------------------------


def supervise(command: Sequence[str], results: Path, deadline: float) -> dict[str, Any]:
    """Run ``command``, which appends to ``results``, until all is measured or the ``deadline`` (time.monotonic) is
    there, again if it dies in a measurement. Returns what was measured, with a failed row for what was not."""
    found: dict[str, Any] = {"about": {}, "rows": []}
    done: set[str] = set()
    while True:
        process = subprocess.Popen(
            [*command, "--done", json.dumps(sorted(done))], env={MEMORY: str(estimate.USABLE)} | os.environ
        )
        try:
            status = process.wait(timeout=max(deadline - time.monotonic(), 0.1))
            end = f"the process ended with {_signal(status)}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status, end = 0, "the time was over"
        begun = _collect(results, found, done)
        for item in begun:
            found["rows"].append({"name": item, "failed": True, "note": end})
            done.add(item)
        results.write_text("")
        if status == 0:
            return found
        if not begun:
            raise ConfigError(f"nothing can be measured: {end} before the first measurement; its output is above")


def _collect(results: Path, found: dict[str, Any], done: set[str]) -> list[str]:
    """Add what ``results`` tells to ``found`` and ``done``. Returns what was begun and not ended."""
    begun: list[str] = []
    for line in results.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        if "about" in values:
            found["about"] = values["about"]
        elif "begun" in values:
            begun.append(values["begun"])
        else:
            begun.remove(values["ended"])
            done.add(values["ended"])
            found["rows"] += values["rows"]
    return begun


def _signal(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"


def table(found: dict[str, Any]) -> Table:
    """A line for each row: times in ms, and the errors of checks."""
    about = found["about"]
    title = ", ".join(f"{key} {value}" for key, value in about.items() if key != "device")
    columns = ("", "by", "ms", "floor, ms", "of", "x floor", "plan, ms", "error", "limit", "")
    lines = Table(*columns, title=f"{about.get('device', 'no device')}: {title}")
    for row in found["rows"]:

        def ms(name: str, row: dict[str, Any] = row) -> str:
            return f"{1000 * row[name]:,.3f}" if row.get(name) is not None else ""

        def error(name: str, row: dict[str, Any] = row) -> str:
            return f"{row[name]:.1e}" if row.get(name) is not None else ""

        times = f"{row['seconds'] / row['floor']:.2f}" if row.get("seconds") and row.get("floor") else ""
        words = f"{'FAILED: ' if row.get('failed') else ''}{row.get('note', '')}"
        lines.add_row(
            row["name"], row.get("by", ""), ms("seconds"), ms("floor"), row.get("floor_of", ""), times, ms("plan"),
            error("error"), error("limit"), words,
        )  # fmt: skip
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON. Exit status 1 if a row failed."""
    parser = cli.Parser(prog="python -m comi_jax.benchmarks.device", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", choices=NAMES, default="", help="default: qwen2-7b on an accelerator, tiny on CPU")
    parser.add_argument(
        "--minutes", type=_minutes, default=8.0, help="after which it ends, whatever is left to measure"
    )
    parser.add_argument("--seed", type=cli.at_least(0), help="of all inputs (default: another one each time)")
    parser.add_argument("--json", type=cli.path, metavar="FILE", default="device.json")
    parser.add_argument("--here", metavar="FILE", help="measure in this process (for internal use)")
    parser.add_argument("--done", type=json.loads, default=[], help="what not to measure (for internal use)")
    given = parser.parse_args(arguments)
    seed = secrets.randbits(31) if given.seed is None else given.seed
    if given.here:
        return measure(given.shapes, seed, set(given.done), Path(given.here))
    deadline = time.monotonic() + 60 * given.minutes - RESERVE
    with cli.one_way_out(), tempfile.TemporaryDirectory(prefix="comi_jax-") as folder:
        if not Path(given.json).absolute().parent.is_dir():
            raise ConfigError(f"--json={given.json} cannot be written: its folder does not exist; create it")
        results = Path(folder) / "results"
        results.touch()
        command = [sys.executable, "-m", "comi_jax.benchmarks.device", "--here", str(results), "--seed", str(seed)]
        found = supervise(command + [f"--shapes={given.shapes}"] * bool(given.shapes), results, deadline)
        Path(given.json).write_text(json.dumps(found, indent=2) + os.linesep, encoding="utf-8")
    Console(width=cli.width()).print(table(found))
    if any(row.get("failed") for row in found["rows"]):
        sys.exit(1)


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0.1 <= minutes <= 24 * 60:
        raise ValueError(text)
    return minutes


if __name__ == "__main__":
    main()
