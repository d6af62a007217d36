"""What arrives, when, and how long it is: synthetic workloads, programs of several calls, and recorded traces."""

from .job import SimJob
from .mooncake import open_loop, write_mooncake
from .programs import ProgramLoad, calls_of
from .recorded import Recorded
from .specs import parse_arrivals, parse_load, parse_workload
from .synthetic import Synthetic
from .traces import read_trace, write_trace

__all__ = [
    "ProgramLoad",
    "Recorded",
    "SimJob",
    "Synthetic",
    "calls_of",
    "open_loop",
    "parse_arrivals",
    "parse_load",
    "parse_workload",
    "read_trace",
    "write_mooncake",
    "write_trace",
]
