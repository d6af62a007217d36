"""`python -m fastserve` is the `fastserve` command."""

import sys

from .cli import main

sys.exit(main())
