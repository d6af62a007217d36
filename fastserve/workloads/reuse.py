"""How much of all prompts a cache could find if it forgot nothing."""

from __future__ import annotations

from .content import continues
from .job import SimJob


class Reuse:
    """Tokens of prompts that other prompts, and the answers in them, began with.

    It is a bound: a job finds what any job before it held, at once and for ever, in whole KV blocks, and computes at
    least its last token. Users share nothing with each other. Of which of two jobs comes first it is hardly a matter:
    who comes later finds what they share.
    """

    def __init__(self, block_size: int) -> None:
        """`block_size`: tokens of a KV block."""
        self.prompt_tokens = 0
        self.found_tokens = 0
        self.has_content = False  # whether any prompt could have been found at all
        self._block_size = block_size
        # Trees of what was seen, one a user: (where a part begins, its identity) → its number, and by number how much
        # of it was.
        self._roots: dict[str | None, int] = {}
        self._parts: dict[tuple[int, int], int] = {}
        self._seen: list[int] = []

    @property
    def rate(self) -> float | None:
        """The share that is found; None without a prompt."""
        return self.found_tokens / self.prompt_tokens if self.prompt_tokens else None

    def add(self, job: SimJob) -> None:
        """The next job, with all calls behind it."""
        call: SimJob | None = job
        while call is not None:
            self.prompt_tokens += call.prompt_tokens
            following = call.then
            if call.content is not None:
                self.has_content = True
                found = min(self._common(call), call.prompt_tokens - 1)
                self.found_tokens += found - found % self._block_size
                self._learn(call, call.prompt_tokens)
                if following is not None and continues(call, following):
                    # The last token put out has no KV.
                    answered = call.prompt_tokens + call.output_tokens - 1
                    self._learn(following, min(answered, following.prompt_tokens))
            call = following

    def _common(self, job: SimJob) -> int:
        """Tokens that the prompt begins with and that were seen."""
        place, tokens = self._root(job), 0
        for identity in job.content or ():
            part = self._parts.get((place, identity))
            if part is None:
                break
            own = min(job.content_block, job.prompt_tokens - tokens)
            tokens += min(own, self._seen[part])
            if self._seen[part] < own:
                break
            place = part
        return tokens

    def _root(self, job: SimJob) -> int:
        root = self._roots.setdefault(job.user, len(self._seen))
        if root == len(self._seen):
            self._seen.append(0)
        return root

    def _learn(self, job: SimJob, tokens: int) -> None:
        """The first tokens of the prompt are seen."""
        place = self._root(job)
        for identity in job.content or ():
            if tokens <= 0:
                return
            part = self._parts.setdefault((place, identity), len(self._seen))
            if part == len(self._seen):
                self._seen.append(0)
            self._seen[part] = max(self._seen[part], min(job.content_block, tokens))
            place, tokens = part, tokens - job.content_block
