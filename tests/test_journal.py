"""Lines of a run that may have died in one: whole ones count, up to the first that is none."""

import pytest

from comi_jax.runs import journal

WHOLE = [{"step": 1}, {"step": 2}, {"step": 4, "text": "é\u2028"}]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes('{"step": 1}\n{"step": 2}\n{"step": 4, "text": "é\u2028"}\n'.encode())
    return path


@pytest.mark.parametrize("tail", [b"", b'{"step": 5', b'{"step": 5}', b'\x00\x00\n{"step": 6}\n', b"5\n", b"\xff\n"])
def test_what_stands_before_a_torn_or_damaged_line_is_read(path, tail):
    with path.open("ab") as file:
        file.write(tail)
    assert journal.rows(path) == WHOLE
    journal.keep_until(path, 9)
    assert journal.rows(path) == WHOLE and path.read_bytes().endswith(b"}\n")


def test_what_comes_after_a_step_is_cut_off(path):
    journal.keep_until(path, 3)
    assert journal.rows(path) == WHOLE[:2]


def test_no_file_has_no_rows(tmp_path):
    assert journal.rows(tmp_path / "none") == []
    journal.keep_until(tmp_path / "none", 1)
    assert not list(tmp_path.iterdir())
