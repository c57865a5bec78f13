"""Where compiled programs are kept, and how that is switched off."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from comi_jax.devices import compilations

ROOT = Path(__file__).parent.parent
SETTINGS = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture(autouse=True)
def settings():
    before = {name: jax.config.values[name] for name in SETTINGS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("COMI_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert compilations.folder() == tmp_path / "cache" / "comi_jax"
    monkeypatch.setenv("COMI_CACHE", str(tmp_path / "other"))
    assert compilations.folder() == tmp_path / "other" and (tmp_path / "other").is_dir()
    monkeypatch.setenv("COMI_CACHE", "off")
    assert compilations.folder() is None


def test_without_a_writable_folder_everything_is_compiled(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMI_CACHE", str(tmp_path / "file" / "below"))
    jax.config.update("jax_compilation_cache_dir", None)
    compilations.keep()
    assert compilations.folder() is None and jax.config.values["jax_compilation_cache_dir"] is None


def test_the_users_own_cache_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("COMI_CACHE", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", "mine")
    compilations.keep()
    assert jax.config.values["jax_compilation_cache_dir"] == "mine"


def test_a_second_process_compiles_nothing(tmp_path):
    """And computes the same."""
    program = (
        "import jax, jax.numpy as jnp; from comi_jax.devices import compilations; compilations.WORTH_KEEPING = 0.0; "
        "compilations.keep(); events = []; "
        "jax.monitoring.register_event_listener(lambda name, **_: events.append(name)); "
        "print(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).sum(), "
        "'/jax/compilation_cache/cache_hits' in events)"
    )
    environment = os.environ | {"COMI_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    said = [
        subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    (first, missed), (second, hit) = (done.stdout.split() for done in said)
    assert (first, missed, hit) == (second, "False", "True") and not said[1].stderr


def test_programs_are_dropped_where_there_are_many(monkeypatch):
    double = jax.jit(lambda x: 2 * x)
    double(1.0)
    compilations.drop_if_many()
    assert double._cache_size() == 1
    monkeypatch.setattr(compilations, "MAPPINGS", 1)
    compilations.drop_if_many()
    assert double._cache_size() == 0 and double(1.0) == 2.0
