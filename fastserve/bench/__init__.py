"""Benchmarks: latency and throughput of one engine, and the demo that compares scheduling policies on one trace."""
