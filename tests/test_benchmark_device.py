"""``benchmarks.device`` on this machine: right results pass, wrong ones and failures are rows, and it ends in time."""

import dataclasses
import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from comi_jax.benchmarks import device
from comi_jax.benchmarks.accelerator import checks as device_checks
from comi_jax.benchmarks.accelerator import kit as device_kit
from comi_jax.benchmarks.accelerator import times as device_times
from comi_jax.devices import chips
from comi_jax.errors import ConfigError

BLOCKED = ("grain", "datasets", "tensorboardX", "pyarrow", "safetensors", "xxhash", "filelock", "torch", "matplotlib")
BLOCKED += ("jaxtyping", "beartype", "transformers")
IMPORTS = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
from comi_jax.benchmarks import device
from comi_jax.benchmarks.accelerator import checks as device_checks
from comi_jax.benchmarks.accelerator import kit as device_kit
from comi_jax.benchmarks.accelerator import times as device_times
print(len(device.items(device_kit.SHAPES["qwen2-7b"])))
"""


@pytest.fixture(scope="module")
def kit():
    return device_kit.Kit(dataclasses.replace(device_kit.SHAPES["tiny"], check_tokens=70), 3)


def test_it_needs_what_an_image_for_accelerators_has():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert done.stdout == "14\n", done.stderr


def test_the_kernels_and_the_attention_are_right(kit):
    rows = device_checks.kernels(kit) + device_checks.attentions(kit) + device_checks.bfloat16(kit)
    assert len(rows) == 13 and not [row for row in rows if row.failed]
    assert all(row.error is not None and row.limit and row.error <= row.limit for row in rows)


def test_a_wrong_result_is_a_failed_row(kit, monkeypatch):
    """A kernel that leaves one value out, and one that reads what it must ignore."""

    def wrong(x, numbers, group, *slots, implementation):
        return (device_checks.max_cosine(x, numbers, group, implementation=implementation)[0].at[0, 5].set(0.0),)

    def careless(x, numbers, group, slots, *, implementation):
        return (
            device_checks.merge(x, numbers, group, slots, implementation=implementation)[0]
            + 0 * jnp.sum(x.astype("float32")),
        )

    monkeypatch.setattr(device_checks, "KERNELS", {"redundancy": wrong, "merge": careless})
    rows = device_checks.kernels(kit)
    values = [row for row in rows if "gradients" not in row.name]
    assert len(values) == 4 and all(row.failed and row.note == "WRONG" for row in values)


def test_times_have_their_floor(kit):
    """The floor of a row is what its bytes and FLOP take at the device's own rates; a plan needs a data sheet."""
    kit.__dict__ |= {"copy_rate": 2e9, "matmul_rate": 3e9}
    assert kit.floor(4e9, 3e9) == (2.0, "bytes") and kit.floor(4e9, 9e9) == (3.0, "FLOP")
    program = device_kit.compiled(lambda x: x @ x, jnp.ones((64, 64)))
    row = kit.row("product", 5.0, 4e9, 3e9, program, per=2)
    assert (row.seconds, row.floor, row.plan) == (5.0, 2.0, None)
    kit.chip = chips.Chip("test", flops=1e6, memory=1e9, bandwidth=1e12, link=1e9, network=1e9)
    try:
        assert kit.row("product", 5.0, 4e9, 3e9, program, per=2).plan == 64**3 / 1e6
        assert "no plan: " in kit.row("product", 5.0, 4e9, 3e9, object(), note="x").note
    finally:
        kit.chip = None


def test_what_is_timed_is_what_is_named(kit):
    kit.__dict__ |= {"copy_rate": 2e9, "matmul_rate": 3e9}
    rows = device_times.answering(kit, 2) + device_times.kernels(kit, 64) + device_times.next_question(kit)
    assert [row.name for row in rows] == [
        "prefill 16 of memory and query, batch 2", "decode a token after 16, batch 2", "redundancy, 64 tokens",
        "redundancy, forward and backward, 64 tokens", "merge, 64 tokens", "merge, forward and backward, 64 tokens",
        "next question about a kept document of 256 tokens",
    ]  # fmt: skip
    assert all(row.seconds and row.floor and row.seconds > 0 for row in rows)


def test_a_run_is_timed_until_its_results_are_there():
    calls = []

    class Slow:
        def block_until_ready(self):
            time.sleep(0.03)

    took = device_kit.seconds(lambda: calls.append(1) or Slow(), at_once=2)
    assert took >= 0.015 and len(calls) == 1 + 2 * device_kit.RUNS


# --- the process that waits -------------------------------------------------------------------------------------------

CHILD = """
import json, os, sys, time
done = set(json.loads(sys.argv[sys.argv.index("--done") + 1]))
with open(sys.argv[1], "a") as lines:
    def tell(**values):
        print(json.dumps(values), file=lines, flush=True)
    tell(about={"device": "a fake one"})
    for item in ["fine", "crash", "also fine", "endless"]:
        if item in done:
            continue
        tell(begun=item)
        if item == "crash":
            os.kill(os.getpid(), 11)
        if item == "endless":
            time.sleep(600)
        tell(ended=item, rows=[{"name": item, "seconds": 2.0, "floor": 0.5, "floor_of": "bytes"}])
"""


def test_a_crash_and_the_end_of_the_time_are_rows_and_the_rest_is_measured(tmp_path):
    results = tmp_path / "results"
    results.touch()
    since = time.monotonic()
    found = device.supervise([sys.executable, "-c", CHILD, str(results)], results, since + 4)
    assert 4 <= time.monotonic() - since < 8 and found["about"] == {"device": "a fake one"}
    rows = {row["name"]: row.get("note", "") for row in found["rows"]}
    ends = {"crash": "the process ended with signal SIGSEGV", "endless": "the time was over"}
    assert rows == {"fine": "", "also fine": ""} | ends
    console = Console(width=200)
    with console.capture() as printed:
        console.print(device.table(found))
    assert "FAILED: the time was over" in printed.get() and "4.00" in printed.get()


def test_a_process_that_cannot_begin_is_one_sentence(tmp_path):
    results = tmp_path / "results"
    results.touch()
    with pytest.raises(ConfigError, match="^nothing can be measured: the process ended with status 3 before"):
        device.supervise([sys.executable, "-c", "raise SystemExit(3)"], results, time.monotonic() + 60)


def test_an_error_is_the_row_of_its_measurement(kit, tmp_path, monkeypatch):
    def broken(kit):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory\nmore")

    row = device_kit.Row("fine", seconds=1.0)
    monkeypatch.setattr(device, "items", lambda shapes: {"broken": broken, "fine": lambda kit: [row], "known": broken})
    device.measure("tiny", 1, {"known"}, tmp_path / "results")
    about, *lines = map(json.loads, (tmp_path / "results").read_text().splitlines())
    assert about["about"]["shapes"] == "tiny" and about["about"]["seed"] == 1
    assert [line.get("begun") or line["ended"] for line in lines] == ["broken", "broken", "fine", "fine"]
    assert lines[1]["rows"][0]["note"] == "JaxRuntimeError: RESOURCE_EXHAUSTED: no memory"
    assert lines[1]["rows"][0]["failed"] and lines[3]["rows"][0]["seconds"] == 1.0


@pytest.mark.slow
def test_the_command_measures_this_machine(tmp_path):
    path = tmp_path / "device.json"
    command = [sys.executable, "-m", "comi_jax.benchmarks.device", "--minutes=8", f"--json={path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    names = [row["name"] for row in found["rows"]]
    assert "train step, 256 tokens, 2 encoder layers" in names and "compress 256 tokens, 2 encoder layers" in names
    assert not [row for row in found["rows"] if row["failed"]]
