"""Read from the imports: wings stand in a row and look to the left alone; each outside package is known where it is
used."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    "comi_jax." + ".".join(path.relative_to(base).with_suffix("").parts): path
    for base, pattern in ((ROOT / "comi_jax", "**/*.py"), (ROOT, "kernels/*.py"), (ROOT, "configs/*.py"))
    for path in base.glob(pattern)
    if path.name != "__init__.py"
}

# Every module imports the ground, its own wing and the wings to the left of its own.
GROUND = ("errors", "version", "params", "checks", "backbone", "config", "overrides", "cli")
WINGS = (
    "devices", "model", "data", "runs", "weights", "serving", "evaluation", "training", "planning", "benchmarks",
)  # fmt: skip
# Nobody imports a command; a command imports anything.
COMMANDS = (
    "train", "evaluate", "answer", "convert", "plan", "prepare", "pretrain", "report", "diagnose", "compare", "serve",
    "explain", "calibrate",
)  # fmt: skip
# Of the wings to the left, these see only so much.
DOORS = {"data": {"model": {"model.batch"}}, "evaluation": {"runs": set(), "weights": set()}}
NOT = {"model": {"overrides", "cli"}}


def imports(path):
    """Full names of everything that ``path`` imports, inside functions too; of ``from a import b`` both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


IMPORTS = {name: imports(path) for name, path in SOURCES.items()}
INSIDE = {name: {other for other in found if other in SOURCES} for name, found in IMPORTS.items()}
OUTSIDE = {
    name: {other.split(".")[0] for other in found} - {"comi_jax"} - set(sys.stdlib_module_names)
    for name, found in IMPORTS.items()
}


def room(name):
    """The wing of a module, or "ground", "kernels", "configs"; a command is its own."""
    first, _, rest = name.removeprefix("comi_jax.").partition(".")
    return first if rest else "ground" if first in GROUND else first


def may_import(name, other):
    here, there, short = room(name), room(other), other.removeprefix("comi_jax.")
    if there == "ground":
        if here == "ground":
            return GROUND.index(short) < GROUND.index(name.removeprefix("comi_jax."))
        return short not in NOT.get(here, ())
    if there == "kernels":
        return here in ("model", "benchmarks")
    if here not in WINGS or there not in WINGS:
        return False
    if there in DOORS.get(here, {}):
        return short in DOORS[here][there]
    return WINGS.index(there) <= WINGS.index(here)


PLACED = [name for name in SOURCES if room(name) in ("ground", *WINGS)]


def test_every_module_has_its_room():
    other = {name.removeprefix("comi_jax.") for name in SOURCES if name not in PLACED}
    assert {name for name in other if not name.startswith(("kernels.", "configs."))} == set(COMMANDS)
    assert {room(name) for name in PLACED} == {"ground", *WINGS}


@pytest.mark.parametrize("name", PLACED)
def test_a_module_imports_its_own_wing_and_what_stands_to_the_left(name):
    assert [other for other in sorted(INSIDE[name]) if not may_import(name, other)] == []


def test_configs_depend_on_config_alone():
    configs = [name for name in SOURCES if name.startswith("comi_jax.configs.")]
    assert configs
    for name in configs:
        assert INSIDE[name] == {"comi_jax.config"} and not OUTSIDE[name], name


def test_kernels_depend_on_jax_alone():
    for name in SOURCES:
        if name.startswith("comi_jax.kernels."):
            assert OUTSIDE[name] <= {"jax", "jaxtyping"} | ({"numpy"} if name.endswith(".bench") else set()), name
            assert all(other.startswith("comi_jax.kernels.") for other in INSIDE[name]), name


def test_no_module_reaches_itself():
    above = {name: set(found) for name, found in INSIDE.items()}
    while True:
        free = {name for name, found in above.items() if not found}
        if not free:
            break
        above = {name: found - free for name, found in above.items() if name not in free}
    assert not above, f"these import each other in a circle: {sorted(above)}"


@pytest.mark.parametrize("package", ["transformers", "datasets", "tokenizers"])
def test_hugging_face_is_known_in_few_places(package):
    places = ("comi_jax.weights.tokenizer", "comi_jax.data.")
    assert [name for name in SOURCES if package in OUTSIDE[name] and not name.startswith(places)] == []


def test_datasets_is_imported_for_hub_datasets_alone():
    """JSON Lines never go through it: it makes a missing answer None in silence."""
    assert [name for name in SOURCES if "datasets" in OUTSIDE[name]] == ["comi_jax.data.sources"]
    top = ast.parse(SOURCES["comi_jax.data.sources"].read_text()).body
    assert "datasets" not in {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}


@pytest.mark.parametrize("package", ["kernels", "configs"])
def test_what_no_module_imports(package):
    """A top-level ``kernels`` would be Hugging Face's."""
    assert [name for name in SOURCES if package in OUTSIDE[name]] == []


def test_torch_is_imported_for_its_own_files_alone():
    assert [name for name in SOURCES if "torch" in OUTSIDE[name]] == ["comi_jax.weights.files"]
    top = ast.parse(SOURCES["comi_jax.weights.files"].read_text()).body
    assert "torch" not in {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}


def test_the_folders_that_become_subpackages_have_no_init():
    """A ``kernels/__init__.py`` beside transformers would be taken for Hugging Face's package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists() and not (ROOT / "configs" / "__init__.py").exists()


def test_matplotlib_is_imported_where_it_is_used_alone():
    """It is an extra: everything but drawing works without it."""
    users = [
        "comi_jax.evaluation.calibration_plot", "comi_jax.evaluation.comparison_plots",
        "comi_jax.evaluation.diagnostics_plots", "comi_jax.runs.report", "comi_jax.serving.explanation_picture",
    ]  # fmt: skip
    assert sorted(name for name in SOURCES if "matplotlib" in OUTSIDE[name]) == users
    for name in users:
        top = [
            node for node in ast.parse(SOURCES[name].read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        assert "matplotlib" not in str([ast.unparse(node) for node in top])


@pytest.mark.parametrize("package", ["fastapi", "starlette", "uvicorn", "pydantic"])
def test_the_servers_packages_are_imported_by_its_http_alone(package):
    """They are an extra: nothing else needs them, and ``serve`` imports that folder once it knows they are there."""
    assert [name for name in SOURCES if package in OUTSIDE[name] and ".serving.http." not in name] == []
    importers = {name for name, found in INSIDE.items() if any(".serving.http" in other for other in found)}
    assert {name for name in importers if ".serving.http." not in name} == {"comi_jax.serve"}
    top = ast.parse(SOURCES["comi_jax.serve"].read_text()).body
    assert "serving.http" not in str(
        [ast.unparse(node) for node in top if isinstance(node, ast.Import | ast.ImportFrom)]
    )


def test_prometheus_is_imported_by_the_figures_of_the_server_alone():
    assert [name for name in SOURCES if "prometheus_client" in OUTSIDE[name]] == ["comi_jax.serving.telemetry"]
