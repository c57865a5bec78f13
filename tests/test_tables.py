"""Tables as people see them."""

import io

from rich.console import Console

from comi_jax import cli
from comi_jax.evaluation.tables import print_table

INTERVAL = {"mean": 0.123, "low": 0.1, "high": 0.2}
ROW = {"n": 512, "ratio": 7.8, "metrics": {"em": INTERVAL, "f1_max": INTERVAL}}
TITLES = ("COMI", "mean-pooling", "closed book", "another system")


def test_in_a_log_no_interval_breaks_over_two_lines(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr("sys.stdout", log)
    monkeypatch.delenv("COLUMNS", raising=False)
    print_table(dict.fromkeys(TITLES, ROW), Console(width=cli.width(), soft_wrap=True, markup=False))
    for line in log.getvalue().splitlines():
        assert line.count("0.123 [0.100, 0.200]") == 4 * line.startswith(("│ em", "│ f1"))
        assert len(line) < 120  # no wider than it needs


def test_columns_that_the_user_names_are_obeyed(monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    assert Console(width=cli.width()).width == 70
