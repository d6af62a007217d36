"""One line a request: short for people, JSON for programs."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from starlette.types import Scope

from .engine_api import OpenJob

_logger = logging.getLogger("fastserve.requests")
_SCOPE = "fastserve.log"


@dataclass(slots=True)
class RequestLog:
    """What is told of a request; handlers fill in what they know."""

    request_id: str
    method: str
    path: str
    client: str
    key: int | None = None  # which of the API keys it came with
    started: float = field(default_factory=time.monotonic)
    status: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    finish_reasons: list[str] = field(default_factory=list)
    preemptions: int = 0
    ttft: float | None = None  # seconds
    ignored: list[str] = field(default_factory=list)  # fields of the body
    disconnected: bool = False

    @classmethod
    def of(cls, scope: Scope) -> RequestLog:
        log: RequestLog = scope[_SCOPE]
        return log

    def attach(self, scope: Scope) -> None:
        scope[_SCOPE] = self

    def tell(self, jobs: Sequence[OpenJob]) -> None:
        self.output_tokens = sum(len(job.output) for job in jobs)
        self.finish_reasons = sorted({job.finish_reason for job in jobs if job.finish_reason is not None})
        metrics = [job.metrics for job in jobs if job.metrics is not None]
        self.preemptions = sum(each.preemptions for each in metrics)
        self.ttft = min((each.ttft for each in metrics if each.ttft is not None), default=None)

    def write(self, log_format: str) -> None:
        """At level DEBUG what monitors ask for all the time, else INFO."""
        level = logging.DEBUG if self.path in ("/health", "/metrics") else logging.INFO
        if _logger.isEnabledFor(level):
            _logger.log(level, self._json() if log_format == "json" else self._text())

    def _json(self) -> str:
        fields: dict[str, Any] = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "request_id": self.request_id,
            "client": self.client,
            "key": self.key,
            "method": self.method,
            "path": self.path,
            "status": self._status,
            "seconds": round(time.monotonic() - self.started, 6),
        }
        if self.prompt_tokens is not None:
            fields |= {
                "prompt_tokens": self.prompt_tokens,
                "output_tokens": self.output_tokens,
                "finish_reasons": self.finish_reasons,
                "ttft": None if self.ttft is None else round(self.ttft, 6),
                "preemptions": self.preemptions,
            }
        if self.ignored:
            fields["ignored_fields"] = self.ignored
        return json.dumps(fields, ensure_ascii=True)

    def _text(self) -> str:
        moment = datetime.now().strftime("%H:%M:%S")
        tokens = f" {self.prompt_tokens}+{self.output_tokens or 0} tokens" if self.prompt_tokens is not None else ""
        seconds = time.monotonic() - self.started
        path = json.dumps(self.path)[1:-1]  # a client's: no line breaks, no escapes of a terminal
        return f"{moment} {self.method} {path} {self._status} {seconds:.3f} s{tokens} {self.request_id}"

    @property
    def _status(self) -> int:
        """499 is what nginx calls a client that went away."""
        return 499 if self.disconnected else (self.status or 499)
