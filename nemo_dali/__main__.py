"""``python -m nemo_dali``: the command ``nemo-dali``."""

import sys

from nemo_dali.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
