"""`python -m gramian`."""

import sys

from gramian.cli import main

sys.exit(main())
