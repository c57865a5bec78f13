"""An explanation as one HTML page without a network: ``explanation.html`` with the JSON of the explanation inside."""

import html
import json
import re
from importlib import resources
from typing import Any

TEMPLATE = "explanation.html"
# Inside a script element, the end tag and comments would be seen by HTML before JSON is; these escapes are JSON's own.
UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def page(explanation: dict[str, Any]) -> str:
    """The page of ``explanation``, the value of ``explanation.as_json``. Texts in it are data: no markup or script in
    them has an effect."""
    data = json.dumps(explanation, separators=(",", ":"), allow_nan=False)  # ASCII: no separators that HTML knows
    for letter, escape in UNSAFE.items():
        data = data.replace(letter, escape)
    segments, tokens = len(explanation["segments"]), len(explanation["tokens"]["start"])
    where = f"{explanation['config']}, step {explanation['step']}" if "config" in explanation else ""
    size = f"{tokens:,} tokens in {segments} segment{'s' * (segments > 1)}"
    about = f"{size}, encoded in {explanation['encode_seconds']:.2f} s (compilation included)"
    asked = explanation["views"][0]["question"]
    filled = {
        "title": html.escape(f"What was kept: {' '.join(asked.split())[:80]}"),
        "about": html.escape("; ".join(part for part in (where, about, explanation.get("made", "")) if part)),
        "data": data,
    }
    template = resources.files("comi_jax.serving").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return re.sub(r"{{(\w+)}}", lambda found: filled[found[1]], template)  # in one pass: a text may hold such a name
