"""``python -m allmlp.cli``: the command, as torchrun and ``--processes`` start it."""

import sys

from allmlp.cli import main

if __name__ == "__main__":
    sys.exit(main())
