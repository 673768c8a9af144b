"""Progress of long work."""

import time

from fledge.conf.runtime.progress import Progress


def test_without_a_terminal_progress_is_whole_lines(capsys):
    progress = Progress("dump", 2, "sample")
    progress.update()
    progress.update()
    progress.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert "\r" not in line
    assert line.startswith("dump: 2/2, ")


def test_without_a_terminal_work_that_has_just_begun_is_no_line(capsys, monkeypatch):
    monkeypatch.setattr("fledge.conf.runtime.progress.LINE_EVERY_S", 0.2)
    progress = Progress("prompts", None, "row")
    progress.update()
    assert not capsys.readouterr().err
    time.sleep(0.25)
    progress.update()
    assert capsys.readouterr().err.startswith("prompts: 2 row, ")
    progress.close()
