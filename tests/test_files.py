"""Files are written whole or not at all."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from svit.files import atomic_write, is_special, write_csv


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


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path, there):
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "a.txt", tmp_path / "b.txt"
    if there:
        target.write_text("before")
    link.symlink_to(target)
    with atomic_write(link) as part:
        assert part.name == "b.txt"
        part.write_text("after")
    assert link.is_symlink()
    assert target.read_text() == "after"
    assert sorted(os.listdir(tmp_path)) == ["b.txt", "disk"]
    assert os.listdir(tmp_path / "disk") == ["a.txt"]


def test_a_pipe_gets_the_bytes(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_csv(pipe, [{"top1": 1}])
    reader.join()
    assert read == [b"top1\n1\n"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


def test_what_is_special(tmp_path):
    file = tmp_path / "a.txt"
    file.touch()
    assert not any(map(is_special, (file, tmp_path, tmp_path / "none")))
    assert is_special(Path(os.devnull))


def test_an_open_file_gets_the_bytes_where_it_stands(tmp_path):
    """As `svit flops MODEL --json /dev/stdout >> FILE` does."""
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    (tmp_path / "out.txt").write_text("before\n")
    script = "import sys; from pathlib import Path; from svit.files import write_csv\n"
    script += "print('first'); write_csv(Path(sys.argv[1]), [{'top1': 1}]); print('last')"
    with (tmp_path / "out.txt").open("a") as file:
        subprocess.run([sys.executable, "-c", script, tmp_path / "stdout"], stdout=file, check=True)
    assert (tmp_path / "out.txt").read_text() == "before\nfirst\ntop1\n1\nlast\n"
    assert (tmp_path / "stdout").is_symlink()
