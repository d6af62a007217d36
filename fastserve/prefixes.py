"""What jobs have in common with each other and with those before them: the prefix cache, as jobs see it.

    arrives ──▶ how much is there? ──▶ joins by what is left      (others may compute more of it meanwhile: it is told)
    starts  ──▶ the path of blocks that hold its beginning
    runs    ──▶ its full blocks go into the index as soon as a plan computes them: plans run in order
    leaves  ──▶ all its full blocks, outputs too, stay as cache until their places are needed

A block is known by the chained hash of all tokens up to its end, begun with the tenant and the salt, so that nobody can
find out what others have asked by how fast an answer comes. Jobs that begin alike are compared by their tokens, and
only what nobody before them had is hashed.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from typing import Final

from .cost import Cost
from .kv import Block, BlockManager
from .origin import accounts_of
from .types import Job

_KEY_BYTES: Final = 16
_GROUP_BLOCKS: Final = 2  # that jobs of one group begin with, at least

# Jobs that are told at once that there is more for them, and blocks that are looked up for it one by one: bounds on the
# time that one plan may take. The job that comes to the latter is still told of all there is.
_MOST_TOLD: Final = 1024
_MOST_LOOKED_UP: Final = 4096

_TOKEN_BYTES: Final = 4

# A job waits for the next iteration where a better one computes so large a part of what it needs in this one.
_WORTH_WAITING: Final = 0.25

Digest = Callable[[bytes], bytes]


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=_KEY_BYTES).digest()


@dataclass(slots=True)
class _Prefix:
    """The keys of a job's full blocks, as far as anybody asked."""

    owner: bytes  # the tenant and the salt: the first block's tokens begin with them
    tokens: bytearray  # all there were when last asked for, 4 bytes each
    keys: list[bytes] = field(default_factory=list)
    found: list[Block] = field(default_factory=list)  # when last looked for; what left the index since has no key
    counted: bool = False  # among the queries
    awaits: bytes | None = None  # the key of its first block that is not in the index


class Prefixes:
    """Finds and keeps what jobs have in common. Jobs whose prompts are ranges, which hold no tokens, have nothing."""

    def __init__(self, blocks: BlockManager, cost: Cost, *, enabled: bool, digest: Digest = _digest) -> None:
        self._blocks = blocks
        self._cost = cost
        self._enabled = enabled
        self._digest = digest
        self._prefixes: dict[Job, _Prefix] = {}
        self._awaiting: dict[bytes, dict[Job, None]] = {}
        self._to_tell: dict[Job, None] = {}  # jobs that may have less to compute than they think
        self._found: dict[Job, None] = {}  # jobs that have less to compute than they thought
        self._computing: dict[bytes, Job] = {}  # by the key of the next block, who computes it in the next iteration
        self._latest: dict[bytes, Job] = {}  # by their first key, which of the jobs that begin so was looked at last
        self._looked_up = 0  # blocks, one by one

    def __len__(self) -> int:
        """Jobs that may have something in common with others."""
        return len(self._prefixes)

    # --- a job's life ------------------------------------------------------------------------------------------------

    def arrived(self, job: Job) -> None:
        """Tell a job how much of it is there already, and to which group it belongs."""
        if isinstance(job.prompt, range):
            return
        most = _GROUP_BLOCKS * self._blocks.block_size  # tokens that are needed where nobody shares anything
        owner = f"{len(job.tenant)}:{job.tenant}{job.cache_salt}".encode()
        prefix = _Prefix(owner, bytearray(array("i", job.prompt if self._enabled else job.prompt[:most])))
        if self._enabled:
            self._prefixes[job] = prefix
            self._blocks.cache.arrives(accounts_of(job.tenant))
            self._look(job, prefix)
        if len(job.prompt) >= most:
            self._extend(job, prefix, _GROUP_BLOCKS)
            job.group = int.from_bytes(prefix.keys[_GROUP_BLOCKS - 1][:8], "little")

    def path(self, job: Job) -> Sequence[Block]:
        """The blocks that hold the job's beginning, wherever they are; at least its last token is not in them.

        It is told as it is now, and grows and shrinks with the cache.
        """
        prefix = self._prefixes.get(job)
        return () if prefix is None else self._walk(job, prefix)

    def _walk(self, job: Job, prefix: _Prefix) -> list[Block]:
        """The path, which is the prefix's own list, from where it was left."""
        path = prefix.found
        while path and path[-1].key is None:  # and all behind it, which left first
            path.pop()
        for index in range(len(path), (job.known - 1) // self._blocks.block_size):
            self._extend(job, prefix, index + 1)
            parent = path[-1] if path else None
            block = self._blocks.cache.find(prefix.keys[index], self._tokens(prefix, index), parent)
            self._looked_up += 1
            if block is None:
                break
            path.append(block)
        return path

    def started(self, job: Job, path: Sequence[Block]) -> None:
        """A job begins, or begins again, with the blocks of its path."""
        prefix = self._prefixes.get(job)
        if prefix is None:
            return
        self._expect_nothing(job, prefix)
        self._takes(job, path)

    def computes(self, job: Job) -> None:
        """The job has been chosen for the next iteration, in which it computes its next tokens."""
        key = self._key(job, job.computed // self._blocks.block_size)
        if key is not None:
            self._computing.setdefault(key, job)

    def forget_computing(self) -> None:
        """A decision begins: only what plans in flight go on with will be computed."""
        jobs = [job for job in self._computing.values() if job.in_flight and not job.primed]
        self._computing.clear()
        for job in jobs:
            self.computes(job)

    def better_waits(self, job: Job) -> bool:
        """Whether much of what a job that has not started lacks is computed for another in the next iteration."""
        prefix = self._prefixes.get(job)
        if prefix is None or not self._computing:
            return False
        found = len(prefix.found)
        other = self._computing.get(self._key(job, found) or b"")
        if other is None or other is job:
            return False
        lacking = (job.known - 1) // self._blocks.block_size - found
        last = found + max(1, int(lacking * _WORTH_WAITING)) - 1
        if last >= len(prefix.keys):
            self._learn(prefix, self._prefixes[other], last + 1)
        key = self._key(job, last)
        return key is not None and key == self._key(other, last)

    def computed(self, job: Job) -> None:
        """A plan computes the job up to `computed`: others can have its full blocks from the next plan on."""
        prefix = self._prefixes.get(job)
        if prefix is None:
            return
        if not prefix.counted and not job.output:
            prefix.counted = True
            self._blocks.cache.counters.queries += len(job.prompt)
            self._blocks.cache.counters.hits += job.metrics.cached_tokens
        self._found.pop(job, None)  # it is charged for this, and estimated anew
        self._put(job, job.computed, leaving=False)

    def catch_up(self, job: Job) -> bool:
        """Have a job that has computed a part of what it needs take over what others have computed beyond that.

        It is not in flight. Whether it did: its table is another then.
        """
        prefix, size = self._prefixes.get(job), self._blocks.block_size
        if prefix is None or len(path := self._walk(job, prefix)) * size <= job.computed:
            return False
        # Blocks beyond its own count as free, and may have been given to others by now.
        here = min(self._blocks.readable(path), self._blocks.held(job.index))
        if here * size <= job.computed or not self._blocks.exchange(job.index, path[:here]):
            return False
        job.computed = here * size
        self._takes(job, path[:here])
        return True

    def leaves(self, job: Job, keep: float) -> None:
        """The job is about to give back its blocks; `keep`: until when they are sure to be wanted."""
        self._put(job, min(job.computed, len(job.prompt) + len(job.output)), leaving=True, keep=keep)

    def ended(self, job: Job) -> None:
        if (prefix := self._prefixes.pop(job, None)) is not None:
            self._expect_nothing(job, prefix)
            self._blocks.cache.departs(accounts_of(job.tenant))
            if prefix.keys and self._latest.get(prefix.keys[0]) is job:
                del self._latest[prefix.keys[0]]

    def _takes(self, job: Job, path: Sequence[Block]) -> None:
        """The job goes on behind these blocks, which others have computed."""
        found = len(path) * self._blocks.block_size
        if job.served == job.cached and not job.attained:  # never served
            if found != job.cached and not job.output:
                self._found[job] = None
            job.metrics.cached_tokens = job.cached = job.served = found
        else:
            job.served = max(job.served, found)
        self._blocks.cache.touch(path, hit=True)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _put(self, job: Job, tokens: int, *, leaving: bool, keep: float = 0.0) -> None:
        prefix = self._prefixes.get(job)
        if prefix is None or job.slot is None:
            return
        cost, size, first = self._cost, self._blocks.block_size, self._blocks.shared(job.index)
        full = min(tokens, len(job.prompt) + len(job.output)) // size
        self._extend(job, prefix, full)
        keys = [
            # What a prefill costs whatever is in it is saved only with the whole of it, hence from position 1.
            (
                prefix.keys[index],
                self._tokens(prefix, index),
                cost.prefill_charge(max(1, index * size), (index + 1) * size),
            )
            for index in range(first, full)
        ]
        if leaving:
            self._tell(self._blocks.bequeath(job.index, keys, keep))
        elif keys:
            self._tell(self._blocks.share(job.index, keys))

    def _tell(self, keys: list[bytes]) -> None:
        """Whoever waits to start and needs what is there now has less to compute."""
        if not self._awaiting:
            return
        for key in keys:
            self._to_tell.update(self._awaiting.get(key, ()))

    def take_found(self) -> Collection[Job]:
        """Jobs that were never served and for which more is there than when they came, or than they were told since."""
        end = self._looked_up + _MOST_LOOKED_UP
        for job in list(islice(self._to_tell, _MOST_TOLD)):
            if self._looked_up >= end:
                break
            del self._to_tell[job]
            if self._look(job, self._prefixes[job]) and not job.output:
                self._found[job] = None
        if not self._found:
            return ()
        found, self._found = self._found, {}
        return found

    def _look(self, job: Job, prefix: _Prefix) -> bool:
        """How much of a job that has not started is there; whether that is another answer than before."""
        self._expect_nothing(job, prefix)
        self._follow(job, prefix)
        found = len(self._walk(job, prefix))
        prefix.awaits = self._key(job, found)
        if prefix.awaits is not None:
            self._awaiting.setdefault(prefix.awaits, {})[job] = None
        before, job.cached = job.cached, found * self._blocks.block_size
        return job.cached != before

    def _expect_nothing(self, job: Job, prefix: _Prefix) -> None:
        self._found.pop(job, None)
        self._to_tell.pop(job, None)
        if prefix.awaits is not None:
            jobs = self._awaiting[prefix.awaits]
            del jobs[job]
            if not jobs:
                del self._awaiting[prefix.awaits]
            prefix.awaits = None

    def _key(self, job: Job, index: int) -> bytes | None:
        """The key of a block that the job could find: not the one with its last token."""
        prefix = self._prefixes.get(job)
        if prefix is None or index >= (job.known - job.pending - 1) // self._blocks.block_size:
            return None
        self._extend(job, prefix, index + 1)
        return prefix.keys[index]

    def _extend(self, job: Job, prefix: _Prefix, blocks: int) -> None:
        keys, there = prefix.keys, len(prefix.tokens) // _TOKEN_BYTES
        if len(keys) >= blocks:
            return
        if there < blocks * self._blocks.block_size:
            prefix.tokens += array("i", job.output[there - len(job.prompt) :])
        self._looked_up += blocks - len(keys)
        for index in range(len(keys), blocks):
            keys.append(self._digest((keys[-1] if keys else b"") + self._tokens(prefix, index)))

    def _tokens(self, prefix: _Prefix, index: int) -> bytes:
        """What a block holds; of the first, whose it is besides."""
        width = _TOKEN_BYTES * self._blocks.block_size
        tokens = bytes(prefix.tokens[index * width : (index + 1) * width])
        return tokens if index else prefix.owner + tokens

    def _follow(self, job: Job, prefix: _Prefix) -> None:
        """Let a job that has not started find at once what one that begins alike, and was looked at last, has found."""
        limit = (job.known - 1) // self._blocks.block_size
        if not limit:
            return
        self._extend(job, prefix, 1)
        other, self._latest[prefix.keys[0]] = self._latest.get(prefix.keys[0]), job
        if other is None or other is job:
            return
        like, path = self._prefixes[other], prefix.found
        while path and path[-1].key is None:
            path.pop()
        while like.found and like.found[-1].key is None:
            like.found.pop()
        start, end = len(path), min(limit, len(like.found))
        # A block has one path to it; where there is none yet, all of the first block's tokens are compared.
        if start < end and (path[-1] is like.found[start - 1] if path else prefix.owner == like.owner):
            path += like.found[start : self._alike(prefix, like, start, end)]
        self._learn(prefix, like, len(like.found) + 1)

    def _learn(self, prefix: _Prefix, like: _Prefix, blocks: int) -> None:
        """Take over the keys of up to so many blocks from another, as far as the tokens agree from where keys do."""
        start, end = len(prefix.keys), min(blocks, len(like.keys))
        if start < end and (prefix.keys[-1] == like.keys[start - 1] if start else prefix.owner == like.owner):
            prefix.keys += like.keys[start : self._alike(prefix, like, start, end)]

    def _alike(self, prefix: _Prefix, like: _Prefix, start: int, end: int) -> int:
        """The block up to `end` up to which both hold the same tokens from `start` on."""
        width = _TOKEN_BYTES * self._blocks.block_size
        low, high = start, min(end, len(prefix.tokens) // width, len(like.tokens) // width)
        middle = high  # most are the same
        while low < high:
            if prefix.tokens[low * width : middle * width] == like.tokens[low * width : middle * width]:
                low = middle
            else:
                high = middle - 1
            middle = (low + high + 1) // 2
        return low

    def check_integrity(self) -> None:
        """Raise RuntimeError when a job waits for a key and is not known to, or the other way round."""
        waits = {(prefix.awaits, job) for job, prefix in self._prefixes.items() if prefix.awaits is not None}
        if waits != {(key, job) for key, jobs in self._awaiting.items() for job in jobs}:
            raise RuntimeError("a job waits for a block, and nobody knows it")
        if not self._prefixes.keys() >= set(self._latest.values()):
            raise RuntimeError("a job is to be followed that has ended")
