"""One rank of a shared memory: joins, says so, and does what it is told."""

from __future__ import annotations

import signal
import sys
import threading

import numpy as np

from fastserve import _C

signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where the tests run in the background
path, rank, size, doing = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
world = _C.join_shared_memory(path, rank, size, timeout=60.0)
world.set_timeout(50.0)
print("here", flush=True)
if doing == "hang":
    threading.Event().wait()
elif doing == "all_reduce":
    world.all_reduce_sum(np.ones(100_000, np.float32))
elif doing == "receive":
    world.receive(bytearray(8), 1).wait()
else:
    world.barrier()
world.close()
