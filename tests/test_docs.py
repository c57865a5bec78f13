"""What the documents name exists: links, paths, modules, commands with their flags, settings, functions, tests."""

import ast
import configparser
import functools
import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest

from comi_jax.config import Config
from comi_jax.errors import ConfigError
from comi_jax.overrides import load, override, to_dict
from comi_jax.version import __version__

ROOT = Path(__file__).resolve().parents[1]
DOCS = {path.relative_to(ROOT).as_posix(): path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))}
TEXTS = DOCS | {
    path.relative_to(ROOT).as_posix(): path for folder in ("configs", "launch") for path in (ROOT / folder).iterdir()
    if path.suffix in (".py", ".sh", ".yaml")
}  # fmt: skip
CONFIGS = (Config(), *(load(path.stem) for path in sorted((ROOT / "configs").glob("*.py"))))
SECTIONS = {name: set(values) for name, values in to_dict(Config()).items() if isinstance(values, dict)}
COMMANDS = (
    "train", "evaluate", "answer", "convert", "plan", "prepare", "pretrain", "report", "diagnose", "compare", "serve",
    "explain", "calibrate",
)  # fmt: skip
CONVERSIONS = ("import-hf", "import-official", "export-official", "export-hf", "inspect")
# Of tensorboard, hf, vLLM, pytest-xdist, kubectl, pyright and chromium.
OF_OTHERS = {
    "--logdir", "--local-dir", "--enable-prompt-embeds", "--dist", "--force", "--pythonpath", "--headless",
    "--hide-scrollbars", "--window-size", "--screenshot",
}  # fmt: skip
PATH = re.compile(r"(?<![\w./*-])(?:comi_jax|kernels|configs|launch|tests|docs|\.ci)/[\w./*-]*")
SETTING = re.compile(
    rf"(?<![\w./-])(?:{'|'.join(SECTIONS)})\.(?!(?:py|jsonl?|safetensors)\b|model\.)\w+(?:=[^\s`'\")]+)?"
)


def code(text, fenced=True):
    """The pieces of code in a document: lines of its blocks (if ``fenced``), continued ones joined, and inline ones."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return (lines if fenced else []) + [re.sub(r"\s+", " ", piece) for piece in inline]


def pieces(path):
    text = path.read_text(encoding="utf-8")
    return code(text) if path.suffix == ".md" else text.replace("\\\n", " ").splitlines()


def pytest_generate_tests(metafunc):
    for name, values in (("doc", DOCS), ("text", TEXTS)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, list(values.values()), ids=list(values))


def slug(heading):
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_links_lead_somewhere(doc):
    for target in re.findall(r"\]\(([^)\s]+)\)", doc.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (doc.parent / name).resolve() if name else doc
        assert path.is_relative_to(ROOT) and path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            assert anchor in {slug(heading) for heading in headings}, target


def test_paths_exist(doc):
    for piece in pieces(doc):
        for name in PATH.findall(piece):
            assert list(ROOT.glob(name.rstrip("."))), f"{name} in {piece!r}"


def is_module(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_modules_and_commands_exist(text):
    for piece in pieces(text):
        for name in re.findall(r"(?<![\w./'])comi_jax(?:\.\w+)+", piece):
            if name.split(".")[-1] in ("NAME", "yaml"):
                name = name.rpartition(".")[0]
            assert is_module(name) or is_module(name.rpartition(".")[0]), f"{name} in {piece!r}"
        for name in re.findall(r"python -m (comi_jax[\w.]*)", piece):
            assert is_module(name.removesuffix(".NAME").rstrip(".")), f"{name} in {piece!r}"
        for name in re.findall(r"--config=([a-z]\w*)", piece):
            assert (ROOT / "configs" / f"{name}.py").is_file(), f"{name} in {piece!r}"


@functools.cache
def flags(module, *words):
    """The flags in the --help of a command."""
    main, kept = importlib.import_module(module).main, sys.argv
    said = []
    try:
        sys.argv = [module, *words, "--help"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "argparse.ArgumentParser._print_message", lambda self, message, file=None: said.append(message)
            )
            with pytest.raises(SystemExit) as end:
                main()
    finally:
        sys.argv = kept
    assert end.value.code == 0
    return frozenset(re.findall(r"(?<![\w-])--[a-z][\w-]*", "".join(said)))


def every_flag():
    benchmarks = [f"comi_jax.benchmarks.{path.stem}" for path in (ROOT / "comi_jax" / "benchmarks").glob("[a-z]*.py")]
    found = set(OF_OTHERS)
    for module in (*(f"comi_jax.{name}" for name in COMMANDS), *benchmarks, "comi_jax.kernels.bench"):
        found |= flags(module)
    return found.union(*(flags("comi_jax.convert", name) for name in CONVERSIONS))


def test_flags_are_those_of_the_commands(text):
    """Of the command that a piece of code begins with, or else of any."""
    for piece in pieces(text):
        given = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", piece))
        named = re.search(
            rf"(?:python -m comi_jax\.|^)({'|'.join(COMMANDS)}|benchmarks\.[a-z]\w*|kernels\.bench)\b(.*)", piece
        )
        if not given or text.suffix == ".sh" or (text.suffix == ".py" and not named):
            continue
        script = re.search(r"python (tests/\w+\.py)", piece)
        if script:
            known = set(re.findall(r"\"(--[a-z][\w-]*)\"", (ROOT / script[1]).read_text(encoding="utf-8")))
        elif not named:
            known = every_flag()
        elif named[1] == "convert":
            known = flags("comi_jax.convert", next(word for word in CONVERSIONS if word in named[2]))
        else:
            known = flags(f"comi_jax.{named[1]}")
            given = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", named[2]))
        assert given <= known, f"{sorted(given - known)} in {piece!r}"


def takes(config, words):
    try:
        override(config, words)
    except ConfigError:
        return False
    return True


def test_settings_exist_and_take_what_is_written(text):
    for piece in pieces(text) if text.suffix != ".py" else [text.read_text(encoding="utf-8").split('"""')[1]]:
        words = SETTING.findall(piece)
        for word in words:
            section, _, leaf = word.partition("=")[0].partition(".")
            assert leaf in SECTIONS[section], f"{word} in {piece!r}"
        given = [word.rstrip(".,;") for word in words if "=" in word]
        assert not given or any(takes(config, given) for config in CONFIGS), f"no config takes {given}"


@pytest.mark.parametrize("name", DOCS)
def test_functions_and_tests_exist(name):
    """`NAME` in `path.py` and `path.py`: `NAME`; `test_...`."""
    text = re.sub(r"\s+", " ", DOCS[name].read_text(encoding="utf-8"))
    named = [
        (file, names) for names, file in re.findall(r"((?:`[\w.]+`(?:, | and )?)+) (?:in|of) `([\w/]+\.py)`", text)
    ]
    named += re.findall(r"`([\w/]+\.py)`: (`[\w.]+`)", text)
    for file, names in named:
        path = ROOT / file
        assert path.is_file(), file
        defined = definitions(path)
        for one in re.findall(r"`([\w.]+)`", names):
            assert one in defined or one in SETTING_NAMES, f"{one} in {file}"
    tests = set().union(*(definitions(path) for path in (ROOT / "tests").glob("test_*.py")))
    for one in re.findall(r"`(test_\w+)`", text):
        assert one in tests, one


SETTING_NAMES = {f"{section}.{leaf}" for section, leaves in SECTIONS.items() for leaf in leaves}


@functools.cache
def definitions(path):
    """Names of a module: functions, classes with their methods, constants."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        for target in (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        ):
            found |= {name.id for name in ast.walk(target) if isinstance(name, ast.Name)}
    return found


def test_the_architecture_page_lists_every_file_in_its_wing():
    text = DOCS["docs/architecture.md"].read_text(encoding="utf-8")
    sections = re.findall(r"^### ((?:comi_jax|kernels)/\S*)\n(.*?)(?=^##)", text, re.M | re.S)
    folders = {path.parent for path in (ROOT / "comi_jax").rglob("*.py")} | {ROOT / "kernels"}
    assert {ROOT / folder for folder, _ in sections} == folders
    for folder, section in sections:
        listed = re.findall(r"^\| `(\w+\.py)` \|", section, re.M)
        there = {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
        assert sorted(listed) == sorted(there), f"docs/architecture.md and {folder} differ"


def test_what_is_installed_by_name_is_there():
    """Extras that documents name, files that setup.cfg ships, and one version everywhere."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    extras = set(settings["options.extras_require"])
    for path in DOCS.values():
        assert set(re.findall(r"'\.\[(\w+)\]'", path.read_text(encoding="utf-8"))) <= extras
    for pattern in settings["options.package_data"]["comi_jax"].split():
        assert list((ROOT / "comi_jax").glob(pattern)), pattern
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_readme_has_the_command_that_continuous_integration_runs():
    lines = DOCS["README.md"].read_text(encoding="utf-8").splitlines()
    (command,) = [line for line in lines if line.startswith("python3 -m venv .venv-test ")]
    assert command.endswith("-m pytest -q -n 2 --dist loadfile")
    assert "^python3 -m venv \\.venv-test " in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
