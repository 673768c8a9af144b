"""Progress of long work."""

from fledge.conf.progress import Progress


def test_without_a_terminal_progress_is_whole_lines(capsys):
    progress = Progress("dump", 2, "sample")
    progress.update()
    progress.update()
    progress.close()
    err = capsys.readouterr().err
    assert "\r" not in err
    assert err.splitlines()[-1].startswith("dump: 2/2, ")
