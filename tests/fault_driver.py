"""A process of its own that trains as it is told, line by line, each time in a fresh child that may die in any way.

Everything is imported before the children are forked, so that one costs no more than its training. A line of standard
input is a JSON object: ``arguments`` of comi_jax.train, or ``store``: a folder for checkpoints of small arrays, without
a model; ``log`` (a file for what it prints), ``devices``, ``cache`` (of compilations, or empty) and ``die`` (a point
below, and how many times it is passed before). The answer is the child's process id and, when it ends, its exit status.
"""

import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback

from xla_flags import FLAGS

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XLA_FLAGS"] = FLAGS

import jax
import jax.numpy as jnp
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401, imported here once for all children

from comi_jax import train
from comi_jax.evaluation import predictions
from comi_jax.runs import checksums, readback
from comi_jax.runs.arrays import SealedWriter
from comi_jax.runs.checkpoints import REMOVING, Checkpoints, Progress
from comi_jax.training import loop
from comi_jax.training.state import TrainState


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def after(passed, then=die):
    """A function that does ``then`` when it is called once more than ``passed`` times."""
    calls = []

    def count():
        calls.append(None)
        if len(calls) > passed:
            then()

    return count


def around(owner, name, before=None, behind=None):
    """Have ``owner.name`` call the functions ``before`` and ``behind`` it."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        if before:
            before()
        result = original(*args, **kwargs)
        if behind:
            behind()
        return result

    setattr(owner, name, wrapped)


def terminate():
    """Send this process SIGTERM, and give the thread that takes it the time to end the process."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)


def half_removed(passed):
    """Remove some files of a checkpoint that is no longer kept, and die."""

    remove = shutil.rmtree

    def removing(path, **kwargs):
        if not path.name.endswith(REMOVING):
            return remove(path, **kwargs)
        files = sorted(p for p in path.rglob("*") if p.is_file())
        for file in files[::2]:
            file.unlink()
        count()
        remove(path)

    count, shutil.rmtree = after(passed), removing


POINTS = {
    "before the folder": lambda n: around(SealedWriter, "save", before=after(n)),
    "mid-data": lambda n: around(SealedWriter, "save", behind=after(n)),
    "before the comparison": lambda n: around(readback, "compare", before=after(n)),
    "after the comparison": lambda n: around(readback, "compare", behind=after(n)),
    "before the checksums": lambda n: around(checksums, "seal", before=after(n)),
    "before the commit": lambda n: around(checksums, "seal", behind=after(n)),
    "after the commit": lambda n: around(SealedWriter, "wait", behind=after(n)),
    "mid-prune": half_removed,
    "in an evaluation": lambda n: around(predictions, "_prediction", before=after(n)),
    "after an evaluation": lambda n: around(predictions, "_finish", behind=after(n)),
    "slow save": lambda n: around(SealedWriter, "wait", before=after(n, lambda: time.sleep(20))),
    "SIGTERM before the first step": lambda n: around(loop, "describe", before=after(n, terminate)),
    "SIGTERM in an evaluation": lambda n: around(predictions, "_prediction", before=after(n, terminate)),
}


def child(order):
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    jax.config.update("jax_num_cpu_devices", order["devices"])
    if order["cache"]:
        jax.config.update("jax_compilation_cache_dir", order["cache"])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if order["die"]:
        name, passed = order["die"]
        POINTS[name](passed)
    if "full" in order:
        save_on_a_full_disk(order["store"], order["full"])
    elif "store" in order:
        save_small_states(order["store"])
    else:
        train.main(order["arguments"])


def small_state(step):
    return TrainState(jnp.int32(step), {"w": jnp.full((64, 64), step, jnp.float32)}, {"m": jnp.full(9, -step)})


def save_small_states(folder):
    """Checkpoints 1, 2, 3 ... with the newest two kept, for ever; the newest complete one is printed."""
    checkpoints = Checkpoints(folder, keep=2)
    first = checkpoints.restore_newest(small_state(0))[1].step if checkpoints.steps() else 0
    for step in range(first + 1, 10_000):
        checkpoints.save(small_state(step), Progress(step, {"next": step}))
        print("settled", checkpoints.latest(), flush=True)


def save_on_a_full_disk(folder, full):
    """Checkpoints 1 to 5; while those named in ``full`` are written, no file can grow beyond some bytes: the system
    itself refuses, as on a full disk."""
    checkpoints = Checkpoints(folder, keep=9, say=lambda text: print(text, flush=True))
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    try:
        for step in range(1, 6):
            resource.setrlimit(resource.RLIMIT_FSIZE, (6000 if step in full else hard, hard))
            checkpoints.save(small_state(step), Progress(step, {"next": step}))
            checkpoints.settle()
    except checksums.CheckpointError as error:
        sys.exit(str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        checkpoints.close()


def main():
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            status = 70
            try:
                child(json.loads(line))
                status = 0
            except SystemExit as ended:
                print(ended.code, flush=True)
                status = ended.code if isinstance(ended.code, int) else 1
            except BaseException:
                print(traceback.format_exc(), flush=True)
            finally:
                os._exit(status)
        print("began", pid, flush=True)
        print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
