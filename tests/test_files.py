"""Files are written whole or not at all."""

import os

import pytest

from svit.files import write_csv


def test_csv(tmp_path):
    path = tmp_path / "rows.csv"
    write_csv(path, [{"name": "Käse, alt", "top1": 1.5}, {"name": "b", "top1": None}])
    assert path.read_bytes() == 'name,top1\n"Käse, alt",1.5\nb,\n'.encode()


def test_rows_of_other_keys_leave_the_file_as_it_was(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("before")
    with pytest.raises(ValueError, match="top5"):
        write_csv(path, [{"top1": 1}, {"top1": 2, "top5": 3}])
    assert os.listdir(tmp_path) == ["rows.csv"]
    assert path.read_text() == "before"
