"""What arrives, when, and how long it is: synthetic workloads and recorded traces."""

from .job import SimJob

__all__ = ["SimJob"]
