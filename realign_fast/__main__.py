"""``python -m realign_fast`` and the script ``realign-fast``: the command line as a process."""

from . import _startup
from .cli.main import main


def run() -> None:
    """Run the command of this process and end the process."""
    _startup.end(main())


if __name__ == "__main__":
    run()
