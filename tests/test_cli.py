"""What all commands share: text in any encoding, pipes that close, paths from the home folder, one sentence."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from comi_jax import cli, overrides
from comi_jax.runs.folder import Folder

ROOT = Path(__file__).parent.parent
SAY = """
import sys
from comi_jax import cli
parser = cli.Parser(prog="say")
parser.add_argument("word")
word = parser.parse_args().word
with cli.one_way_out():
    print(word * int(sys.stdin.readline()))
print("to the end", file=sys.stderr)
"""


def say(word, times=1, encoding="utf-8", out=subprocess.PIPE):
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SAY, word]
    return subprocess.run(command, input=f"{times}\n".encode(), stdout=out, stderr=subprocess.PIPE, env=environment)


def test_letters_that_the_terminal_lacks_are_replaced():
    done = say("ein Löwe 東京", encoding="ascii")
    assert (done.returncode, done.stdout) == (0, b"ein L?we ??\n") and done.stderr == b"to the end\n"
    assert say("ein Löwe 東京").stdout.decode() == "ein Löwe 東京\n"


@pytest.mark.parametrize("times", [1, 100_000])
def test_a_closed_pipe_is_silence_and_the_command_goes_on_to_its_end(times):
    read, write = os.pipe()
    os.close(read)
    done = say("word", times, out=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"to the end\n")


def test_a_pipe_that_is_full_is_no_closed_one():
    done = say("word", 100_000)
    assert done.stdout == b"word" * 100_000 + b"\n"


def test_bytes_that_are_not_utf_8_are_refused_in_one_sentence():
    done = say(b"caf\xe9")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.decode() == (
        "error: argument 1, 'caf\N{REPLACEMENT CHARACTER}', has bytes that are not UTF-8; give it as UTF-8 text\n"
    )


@pytest.mark.parametrize("module", ["train", "evaluate", "answer", "convert", "plan", "prepare", "pretrain", "report"])
def test_every_command_refuses_them(module):
    command = __import__(f"comi_jax.{module}", fromlist=["main"])
    with pytest.raises(SystemExit, match="argument 2, .* has bytes that are not UTF-8"):
        command.main(["--output=x", "a\udcff"])


def test_a_leading_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["train.output=~/run", "model.path=~/lm", "model.tokenizer=~/lm"]
    config = overrides.load("tiny", words)
    assert (config.train.output, config.model.path) == (f"{tmp_path}/run", f"{tmp_path}/lm") == (
        str(Folder("~/run")), cli.path("~/lm")
    )  # fmt: skip
    assert config.model.tokenizer == config.model.path and cli.path("a~b") == "a~b"
    parser = cli.Parser()
    parser.add_argument("--output", type=cli.path)
    assert parser.parse_args(["--output=~/x"]).output == f"{tmp_path}/x"


def test_every_path_option_of_a_command_is_a_path():
    plain = []
    for file in [*(ROOT / "comi_jax").glob("*.py"), *(ROOT / "comi_jax" / "benchmarks").glob("*.py")]:
        for call in file.read_text(encoding="utf-8").split("add_argument(")[1:]:
            call = call.split("add_argument")[0]
            name = call.split('"')[1]
            if name in ("--checkpoint", "--output", "--context", "--backbone", "--json", "--folder", "runs", "path"):
                plain += (
                    []
                    if any(w in call.split("help=")[0] for w in ("type=cli.path", "at_least", "choices="))
                    else [(file.name, name)]
                )
        assert "argparse.ArgumentParser(" not in file.read_text(encoding="utf-8")
    assert not plain


@pytest.mark.parametrize(
    "text, axes",
    [("fsdp=8", (1, 8, 1, 1)), ("tensor=4,fsdp=2", (1, 2, 4, 1)), ("data=2,context=4", (2, 1, 1, 4))]
    + [(text, None) for text in ("", "8", "fsdp", "fsdp=0", "fsdp=-1", "fsdp=8,", "rows=2", "fsdp=two")],
)
def test_a_mesh_is_its_axes(text, axes, capsys):
    parser = cli.Parser(prog="x")
    cli.add_mesh(parser)
    if axes is None:
        with pytest.raises(SystemExit):
            parser.parse_args([f"--mesh={text}"])
        assert (
            "is not an axis (data, fsdp, tensor, context) and its number of devices, as fsdp=8"
            in capsys.readouterr().err
        )
    else:
        assert dataclasses.astuple(parser.parse_args([f"--mesh={text}"]).mesh) == axes
        assert parser.parse_args([]).mesh is None
