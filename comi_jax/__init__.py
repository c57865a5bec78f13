"""COMI context compression for language models, in JAX; ``Comi`` is the class that users import."""

import importlib as _importlib
from pathlib import Path as _Path

_ROOT = _Path(__file__).resolve().parent.parent
if (_ROOT / "setup.cfg").is_file():
    # A source checkout: kernels/ and configs/ stand beside this package and are imported as its subpackages.
    __path__.append(str(_ROOT))

from comi_jax.version import __version__ as __version__  # noqa: E402

_OFFERED = {
    "Comi": "comi_jax.serving.compressor",
    "Document": "comi_jax.serving.documents",
    "DocumentStore": "comi_jax.serving.store",
}


def __getattr__(name: str):
    """Import ``Comi`` and the classes beside it lazily, so that importing a submodule does not import the whole
    package."""
    if name in _OFFERED:
        return getattr(_importlib.import_module(_OFFERED[name]), name)
    raise AttributeError(f"module 'comi_jax' has no attribute {name!r}")
