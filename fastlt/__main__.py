"""The entry point: a UserError becomes one line and exit code 2; anything else is a defect of ours
and keeps its traceback.
"""

import sys
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape

from fastlt.errors import UserError
from fastlt.utils.files import is_disk_full


def main() -> None:
    """Run the command line of this process."""
    from fastlt.cli import app

    speak_to_the_user(app)


def speak_to_the_user(app: Callable[[], object]) -> None:
    """Run a command line."""
    try:
        app()
    except UserError as error:
        Console(stderr=True).print(
            f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True
        )
        sys.exit(2)
    except OSError as error:
        if not is_disk_full(error):
            raise
        where = f" with {error.filename}" if error.filename else ""
        Console(stderr=True).print(
            f"[bold red]error:[/] the disk{escape(where)} is full: free some space", highlight=False
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
