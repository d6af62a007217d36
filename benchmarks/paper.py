"""Regenerate every experiment of the paper and docs/results/. `python benchmarks/paper.py --help` says how."""

from reproduction.command import main

if __name__ == "__main__":
    main()
