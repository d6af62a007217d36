"""What arrives, when, and how long it is: synthetic workloads and recorded traces."""

from .job import SimJob
from .recorded import Recorded
from .specs import parse_arrivals, parse_workload
from .synthetic import Synthetic
from .traces import read_trace, write_trace

__all__ = ["Recorded", "SimJob", "Synthetic", "parse_arrivals", "parse_workload", "read_trace", "write_trace"]
