"""Commands of fastlt in a process of their own, which end before this one does."""

import subprocess
import sys

from fastlt.utils.signals import exit_on_sigterm


def run_command(*words: str) -> int:
    """Run `fastlt WORDS` on this terminal and return its exit code.

    Where this process is asked to end, by SIGTERM or Ctrl-C, the command is too, and is waited for:
    a training saves first.
    """
    with exit_on_sigterm():
        process = subprocess.Popen([sys.executable, "-m", "fastlt", *words])
        try:
            return process.wait()
        except KeyboardInterrupt:  # which the terminal has sent to the command as well
            process.wait()
            raise
        except BaseException:
            process.terminate()
            process.wait()
            raise
