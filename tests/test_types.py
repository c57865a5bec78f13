"""The exceptions from the type checker, pyright, which ``.ci/run`` runs: each names its rule and is counted here."""

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path for folder in ("comi_jax", "kernels", "configs") for path in sorted((ROOT / folder).rglob("*.py"))]

# A new one is entered here, and says beside itself why the type is right although pyright does not see it.
EXCEPTIONS = {
    "reportArgumentType": 7,
    "reportAttributeAccessIssue": 2,
    "reportIncompatibleMethodOverride": 1,
    "reportOverlappingOverload": 3,
}


def comments():
    return [line for path in SOURCES for line in path.read_text(encoding="utf-8").splitlines() if "pyright:" in line]


def test_every_exception_from_the_type_checker_is_counted():
    rules = [rule.strip() for line in comments() for found in re.findall(r"# pyright: ignore\[([^\]]+)\]", line)
             for rule in found.split(",")]  # fmt: skip
    assert Counter(rules) == EXCEPTIONS


def test_no_exception_is_without_its_rule():
    """``# type: ignore`` and a bare ``# pyright: ignore`` silence all that comes to stand on the line."""
    assert [
        line for line in comments() if line.count("pyright:") != len(re.findall(r"# pyright: ignore\[", line))
    ] == []
    assert [path for path in SOURCES if re.search(r"#\s*type:\s*ignore", path.read_text(encoding="utf-8"))] == []


def test_the_tools_have_the_same_versions_everywhere():
    """The hooks before a commit and the checks of all of it give one verdict."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    extras = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    (here,) = set(re.findall(r"ruff==([\d.]+)", hooks))
    assert re.findall(r"ruff==([\d.]+)", extras) == [here]


def test_the_folders_that_become_subpackages_are_found_by_the_type_checker():
    """``typings`` leads to them by links. What is not found is of unknown type, about which nothing is wrong."""
    for name in ("kernels", "configs"):
        here, there = ({path.name: path.read_bytes() for path in folder.glob("*.py")}
                       for folder in (ROOT / name, ROOT / "typings" / "comi_jax" / name))  # fmt: skip
        assert here and here == there
