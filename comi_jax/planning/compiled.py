"""What a compiler answers about a program, kept on disk: compiling a large train step takes minutes."""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import time
import zlib
from pathlib import Path

import jax

from comi_jax.devices import compilations
from comi_jax.devices.topology import Topology

FORMAT = 1  # of the stored answers
KEPT = 200  # stored answers; those used longest ago are removed
COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
TOO_LARGE = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm")
SIZES = (
    "argument_size_in_bytes",
    "output_size_in_bytes",
    "alias_size_in_bytes",
    "temp_size_in_bytes",
    "generated_code_size_in_bytes",
    "host_temp_size_in_bytes",
    "host_argument_size_in_bytes",
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """An executable's optimised HLO text and sizes, or the compiler's refusal."""

    seconds: float  # that the compilation took
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)  # SIZES, from XLA's memory analysis
    text: str = ""
    refusal: str = ""  # the compiler's error if the memory does not suffice, which TOO_LARGE reads


def compiled(lowered: jax.stages.Lowered, where: Topology) -> Compiled:
    """``lowered`` compiled for ``where``, or the stored answer about the same program from the same compiler."""
    folder = compilations.folder()
    path = folder / "plans" / f"{_key(lowered, where)}.json.gz" if folder else None
    if path and (known := _read(path)):
        return known
    answer = _compile(lowered)
    if path:
        _write(path, answer)
    return answer


def _key(lowered: jax.stages.Lowered, where: Topology) -> str:
    """A hash of everything that the answer depends on. The program's text has its shapes and shardings."""
    versions = []
    for name in COMPILERS:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    words = [str(FORMAT), where.name, str(len(where.devices)), *versions, *flags, lowered.as_text()]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def _compile(lowered: jax.stages.Lowered) -> Compiled:
    """The compiler dumps the text, as JAX's printer does not support all of libtpu's asynchronous calls."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            executable = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if not TOO_LARGE.search(str(error)):
                raise
            return Compiled(time.perf_counter() - started, refusal=str(error))
        texts = sorted(Path(folder).glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size)
        text = texts[-1].read_text(encoding="utf-8") if texts else executable.as_text()
    if text is None:
        raise RuntimeError("the compiler shows no text of its program: there is nothing to count in")
    analysis = executable.memory_analysis()
    return Compiled(time.perf_counter() - started, {name: int(getattr(analysis, name)) for name in SIZES}, text)


def _read(path: Path) -> Compiled | None:
    """The stored answer; None if there is none, or if it is damaged."""
    try:
        answer = Compiled(**json.loads(gzip.decompress(path.read_bytes())))
        os.utime(path)
    except (OSError, EOFError, zlib.error, ValueError, TypeError):
        return None
    return answer


def _write(path: Path, answer: Compiled) -> None:
    """Store ``answer``; if that fails, as on a full disk, the next call compiles again."""
    draft = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(exist_ok=True)
        draft.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(answer)).encode(), compresslevel=3))
        os.replace(draft, path)
        for old in sorted(path.parent.glob("*.json.gz"), key=lambda p: p.stat().st_mtime)[:-KEPT]:
            old.unlink()
    except OSError:
        draft.unlink(missing_ok=True)
