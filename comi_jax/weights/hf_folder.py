"""The weight files of a Hugging Face folder: the ones that from_pretrained of transformers loads."""

import functools
import json
import logging
from pathlib import Path

from comi_jax.devices import distributed
from comi_jax.weights.hf_config import adapter, read_object
from comi_jax.weights.layout import WeightsError, some

# In transformers' order: a single file before an index, safetensors before PyTorch files. A file that config.json names
# takes precedence over all of them.
ENTRIES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


@functools.cache
def tell(words: str) -> None:
    """Log ``words`` as a warning: only once, and only on the first process."""
    if distributed.is_first():
        logging.getLogger("comi_jax").warning(words)


def entry_point(folder: Path) -> Path:
    """The weight file or index that ``folder`` is loaded from. Raises WeightsError if there is none."""
    named = _named(folder)
    if named is not None:
        return named
    there = [name for name in ENTRIES if (folder / name).is_file()]
    if there:
        return folder / there[0]
    if adapted := adapter(folder):
        raise WeightsError(adapted)
    found = f"; it holds {some(others)}" if (others := _weights(folder)) else ""
    raise WeightsError(f"{folder} has none of {', '.join(ENTRIES)}{found}")


def _named(folder: Path) -> Path | None:
    """The file that config.json names as ``transformers_weights``, or None. Raises WeightsError if it is unusable."""
    path = folder / "config.json"
    name = read_object(path).get("transformers_weights") if path.is_file() else None
    if name is None:
        return None
    if not isinstance(name, str) or Path(name).name != name:
        raise WeightsError(f"{path} names the weights {name!r:.80}, which is not a file in its own folder")
    if not name.endswith((".safetensors", ".safetensors.index.json")):
        raise WeightsError(f"{path} names the weights {name!r:.80}; safetensors or their index are expected")
    if not (folder / name).is_file():
        raise WeightsError(
            f"{path} names the weights {name!r:.80}, which do not exist: add them or remove the attribute"
        )
    return folder / name


def shards(index: Path) -> list[str]:
    """The files that ``index`` names. All their tensors belong to the model; the index's map of tensors to files is not
    used. Raises WeightsError if it is not a valid index or names files that are missing or in other folders."""
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        plain = all(isinstance(name, str) and Path(name).name == name for name in listed)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{index} is not an index of weight files: {error!r:.200}") from None
    if not plain:
        raise WeightsError(f"{index} names files outside its own folder")
    missing = sorted({name for name in listed if not (index.parent / name).is_file()})
    if missing:
        raise WeightsError(f"{index} names files that are not there: {some(missing)}")
    return sorted(set(listed))


def beside(folder: Path) -> tuple[list[str], list[str]]:
    """The weight files in ``folder`` that are not read: those that could be mistaken for the model, and the others."""
    entry = entry_point(folder)
    read = {entry.name, *(shards(entry) if entry.suffix == ".json" else ())}
    others = [name for name in ENTRIES if (folder / name).is_file() and name not in read]
    return others, [name for name in _weights(folder) if name not in read and name not in others]


def _weights(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in WEIGHTS)
