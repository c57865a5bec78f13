"""model.remat=auto: the least recomputation that fits by estimate, and what is said of it."""

import contextlib
import dataclasses
import io
import re

import jax
import pytest
import train_fixtures

from comi_jax import train
from comi_jax.config import Mesh
from comi_jax.devices import sharding
from comi_jax.errors import ConfigError
from comi_jax.model.architecture import Architecture
from comi_jax.overrides import load
from comi_jax.planning.published_models import BACKBONES
from comi_jax.training import estimate, loop, optim, state


@pytest.fixture(scope="module")
def step():
    """A step of qwen2 on one device, by ``estimate.held``, for any remat: 32,256 tokens, 8 encoder layers."""
    config = load("qwen2", ["model.remat=auto"])
    mesh = sharding.make_mesh(Mesh(), jax.devices()[:1])
    arch = Architecture.of(BACKBONES["Qwen/Qwen2-7B-Instruct"], config).on(mesh)
    held, frozen = state.abstract(arch, optim.optimizer(config.optimizer, 10), mesh)
    return arch, (held, frozen, estimate.longest(config), 1, 1, mesh)


def needed(step, remat):
    arch, shapes = step
    arch = dataclasses.replace(arch, runtime=dataclasses.replace(arch.runtime, remat=remat))
    return estimate.held(arch, *shapes).total


def resolved(step, available):
    arch, (held, frozen, lengths, rows, share, mesh) = step
    return estimate.resolve_remat(arch, held, frozen, lengths, rows, share, mesh, available)


def test_more_recomputation_needs_less_memory(step):
    sizes = [needed(step, name) for name in estimate.REMATS]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)


def test_where_everything_fits_nothing_is_computed_again(step):
    arch, told = resolved(step, needed(step, "off"))
    assert arch.runtime.remat == "off" and re.fullmatch(r"model.remat=auto: off, an estimated .* per device", told)


@pytest.mark.parametrize("name, before", list(zip(estimate.REMATS[1:], estimate.REMATS, strict=False)))
def test_where_not_the_lightest_that_fits_is_taken(step, name, before):
    """As soon as a byte is missing for the one before it, and as long as there is one for itself."""
    for available in (needed(step, before) - 1, needed(step, name)):
        arch, told = resolved(step, available)
        assert arch.runtime.remat == name
        assert f"auto: {name}, " in told and f", {before} would need {needed(step, before) / 1e9:.1f} GB" in told


def test_where_nothing_fits_one_sentence_says_what_to_do(step):
    with pytest.raises(
        ConfigError, match=r"needs an estimated .* even if everything is recomputed.*mesh.fsdp"
    ) as error:
        resolved(step, needed(step, "full") - 1)
    assert "\n" not in str(error.value)


def test_what_is_named_is_obeyed(step):
    arch, shapes = step
    named = dataclasses.replace(arch, runtime=dataclasses.replace(arch.runtime, remat="full"))
    assert resolved((named, shapes), 0) == (named, "")


def test_a_run_says_what_it_took(tmp_path, monkeypatch):
    data = train_fixtures.write(tmp_path / "train.jsonl", train_fixtures.records(8))
    lm = train_fixtures.language_model(tmp_path / "lm")
    words = [*train_fixtures.command(lm, data, tmp_path / "run", "model.remat=auto"), "--dry-run"]
    monkeypatch.setattr(loop, "describe", lambda job, console: None)  # which would compile
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train.main(words)
    assert "COMI: model.remat=auto: off, an estimated 0.0 of" in printed.getvalue()
    monkeypatch.setattr(estimate, "available_bytes", lambda device: 1000)
    with pytest.raises(SystemExit, match="error: a train step needs an estimated"):
        train.main(words)
