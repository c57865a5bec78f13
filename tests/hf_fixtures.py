"""Tiny models in folders as transformers writes them, and their config.json."""

import functools
import json

import pytest
import tiny_models

KINDS = list(tiny_models.BACKBONES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> a folder as transformers writes it, and its model."""
    pytest.importorskip("torch")

    @functools.cache
    def make(kind):
        model = tiny_models.transformers_model(kind)
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        return folder, model

    return make


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def rewrite(folder, tmp_path, **changes):
    """A copy of ``folder``'s config.json with ``changes``; None takes an entry away."""
    values = config_of(folder) | changes
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return tmp_path
