"""Options of the HTTP server, frozen and checked; every error names the option and its range."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..config import check_integer, parse_size
from ..types import MAX_SEED, InvalidRequest

LogFormat = Literal["text", "json"]
MAX_JOBS = 2**20
MAX_ENGINES = 64
MIN_HEARTBEAT_TIMEOUT = 2.0


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What `fastserve serve` says of HTTP. Raises InvalidRequest, naming the option."""

    model: str
    served_model_name: tuple[str, ...] = ()  # none: the model's
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    api_key: tuple[str, ...] = ()  # none: everybody may ask
    cors_origin: tuple[str, ...] = ()  # none: no browser page of another origin may; "*": all may
    max_body_size: str | int = "4M"  # bytes, or text
    max_queue: int = 4096  # jobs beyond what one iteration takes
    shutdown_timeout: float = 30.0  # seconds that open requests get to finish
    heartbeat_timeout: float = 30.0  # seconds of silence after which the engine is killed, and started again
    log_format: LogFormat = "text"
    data_parallel_size: int = 1  # engines, each with all of the model, that share the jobs
    launcher: str | None = None  # starts the ranks of an engine: mpiexec, mpirun or srun, with its options
    record: Path | None = None  # the trace file that jobs are appended to
    seed: int = 0

    def __post_init__(self) -> None:
        for option in ("served_model_name", "api_key", "cors_origin"):
            texts = tuple(getattr(self, option))
            if not all(isinstance(text, str) and text for text in texts):
                raise InvalidRequest(option, "must not be empty")
            object.__setattr__(self, option, texts)
        if not all(key.isascii() and key.isprintable() and " " not in key for key in self.api_key):
            raise InvalidRequest("api_key", "must be printable ASCII without spaces, as it travels in a header")
        if self.record is not None:
            object.__setattr__(self, "record", Path(os.fspath(self.record)))
        check_integer("port", self.port, 0, 65535)
        check_integer("max_queue", self.max_queue, 0, MAX_JOBS)
        check_integer("data_parallel_size", self.data_parallel_size, 1, MAX_ENGINES)
        check_integer("seed", self.seed, 0, MAX_SEED)
        object.__setattr__(self, "max_body_size", parse_size("max_body_size", self.max_body_size))
        timeout: Any = self.shutdown_timeout
        if not isinstance(timeout, (int, float)) or not 0 <= timeout < math.inf:
            raise InvalidRequest("shutdown_timeout", f"must be seconds, 0 or more, got {timeout!r}")
        silence: Any = self.heartbeat_timeout
        if not isinstance(silence, (int, float)) or not MIN_HEARTBEAT_TIMEOUT <= silence < 1e9:
            raise InvalidRequest(
                "heartbeat_timeout",
                f"must be seconds, {MIN_HEARTBEAT_TIMEOUT:g} or more as an idle engine speaks once a second, "
                f"got {silence!r}",
            )
        if self.log_format not in get_args(LogFormat):
            raise InvalidRequest(
                "log_format", f"must be one of {', '.join(get_args(LogFormat))}, got {self.log_format!r}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """What the model is called by clients; the first is in the answers."""
        return self.served_model_name or (self.model,)

    @property
    def body_limit(self) -> int:
        return int(self.max_body_size)
