import subprocess
import sys

import pytest

from fastlt.errors import UserError
from fastlt.utils.lock import alone_in, is_at_work
from fastlt.utils.run_files import check_has_model, check_out, read_result


@pytest.fixture
def stopped(tmp_path):
    (tmp_path / "config.toml").write_text("")
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0}\n{"epoch": 1}\n{"ep')
    return tmp_path


@pytest.mark.parametrize("look", [check_has_model, read_result])
def test_a_run_that_was_stopped_says_how_it_goes_on(look, stopped):
    message = r"has stopped after 2 epochs: go on with `fastlt train .*config\.toml --data PACK"
    with pytest.raises(UserError, match=message):
        look(stopped)


def test_a_run_that_still_trains_says_so(stopped):
    held = f"""
import sys
from pathlib import Path
from fastlt.utils.lock import alone_in
with alone_in(Path({str(stopped)!r}), "another training"):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="still trains, 2 epochs are done: wait for its end"):
            check_has_model(stopped)
        process.communicate()
    assert not is_at_work(stopped)


def test_looking_at_a_lock_leaves_it_free(stopped):
    with alone_in(stopped, "another training"):
        assert is_at_work(stopped)
    assert not is_at_work(stopped) and not is_at_work(stopped / "nowhere")


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no run at"):
        check_has_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a run"):
        check_has_model(tmp_path)


def test_a_run_is_not_begun_among_other_files(tmp_path):
    check_out(tmp_path / "new")
    check_out(tmp_path)
    (tmp_path / "train.log").touch()
    (tmp_path / ".hidden").touch()
    check_out(tmp_path)
    (tmp_path / "cat.jpg").touch()
    with pytest.raises(UserError, match=r"is no run, it holds cat\.jpg: name a new folder"):
        check_out(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        check_out(tmp_path / "cat.jpg")
    (tmp_path / "manifest.json").touch()
    with pytest.raises(UserError, match="is a pack"):
        check_out(tmp_path)
    (tmp_path / "config.toml").touch()
    check_out(tmp_path)
