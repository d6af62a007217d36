"""Which engine has lately computed the beginning of a prompt, as far as can be told from here.

Prompts are cut into pieces, and a piece goes by a hash of all tokens up to its end, of the tenant and of its salt. For
each engine are remembered the latest pieces of prompts and outputs that it was given, as many as its KV pools hold:
what it has thrown away since nobody tells, but a prefix that is not used is forgotten here, too. A mistake costs time
and nothing else.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ..origin import Origin

PIECE: Final = 64  # tokens
_MOST_PIECES: Final = 32_768  # of an engine: two million tokens
_MOST_HOMES: Final = 16_384

Pieces = Sequence[int]


class Affinity:
    """Of several engines, by their number. Belongs to one event loop; bounded in memory."""

    def __init__(self, engines: int) -> None:
        self._known: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(engines)]  # the latest last
        self._most = [0] * engines
        self._homes: OrderedDict[tuple[str, str, str], int] = OrderedDict()  # the latest last
        self._latest: tuple[object, Origin, Pieces] | None = None

    def came(self, engine: int, info: Mapping[str, Any]) -> None:
        """The engine is up, with nothing in its cache. `info` says whether it has one, and of what size."""
        self._known[engine].clear()
        blocks = int(info.get("num_blocks", 0)) + int(info.get("num_host_blocks", 0))
        tokens = blocks * int(info.get("block_size", 0)) if info.get("enable_prefix_caching") else 0
        self._most[engine] = min(tokens // PIECE, _MOST_PIECES)

    def went(self, engine: int) -> None:
        self._known[engine].clear()
        self._most[engine] = 0

    def pieces(self, origin: Origin, prompt: list[int]) -> Pieces:
        """Hashes of a prompt's beginnings, one for each whole piece; none where no engine has a cache."""
        if not any(self._most):
            return ()
        latest = self._latest
        if latest is None or latest[0] is not prompt or latest[1] != origin:  # several answers have one prompt
            made = _chained(hash((origin.tenant, origin.cache_salt)), prompt)
            latest = self._latest = (prompt, origin, made)
        return latest[2]

    def found(self, engine: int, pieces: Pieces) -> int:
        """Tokens at the beginning of a prompt that the engine is thought to have."""
        known, count = self._known[engine], 0
        for piece in pieces:
            if piece not in known:
                break
            count += 1
        return count * PIECE

    def home(self, origin: Origin) -> int | None:
        """The engine that a program, or what goes by one cache key, was on."""
        homes = (self._homes[key] for key in _names(origin) if key in self._homes)
        return next(homes, None)

    def given(self, engine: int, origin: Origin, pieces: Pieces) -> None:
        """The engine has a prompt, or will have."""
        for key in _names(origin):
            self._homes[key] = engine
            self._homes.move_to_end(key)
            if len(self._homes) > _MOST_HOMES:
                self._homes.popitem(last=False)
        known, most = self._known[engine], self._most[engine]
        for piece in reversed(pieces):  # so that a path is forgotten from its end
            known[piece] = None
            known.move_to_end(piece)
        while len(known) > most:
            known.popitem(last=False)

    def ended(self, engine: int, origin: Origin, pieces: Pieces, prompt: Sequence[int], output: Sequence[int]) -> None:
        """The engine has computed a prompt and its output: the beginning of a conversation's next prompt."""
        if not self._most[engine]:
            return
        start = len(pieces) * PIECE
        rest = [*prompt[start:], *output[max(0, start - len(prompt)) :]]
        before = pieces[-1] if pieces else hash((origin.tenant, origin.cache_salt))
        self.given(engine, origin, [*pieces, *_chained(before, rest)])


def _chained(before: int, tokens: Sequence[int]) -> list[int]:
    data = array("i", tokens).tobytes()
    size = PIECE * 4
    hashes = []
    for start in range(0, len(data) - size + 1, size):
        before = hash((before, data[start : start + size]))
        hashes.append(before)
    return hashes


def _names(origin: Origin) -> list[tuple[str, str, str]]:
    """By what requests that belong together are known."""
    named = (("program", origin.program), ("key", origin.cache_key))
    return [(kind, origin.tenant, name) for kind, name in named if name]
