"""Which files of a Hugging Face folder are the model: those that transformers' from_pretrained takes, or a refusal."""

import functools
import json
import logging
from pathlib import Path

from comi_jax.devices import distributed
from comi_jax.weights.hf_config import adapter, read_object
from comi_jax.weights.layout import WeightsError, some

# In transformers' order: a whole file before an index, safetensors before PyTorch's files. A config.json that names its
# weights goes before all of them.
ENTRIES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


@functools.cache
def tell(words: str) -> None:
    """Log ``words`` as a warning, once, by the first process alone."""
    if distributed.is_first():
        logging.getLogger("comi_jax").warning(words)


def entry_point(folder: Path) -> Path:
    """The file or the index that the weights of ``folder`` are read from. Raises WeightsError where there is none."""
    named = _named(folder)
    if named is not None:
        return named
    there = [name for name in ENTRIES if (folder / name).is_file()]
    if there:
        return folder / there[0]
    if adapted := adapter(folder):
        raise WeightsError(adapted)
    found = f"; it holds {some(others)}" if (others := _weights(folder)) else ""
    raise WeightsError(f"{folder} has none of {', '.join(ENTRIES)}, which a model is read from{found}")


def _named(folder: Path) -> Path | None:
    """What config.json says under ``transformers_weights``."""
    path = folder / "config.json"
    name = read_object(path).get("transformers_weights") if path.is_file() else None
    if name is None:
        return None
    if not isinstance(name, str) or Path(name).name != name:
        raise WeightsError(f"{path} names the weights {name!r:.80}, which is no file of its own folder")
    if not name.endswith((".safetensors", ".safetensors.index.json")):
        raise WeightsError(f"{path} names the weights {name!r:.80}; safetensors or their index are expected")
    if not (folder / name).is_file():
        raise WeightsError(f"{path} names the weights {name!r:.80}, which are not there: add them or take the name out")
    return folder / name


def shards(index: Path) -> list[str]:
    """The files that ``index`` names, all of whose tensors belong to the model: which of them each is in, the files
    say. Raises WeightsError for what is no index and for files that are not there."""
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
    """The files of weights in ``folder`` that are not read: those that could be taken for the model, and all others."""
    entry = entry_point(folder)
    read = {entry.name, *(shards(entry) if entry.suffix == ".json" else ())}
    others = [name for name in ENTRIES if (folder / name).is_file() and name not in read]
    return others, [name for name in _weights(folder) if name not in read and name not in others]


def _weights(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in WEIGHTS)
