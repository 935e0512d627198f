"""`python -m kontext`, and what `accelerate launch -m kontext train` runs."""

import sys

from kontext.cli import main

if __name__ == "__main__":
    sys.exit(main())
