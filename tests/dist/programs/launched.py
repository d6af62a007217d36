"""One rank of a group that fastserve.ranks started: launched.py CASE [rank 0's process]."""

from __future__ import annotations

import os
import signal
import sys
import threading

import numpy as np

from fastserve.distributed import Grid, connect, launched

case = sys.argv[1]
here = launched()
assert here is not None
if case == "dies early" and here.rank == 1:
    sys.exit(7)
with connect(Grid(here.size)) as group:
    if case == "ends":
        values = np.full(3, group.rank + 1, np.float32)
        group.tensor.all_reduce_sum(values)
        sys.exit(int(values[0]) - group.size * (group.size + 1) // 2)
    if case == "dies" and group.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "raises" and group.rank == 1:
        raise ValueError("no such layer")
    if case == "stays":
        group.world.barrier()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if group.rank == 0:
            print("here", flush=True)
        threading.Event().wait()
    group.world.barrier()
