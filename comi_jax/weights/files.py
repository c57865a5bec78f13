"""Files of weights, read a tensor at a time and checked as a whole: safetensors, and ``.bin`` as torch.save writes."""

import contextlib
import json
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

from comi_jax.weights.layout import Index, Shape, Sources, WeightsError

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Tensors:
    """The tensors of a file, of an index over several files, or of a folder with either; read one at a time.

    Files are safetensors, or ``.bin`` as torch.save writes them (which needs torch; read as plain tensors only, so that
    no code in them can run). Raises WeightsError for what cannot be read, here or in ``read``.
    """

    def __init__(self, path: str | Path):
        self.path = _entry_point(Path(path))
        listed = _read_index(self.path) if self.path.suffix == ".json" else None
        names = [self.path.name] if listed is None else sorted(set(listed.values()))
        self._files = {name: _open(self.path.parent / name) for name in names}
        held = [(key, name) for name, file in self._files.items() for key in file.shapes]
        where = dict(held)
        if len(where) < len(held):
            twice = sorted({key for key, name in held if where[key] != name})
            raise WeightsError(f"{self.path}: several files hold {_some(twice)}")
        if listed is not None and where != listed:
            wrong = sorted(set(where.items()) ^ set(listed.items()))
            raise WeightsError(f"{self.path} does not list what its files hold: {_some(wrong)}")
        self._where = where
        self.shapes: dict[str, Shape] = {key: self._files[name].shapes[key] for key, name in held}
        self.dtypes: dict[str, str] = {key: self._files[name].dtypes[key] for key, name in held}

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """Tensor ``name``, or a block of it, in its own dtype (bfloat16 through ml_dtypes)."""
        return self._files[self._where[name]].read(name, index)

    def sizes(self) -> dict[str, int]:
        """Bytes of every tensor."""
        return {name: math.prod(shape) * jnp.dtype(self.dtypes[name]).itemsize for name, shape in self.shapes.items()}


def _some(things: list[Any]) -> str:
    return f"{', '.join(map(str, things[:10]))}{f' and {len(things) - 10} more' if len(things) > 10 else ''}"


def _entry_point(path: Path) -> Path:
    """The file to start from: ``path`` itself, or what a folder has."""
    if not path.is_dir():
        return path
    found = [
        path / f"{stem}{ending}{index}"
        for stem, ending in (("model", ".safetensors"), ("pytorch_model", ".bin"))
        for index in (".index.json", "")
    ]
    there = [file for file in found if file.is_file()]
    if not there:
        raise WeightsError(f"{path} has none of {', '.join(file.name for file in found)}")
    return there[0]


def _read_index(path: Path) -> dict[str, str]:
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        plain = all(isinstance(name, str) and Path(name).name == name for name in listed.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is not an index of weight files: {error!r}") from None
    if not plain:
        raise WeightsError(f"{path} names files outside its own folder")
    missing = sorted({name for name in listed.values() if not (path.parent / name).is_file()})
    if missing:
        raise WeightsError(f"{path} names files that are not there: {_some(missing)}")
    return listed


def _open(path: Path) -> "_SafeFile | _TorchFile":
    return _TorchFile(path) if path.suffix in (".bin", ".pt", ".pth") else _SafeFile(path)


class _SafeFile:
    """A safetensors file. It is mapped for each read anew: pages that stay mapped would count as memory held."""

    def __init__(self, path: Path):
        self.path, self.shapes, self.dtypes = path, {}, {}
        with self._mapped() as file:
            for name in file.keys():
                view = file.get_slice(name)
                self.shapes[name] = tuple(view.get_shape())
                self.dtypes[name] = DTYPES.get(view.get_dtype(), view.get_dtype())
        _check_dtypes(path, self.dtypes)

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
    """A file of torch.save, mapped, with nothing but tensors in it."""

    def __init__(self, path: Path):
        try:
            import torch  # of use to those who read .bin files alone
        except ImportError:
            raise WeightsError(
                f"{path} is a PyTorch file and torch is not installed: pip install torch, or convert it to safetensors"
            ) from None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a file may be refused, before it is
                held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise WeightsError(f"{path} cannot be read as a PyTorch file of plain tensors: {reason[0]}") from None
        if not isinstance(held, dict) or not all(isinstance(x, torch.Tensor) for x in held.values()):
            raise WeightsError(f"{path} does not hold a flat dictionary of tensors")
        self._held, self._bits = held, torch.int16
        self.shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
        self.dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in held.items()}
        _check_dtypes(path, self.dtypes)

    def read(self, name: str, index: Index) -> np.ndarray:
        tensor = self._held[name][index]
        if self.dtypes[name] == "bfloat16":
            return tensor.view(self._bits).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


def _check_dtypes(path: Path, dtypes: Mapping[str, str]) -> None:
    other = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in DTYPES.values()]
    if other:
        raise WeightsError(f"{path} holds tensors that are not {', '.join(DTYPES.values())}: {_some(other)}")


def check(sources: Sources, optional: Mapping[str, Shape], have: Tensors) -> None:
    """Raise WeightsError listing every tensor of ``have`` that is missing, unexpected, not of the shape expected, or of
    another dtype than the same tensor of another layer. Those in ``optional`` may be there."""
    shapes = have.shapes
    want = {name: shape for source in sources.values() for name, shape in source.expected().items()}
    known = {**optional, **want}
    problems = [f"missing {name} {shape}" for name, shape in want.items() if name not in shapes]
    problems += [f"unexpected {name} {shape}" for name, shape in shapes.items() if name not in known]
    problems += [
        f"{name} has shape {shape}, expected {known[name]}"
        for name, shape in shapes.items()
        if name in known and shape != known[name]
    ]
    for source in sources.values():
        found = sorted({have.dtypes[name] for name in source.names if name in shapes})
        if len(found) > 1:
            problems.append(f"{source.names[0]} and the same of other layers have several dtypes: {found}")
    if problems:
        listed = "\n  ".join(problems)
        raise WeightsError(f"{have.path} does not fit the model, {len(problems)} problem(s):\n  {listed}")
