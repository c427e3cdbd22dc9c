"""The entry point: a UserError becomes one line and exit code 2; anything else is a defect of ours and keeps its traceback."""

import sys

from rich.console import Console
from rich.markup import escape

from fastlt.errors import UserError


def main() -> None:
    from fastlt.cli import app

    try:
        app()
    except UserError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
