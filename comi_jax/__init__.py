"""COMI context compression for language models, in JAX; ``Comi`` is the class that users import."""

from pathlib import Path as _Path

_ROOT = _Path(__file__).resolve().parent.parent
if (_ROOT / "setup.cfg").is_file():
    # A source checkout: kernels/ and configs/ stand beside this package and are imported as its subpackages.
    __path__.append(str(_ROOT))

from comi_jax.version import __version__ as __version__  # noqa: E402


def __getattr__(name: str):
    """Import ``Comi`` lazily, so that importing a submodule does not import the whole package."""
    if name == "Comi":
        from comi_jax.serving.compressor import Comi

        return Comi
    raise AttributeError(f"module 'comi_jax' has no attribute {name!r}")
