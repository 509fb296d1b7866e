"""``python -m realign_fast``: the command line without its script."""

import sys

from .cli.main import main

sys.exit(main())
