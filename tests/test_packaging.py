"""What is installed is what stands here: every folder of the package is in the wheel, and the wheel works alone."""

import configparser
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IMPORT_ALL = """
import importlib, pkgutil, sys
import comi_jax, comi_jax.configs, comi_jax.kernels
assert sys.prefix in comi_jax.__file__, comi_jax.__file__
for package in (comi_jax, comi_jax.configs, comi_jax.kernels):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
"""


def test_setup_cfg_lists_every_folder_of_the_package():
    """A folder that is not listed imports from a checkout and is missing from the wheel."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    listed = settings["options"]["packages"].split()
    assert len(listed) == len(set(listed))
    folders = {path.parent for path in (ROOT / "comi_jax").rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(listed) == names | {"comi_jax.kernels", "comi_jax.configs"}


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_of_its_own(tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(pip, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", f"{wheel}[report,serve]"], check=True)
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, "-c", IMPORT_ALL], check=True, cwd=tmp_path, env=alone)
    words = ["train.steps=3", "data.synthetic_examples=64", "data.eval_examples=8", "train.compare_mean_pooling=false"]
    subprocess.run([python, "-m", "comi_jax.train", "--config=tiny", *words], check=True, cwd=tmp_path, env=alone)
    assert (tmp_path / "runs" / "tiny" / "results.json").is_file()
