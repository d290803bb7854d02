"""python -m mlp_mixer.cli: the command, as torchrun and --processes start it."""

import sys

from mlp_mixer.cli import main

if __name__ == "__main__":
    sys.exit(main())
