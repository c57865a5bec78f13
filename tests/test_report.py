"""The report of a run: a picture and one page, or one sentence that says why not."""

import dataclasses
import json
import os
import sys
from html.parser import HTMLParser

import pytest
import train_fixtures
from rich.console import Console

from comi_jax import report as report_command
from comi_jax.config import MEASURES, Compression, Config, Train
from comi_jax.runs import description, logs, report
from comi_jax.version import __version__

TOKENIZER = train_fixtures.tokenizer()


def interval(mean):
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 6}


def write(folder, steps=60, evaluated=True, **settings):
    """A run's folder as it is after its last step, without its weights."""
    plain = Compression(coarse=False, fine=False) if folder.name == "mean_pooling" else Compression()
    config = Config(name="<b>", compression=plain, train=Train(steps=steps, **settings))
    description.write_run(
        folder, description.Run(config, train_fixtures.backbone(num_hidden_layers=8), (2,)), TOKENIZER
    )
    rows = [
        {
            "step": step, "loss": None if step == 7 else 5 / step, "accuracy": 1 - 1 / step, "gradient_norm": 1 / step,
            "learning_rate": 1e-3 / step, "padding": 0.1, "ratio": 3.9, "memory_gb": 0.5, "skipped": int(step >= 7),
        } | ({"tokens_per_second": 1000.0 + step} if step > 1 else {})
        for step in range(1, steps + 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 61')
    measured = {
        step: {"n": 6, "metrics": dict.fromkeys(MEASURES, interval(mean)), "ratio": 3.9}
        for step, mean in ((20, 0.3), (40, 0.7), (60, 0.6))
    }
    if evaluated:
        lines = (json.dumps({"step": step, **row}) + "\n" for step, row in measured.items())
        (folder / "evaluations.jsonl").write_text("".join(lines))
        (folder / "results.json").write_text(
            json.dumps(
                {
                    "COMI": measured[60],
                    "mean-pooling": measured[40],
                    "closed book": measured[20] | {"ratio": 0.0},
                }
            )  # fmt: skip
        )
    return folder


class Reader(HTMLParser):
    """Every tag that opens is closed, nothing is loaded, and what can be read."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.loaded = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.loaded += [value[:30] for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert not reader.open
    return " | ".join(text.strip() for text in reader.text if text.strip()), reader.loaded


def test_a_run_becomes_a_picture_and_one_page_that_needs_no_other_file(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = write(tmp_path / "<run>")
    report_command.main([str(run)])
    assert capsys.readouterr().out.split() == [str(run / "report.png"), str(run / "report.html")]
    assert (run / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    text, loaded = read(run / "report.html")
    assert loaded == ["data:image/png;base64,iVBORw0K"]
    for part in (
        "<b>: COMI |", "Closing table", "<run>: trained 20", "60 of 60", "0.0833", "updates skipped | 1",
        "best evaluated step | 40 (f1_max 0.700)",
        "tokens per second, median | 1,031", "0.600 [0.500, 0.700]", "closed book", "train.steps | 60", "name | <b>",
    ):  # fmt: skip
        assert part in text, part


def test_runs_are_drawn_together_and_their_differences_are_listed(tmp_path):
    pytest.importorskip("matplotlib")
    first, second = write(tmp_path / "a"), write(tmp_path / "b", evaluated=False, seed=7)
    write(first / "mean_pooling", steps=30)
    report_command.main([str(first), str(second), f"--output={tmp_path / 'out'}"])
    text, _ = read(tmp_path / "out" / "report.html")
    assert "<b>: COMI (a), mean-pooling (a), COMI (b)" in text
    header = "Settings that differ: | COMI (a) | mean-pooling (a) | COMI (b)"
    header += " | compression.coarse | True | False | True | compression.fine | True | False | True"
    assert f"{header} | train.seed | 0 | 0 | 7 | train.steps | 60 | 30 | 60" in text
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html", "report.png"]


def test_a_run_that_was_never_evaluated_is_drawn_too(tmp_path):
    pytest.importorskip("matplotlib")
    picture = report.draw(report.read(write(tmp_path / "run", evaluated=False)))
    assert picture[:4] == b"\x89PNG"


def drawn(*folders):
    """The figure of some runs, and its panels by name."""
    pytest.importorskip("matplotlib")
    figure = report.figure_of([course for folder in folders for course in report.read(folder)])
    return figure, {axis.get_title(loc="left"): axis for axis in figure.axes}


def points(axis):
    """The last x and y of every curve of an evaluation panel."""
    return [(bars.lines[0].get_xdata()[-1], bars.lines[0].get_ydata()[-1]) for bars in axis.containers]


def test_the_closing_table_is_the_last_point_of_each_system(tmp_path):
    """A run that is not evaluated on the way has this point alone."""
    run = write(tmp_path / "run")
    write(run / "mean_pooling")
    for folder in (run, run / "mean_pooling"):
        (folder / "evaluations.jsonl").unlink()
    (run / "mean_pooling" / "results.json").unlink()
    _, panels = drawn(run)
    evaluation = panels["evaluation"]
    assert points(evaluation) == [(60, 0.6), (60, 0.7)] and all(
        len(bars[0].get_xdata()) == 1 for bars in evaluation.containers
    )
    assert [text.get_text() for text in evaluation.texts] == ["0.600", "0.700"]  # and no word of a missing evaluation
    assert "dotted: closed book" in evaluation.get_title(loc="right") and "ringed" not in evaluation.get_title(
        loc="right"
    )


def test_an_evaluation_on_the_way_at_the_last_step_is_drawn_once(tmp_path):
    _, panels = drawn(write(tmp_path / "run"))
    (bars,) = panels["evaluation"].containers
    assert list(bars.lines[0].get_xdata()) == [20, 40, 60]
    assert "best ringed" in panels["evaluation"].get_title(loc="right")


def test_a_run_that_goes_on_has_no_last_point_yet(tmp_path):
    """The closing table is of the step where it had ended before."""
    run = write(tmp_path / "run", steps=60)
    (run / "evaluations.jsonl").unlink()
    described = json.loads((run / "config.json").read_text())
    described["config"]["train"]["steps"] = 90
    (run / "config.json").write_text(json.dumps(described))
    _, panels = drawn(run)
    assert not panels["evaluation"].containers
    assert [text.get_text() for text in panels["evaluation"].texts] == ["not evaluated yet"]


def test_the_closing_table_stands_at_the_step_of_its_weights(tmp_path):
    """Also when the run goes on behind it, and when the newest checkpoint was not that of the last step."""
    run = write(tmp_path / "run", steps=60)
    table = json.loads((run / "results.json").read_text())
    table["COMI"]["step"] = 50
    (run / "results.json").write_text(json.dumps(table))
    _, panels = drawn(run)
    (bars,) = panels["evaluation"].containers
    assert list(bars.lines[0].get_xdata()) == [20, 40, 50, 60]


def test_a_picture_says_what_it_shows(tmp_path):
    """The systems by the names of the closing table, the config, the day, the version; equal curves are both seen."""
    run = write(tmp_path / "folder")
    write(run / "mean_pooling")
    os.utime(run / "metrics.jsonl", (0, 86_400 * 365.5))
    figure, panels = drawn(run)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["COMI", "mean-pooling"]
    assert figure.get_suptitle() == "<b>: COMI, mean-pooling"
    (note,) = (text.get_text() for text in figure.texts if text.get_text().startswith("trained"))
    assert note.startswith("trained 1971-01-01 to 20") and note.endswith(f"comi_jax {__version__}")
    first, second = panels["learning rate"].lines
    assert list(first.get_ydata()) == list(second.get_ydata()) and first.get_linewidth() > second.get_linewidth() + 1


def test_runs_in_folders_of_one_name_are_told_apart(tmp_path):
    runs = [write(tmp_path / place / "tiny") for place in ("x", "y")]
    courses = [course for run in runs for course in report.read(run)]
    assert report.labels(courses) == [f"COMI ({run.resolve()})" for run in runs]


def test_a_system_is_called_what_it_is_wherever_its_folder_lies(tmp_path):
    """Mean-pooling drawn on its own is not called COMI."""
    assert [course.title for course in report.read(write(tmp_path / "run" / "mean_pooling"))] == ["mean-pooling"]


def test_tensorboard_shows_the_systems_of_a_run_by_their_titles(tmp_path):
    for folder, title in ((tmp_path / "run", "COMI"), (tmp_path / "run" / "mean_pooling", "mean-pooling")):
        folder.mkdir()
        with logs.RunLog(folder, title, 2, 0, Console(quiet=True)) as log:
            log.measured(1, {"em": 0.5})
    shown = {path.parent.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("events.*")}
    assert shown == {"tensorboard/COMI", "tensorboard/mean-pooling"}


def test_what_cannot_be_drawn_is_one_sentence(tmp_path, monkeypatch):
    run = write(tmp_path / "run")
    for course in report.read(run):
        assert dataclasses.is_dataclass(course) and course.steps[-1]["step"] == 60  # the torn line is left out
    with pytest.raises(SystemExit, match="^error: nowhere is not a COMI checkpoint: it has no config.json$"):
        report_command.main(["nowhere"])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        SystemExit, match=r"^error: .* matplotlib, which is not installed; pip install 'comi-jax\[report\]'$"
    ):
        report_command.main([str(run)])
    monkeypatch.undo()
    (run / "results.json").write_text('{"COMI": {"metrics": 3}}')
    with pytest.raises(SystemExit, match="^error: .*results.json is not a closing table .*to rewrite it$"):
        report_command.main([str(run)])
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(SystemExit, match="^error: .*run has no metrics yet: metrics.jsonl is missing or empty"):
        report_command.main([str(run)])
    assert not (run / "report.png").exists()
