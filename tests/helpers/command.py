"""The command line of fastlt in this process: nothing is imported again."""

import contextlib
import io
import subprocess
import sys
from unittest import mock

from fastlt.__main__ import main


def fastlt(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the words of a command; return its exit code and what it said."""
    words, out, err = ["fastlt", *map(str, arguments)], io.StringIO(), io.StringIO()
    code: object = 0
    with (
        mock.patch.object(sys, "argv", words),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
    assert isinstance(code, int), code
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
