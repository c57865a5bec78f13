"""In place of jaxtyping where it is not installed, as in most accelerators' images: annotations that say nothing.

Imported for its effect, before the modules that are annotated. For ``benchmarks.device`` alone, which checks no types;
everything else installs the package with its requirements.
"""

import importlib
import sys
import types
from typing import Any

import jax


class _Annotation:
    """``Float[Array, "B T D"]`` is the array type."""

    def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
        return item[0]


try:
    importlib.import_module("jaxtyping")
except ModuleNotFoundError:
    stand_in = types.ModuleType("jaxtyping")
    vars(stand_in).update({name: _Annotation for name in ("Bool", "Float", "Int", "UInt32")}, Array=jax.Array)
    sys.modules["jaxtyping"] = stand_in
