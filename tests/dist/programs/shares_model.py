"""One rank of a model over a group, which does what it is told: shares_model.py PATH RANK TENSOR PIPELINE DOING."""

from __future__ import annotations

import dataclasses
import sys
import threading

from layouts import shard_of
from shared_models import PROMPT, SMALL, SMALL_CONFIG, WIDE, WIDE_CONFIG, wide_plan

from fastserve import _C
from fastserve.distributed import Grid, Group
from fastserve.links import connect_runtime
from fastserve.native import NativeRuntime

path, rank, tensor, pipeline = sys.argv[1], *map(int, sys.argv[2:5])
*manner, doing = sys.argv[5].split(maxsplit=1) if sys.argv[5].startswith(("wide ", "cuda ")) else [sys.argv[5]]
wide, cuda = "wide" in manner, "cuda" in manner
group = Group(_C.join_shared_memory(path, rank, tensor * pipeline), Grid(tensor, pipeline))
links = connect_runtime(group)


def say(what: str) -> None:
    """To the test, which goes on when all have said something."""
    print(what, flush=True)


def hang() -> None:
    say("hangs")
    threading.Event().wait()


if doing == "comes":
    hang()
try:
    if doing == "waits for it":
        say("waits")
    source, config = (WIDE, WIDE_CONFIG) if wide else (SMALL, SMALL_CONFIG)
    if cuda:
        config = dataclasses.replace(config, device="cuda")
    runtime = NativeRuntime(source, config, shard_of(source, group), links)
    if doing == "loads":
        hang()
    elif doing == "tells a plan":
        group.world.broadcast_plan(PROMPT)
        hang()
    elif doing == "leads":
        runtime.submit(wide_plan(1) if wide else PROMPT)
        say("leads")
        while runtime.poll(0.05) is None:
            pass
    elif doing == "leads once":
        runtime.submit(PROMPT)
        runtime.poll()
        hang()
    elif rank != 0:
        say("follows")
        runtime.follow()
except _C.GroupError as error:
    sys.exit(f"heard: {error}")
