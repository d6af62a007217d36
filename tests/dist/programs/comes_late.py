"""One of two ranks under mpiexec, of which rank 1 does not come to MPI_Init: comes_late.py ends|raises|stays."""

from __future__ import annotations

import sys
import threading

from fastserve.distributed import Grid, connect, launched

here = launched()
assert here is not None
if here.rank == 1:
    if sys.argv[1] == "raises":
        raise ValueError("no such data set")
    if sys.argv[1] == "stays":
        threading.Event().wait()
    sys.exit(0)
connect(Grid(here.size))
