"""`python -m selfadapt`: the shell, where scripts are not on the path."""

import sys

from selfadapt._cli import main

sys.exit(main())
