"""Weight files, read one tensor at a time and checked as a whole: safetensors, and ``.bin`` files of torch.save."""

import contextlib
import io
import math
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from comi_jax.weights import hf_folder
from comi_jax.weights.layout import Index, Shape, Sources, WeightsError, some

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
OTHER_DTYPES = {  # of tensors that may be present but are not read
    "F64": "float64", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
PIECE_BYTES = 64_000_000  # of each of two tensors, in float32, that are compared at a time


class Tensors:
    """The tensors of a file, of an index over several files, or of a folder with either; read one at a time.

    Files are safetensors or ``.bin`` files of torch.save; the latter need torch, and are loaded as plain tensors only,
    so that no code in them can run. Raises WeightsError, also from ``read``, for a file that cannot be read.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        self.path = hf_folder.entry_point(path) if path.is_dir() else path
        names = hf_folder.shards(self.path) if self.path.suffix == ".json" else [self.path.name]
        self._files = {name: _open(self.path.parent / name) for name in names}
        held = [(key, name) for name, file in self._files.items() for key in file.shapes]
        self._where = dict(held)
        twice = sorted({key for key, name in held if self._where[key] != name})
        if twice:
            other = next(name for key, name in held if key == twice[0])
            raise WeightsError(
                f"{self.path}: several files contain {some(twice)}; transformers uses the one in "
                f"{self._where[twice[0]]}, not in {other}: remove the wrong file"
            )
        self.shapes: dict[str, Shape] = {key: self._files[name].shapes[key] for key, name in held}
        self.dtypes: dict[str, str] = {key: self._files[name].dtypes[key] for key, name in held}

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """Tensor ``name``, or its block ``index``, in its own dtype (bfloat16 through ml_dtypes)."""
        return self._files[self._where[name]].read(name, index)

    def sizes(self) -> dict[str, int]:
        """The bytes of each tensor, by name."""
        return {name: math.prod(shape) * jnp.dtype(self.dtypes[name]).itemsize for name, shape in self.shapes.items()}


def _open(path: Path) -> "_SafeFile | _TorchFile":
    if _starts_with(path, b"version https://git-lfs.github.com/spec/"):
        raise WeightsError(f"{path} is a Git LFS pointer, not the file itself: run git lfs pull")
    return _TorchFile(path) if path.suffix in (".bin", ".pt", ".pth") else _SafeFile(path)


def _starts_with(path: Path, words: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(words)) == words
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None


class _SafeFile:
    """A safetensors file, mapped anew for each read, because pages that stay mapped would count as resident memory."""

    def __init__(self, path: Path):
        self.path, self.shapes, self.dtypes = path, {}, {}
        with self._mapped() as file:
            for name in file.keys():
                view = file.get_slice(name)
                self.shapes[name] = tuple(view.get_shape())
                self.dtypes[name] = (DTYPES | OTHER_DTYPES).get(view.get_dtype(), "")
                if not self.dtypes[name]:
                    raise WeightsError(f"{path} holds {name} as {view.get_dtype()}, a dtype that is not supported")

    def read(self, name: str, index: Index) -> np.ndarray:
        with self._mapped() as file:
            return file.get_slice(name)[index] if index else file.get_tensor(name)

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, framework="np") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{self.path} cannot be read as safetensors: {error}") from None


class _TorchFile:
    """A file of torch.save that holds only tensors; memory-mapped if it is a zip file."""

    def __init__(self, path: Path):
        try:
            import torch  # needed only for PyTorch files
        except ImportError:
            raise WeightsError(
                f"{path} is a PyTorch file and torch is not installed: pip install torch, or convert it to safetensors"
            ) from None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns before it refuses a file
                held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise WeightsError(f"{path} cannot be read as a PyTorch file of plain tensors: {reason[0]}") from None
        if not isinstance(held, dict) or not all(isinstance(x, torch.Tensor) for x in held.values()):
            raise WeightsError(f"{path} does not hold a flat dictionary of tensors")
        self._held = {name: tensor.detach() for name, tensor in held.items()}  # numpy() needs tensors without gradients
        self._bits = torch.int16
        self.shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
        self.dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in held.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        tensor = self._held[name][index]
        if self.dtypes[name] == "bfloat16":
            return tensor.view(self._bits).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


def torch_saved(array: np.ndarray) -> bytes:
    """``array`` as torch.save writes a tensor of the same dtype (bfloat16 through ml_dtypes). Raises WeightsError
    without torch."""
    try:
        import torch  # needed only for PyTorch files
    except ImportError:
        raise WeightsError("a PyTorch file is written with torch, which is not installed: pip install torch") from None
    bfloat16 = array.dtype == ml_dtypes.bfloat16
    plain = np.array(array.view(np.int16) if bfloat16 else array, order="C")  # a copy, which torch may own
    tensor = torch.from_numpy(plain)
    written = io.BytesIO()
    torch.save(tensor.view(torch.bfloat16) if bfloat16 else tensor, written)
    return written.getvalue()


def _prefix(names: list[str], there: Mapping[str, Any]) -> str:
    """The prefix that every one of ``names`` has in ``there``; empty if there is none."""
    ends = (name.removesuffix(names[0]) for name in there if names and name.endswith(names[0]))
    return next((start for start in ends if start and all(f"{start}{name}" in there for name in names)), "")


def check(sources: Sources, optional: Mapping[str, Shape], have: Tensors, *, strict: bool = True) -> list[str]:
    """Check the tensors in ``have`` against ``sources``; those in ``optional`` may be present. Returns the names of the
    unexpected ones.

    Raises WeightsError listing every tensor that is missing, unexpected, or of the wrong shape or dtype, and every one
    whose dtype differs between layers; also if every name has an extra prefix. If not ``strict``, unexpected tensors
    alone are no error, layers may differ in dtype, and optional tensors are not checked.
    """
    shapes = have.shapes
    want = {name: shape for source in sources.values() for name, shape in source.expected().items()}
    known = {**optional, **want}
    prefix = _prefix(list(want), shapes)
    if prefix:
        raise WeightsError(
            f"{have.path} has {prefix!r} before the name of every tensor, as a wrapper around the model leaves it; "
            "save the tensors again without it"
        )
    problems = [f"missing {name} {shape}" for name, shape in want.items() if name not in shapes]
    unexpected = [name for name in shapes if name not in known]
    problems += [
        f"{name} has shape {shape}, expected {known[name]}"
        for name, shape in shapes.items()
        if name in (known if strict else want) and shape != known[name]
    ]
    problems += [
        f"{name} is {have.dtypes[name]}, not one of {', '.join(DTYPES.values())}"
        for name in (known if strict else want)
        if name in shapes and have.dtypes[name] not in DTYPES.values()
    ]
    for source in sources.values() if strict else ():
        found = sorted({have.dtypes[name] for name in source.names if name in shapes})
        if len(found) > 1:
            problems.append(f"{source.names[0]} has different dtypes in different layers: {', '.join(found)}")
    if problems or strict:
        problems += [f"unexpected {name} {shapes[name]}" for name in unexpected]
    if problems:
        listed = "\n  ".join(problems)
        raise WeightsError(f"{have.path} does not fit the model, {len(problems)} problem(s):\n  {listed}")
    return unexpected


def same(have: Tensors, one: str, other: str) -> bool:
    """Whether two tensors hold the same numbers, even if in different dtypes. Reads a few rows at a time."""
    shape = have.shapes[one]
    if shape != have.shapes[other] or not {have.dtypes[one], have.dtypes[other]} <= set(DTYPES.values()):
        return False
    step = max(1, PIECE_BYTES // (4 * max(1, math.prod(shape[1:]))))

    def rows(name: str, first: int) -> np.ndarray:
        return have.read(name, (slice(first, min(shape[0], first + step)),)).astype(np.float32)

    return all(np.array_equal(rows(one, first), rows(other, first)) for first in range(0, shape[0], step))
