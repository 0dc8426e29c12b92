"""`python -m selfadapt`: the shell, where scripts are not on the path."""

import sys

from selfadapt._cli import main

if __name__ == "__main__":
    sys.exit(main())
