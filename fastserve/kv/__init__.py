"""Key-value memory: who holds which blocks."""

from .blocks import BlockManager

__all__ = ["BlockManager"]
