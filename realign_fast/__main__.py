"""``python -m realign_fast`` and the script ``realign-fast``: the command line as a process."""

import sys


def run() -> None:
    """Run the command of this process and end the process."""
    from . import _startup
    from .cli.main import main  # here: worker processes import this module and run no command

    _startup.exit_status.append(main())
    sys.exit(_startup.exit_status[0])


if __name__ == "__main__":
    run()
