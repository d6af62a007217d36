"""`fastserve serve`: an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..types import InvalidRequest
from .options import ENGINE, TENANTS, ModelOption, engine_options, panel_option, takes
from .terminal import error_console

if TYPE_CHECKING:
    from ..server.settings import ServerSettings

_KEYS = "FASTSERVE_API_KEY"
# Of the heartbeat's timeout: ranks that wait for one that hangs say which one, before the whole engine is killed.
_NAMED_WITHIN = 0.75
# Of engines that a launcher starts: a host that is away is asked for every few seconds, and open requests wait for it
# for some ten minutes.
_HOSTS_AWAY: dict[str, Any] = {"max_backoff": 5.0, "max_failed_starts": 100}

_server = functools.partial(panel_option, "Server")
SERVER: dict[str, Any] = {
    "host": _server(str | None, "127.0.0.1", "Address to listen on; 0.0.0.0 is every one of this machine's."),
    "port": _server(int | None, "8000", "Port; 0 takes any that is free, and tells which."),
    "served_model_name": _server(
        list[str] | None, "the model", "What clients call the model. Repeatable: the first is in answers."
    ),
    "api_key": _server(
        list[str] | None,
        "none",
        f"Clients have to send this key. Repeatable. {_KEYS} in the environment holds them, too, separated by commas, "
        "and is not seen in a list of processes.",
    ),
    "cors_origin": _server(
        list[str] | None, "none", "Origin of web pages that may call, such as https://example.org; * is all."
    ),
    "max_body_size": _server(str | None, "4M", "Largest request, such as 512K or 4M."),
    "max_queue": _server(
        int | None,
        "4096",
        "Jobs that may wait beyond --max-num-seqs. Then requests get 429 with Retry-After; users with less than an "
        "equal share may still enter.",
    ),
    "data_parallel_size": _server(
        int | None,
        "1",
        "Engines, each with the whole model, in a process or ranks of its own. A job goes to the one that is "
        "expected to finish it first, and goes on in another when that dies. --max-num-seqs, --kv-cache-memory and "
        "--swap-space are of each; --threads 0 is an equal share of the cores.",
    ),
    "launcher": _server(
        str | None,
        "none",
        "Command that starts the ranks of an engine, on hosts of its own choice, such as 'mpiexec -f hosts' or srun; "
        "-n and what to run are added. The first rank has to be on this host. While a host is away, open requests wait "
        "for it, some ten minutes. Without this option all ranks are started here.",
    ),
    "shutdown_timeout": _server(
        float | None, "30", "Seconds that open requests get to finish after SIGTERM or Ctrl-C."
    ),
    "record": _server(
        Path | None,
        "none",
        "Append a line a job to this file: when it came, its tokens, how it ended, and no text. fastserve simulate and "
        "fastserve bench serve read it as --trace.",
    ),
    "heartbeat_timeout": _server(
        float | None,
        "30",
        "Seconds of silence after which the engine is taken to hang, killed and started again. More than its longest "
        "iteration takes, as it is not heard during one.",
    ),
    "log_format": _server(str | None, "text", "A line a request: text or json."),
    "seed": _server(int | None, "0", "Draws the seeds of requests that bring none."),
}


@takes(server=SERVER, engine={**ENGINE, **TENANTS})
def serve(
    *,
    model: ModelOption = "smollm2",
    server: dict[str, Any],
    engine: dict[str, Any],
) -> int:
    """Serve a model to OpenAI clients, until SIGTERM or Ctrl-C.

    fastserve serve --model smollm2

    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json"
    -d '{"prompt": "Once upon a time", "max_tokens": 32}'

    Open requests are finished first (--shutdown-timeout), a second Ctrl-C ends at once. The engine runs in a process of
    its own, or several do (--data-parallel-size); when one dies it is started again, and open requests go on where they
    were. Requests may bring, beside OpenAI's fields, priority, timeout (or the header X-Request-Timeout), top_k, min_p,
    repetition_penalty, min_tokens, ignore_eos and stop_token_ids; program_id (or X-Program-Id), the agent that they are
    a call of; and cache_salt, who else may find their prompts in the cache. A user is a tenant: users share the device
    fairly (--tenant-weight), and nothing else. The dashboard is at /; GET /health, /metrics and /v1/fastserve/jobs tell
    how it is doing, and /openapi.json what there is.
    """
    from ..server.run import bind
    from ..server.settings import ServerSettings
    from ..server.supervisor import EngineStartError

    server["api_key"] = [*server.get("api_key", []), *_keys_of_environment()]
    settings = ServerSettings(model=model, **server)
    options = {"model": model, **engine_options(engine)}
    if "tenant_weights" in options and settings.api_key:
        options["tenant_weights"] = _of_keys(options["tenant_weights"], len(settings.api_key))
    if isinstance(options.get("cost"), Path):
        options["cost"] = str(options["cost"])
    with bind(settings) as bound:
        _set_up_logging()
        try:
            return asyncio.run(_serve(settings, options, bound))
        except EngineStartError as error:
            if error.field is None:
                raise
            raise InvalidRequest(error.field, str(error)) from error  # an option at fault, which the CLI names


async def _serve(settings: ServerSettings, options: dict[str, Any], bound: Any) -> int:
    from ..loaders import open_model
    from ..server.app import create_app
    from ..server.descriptors import raise_limit
    from ..server.run import serve
    from ..server.service import Service
    from ..tokenizer import Tokenizer

    data = open_model(settings.model).tokenizer_data()  # a missing model is found before a process is started
    tokenizer = None if data is None else Tokenizer.from_data(data)
    service = Service(settings, _engine_client(settings, options, tokenizer), tokenizer)
    console = error_console()
    if settings.host not in ("127.0.0.1", "localhost", "::1") and not settings.api_key:
        console.print("anybody who reaches this address may use the model; --api-key asks for a key", soft_wrap=True)
    connections = raise_limit()
    if connections < settings.max_queue:
        console.print(
            f"{connections} connections are the most that `ulimit -Hn` allows here, fewer than --max-queue; more have "
            "to wait until others end",
            markup=False,
            soft_wrap=True,
        )
    console.print(f"loading {settings.model}", markup=False, soft_wrap=True)

    def ready(url: str) -> None:
        names = ", ".join(settings.names)
        console.print(f"serving {names} at {url}/v1 · dashboard {url}/ · Ctrl-C ends", markup=False, soft_wrap=True)

    return await serve(service, create_app(service), bound, on_ready=ready)


def _engine_client(settings: ServerSettings, options: dict[str, Any], tokenizer: Any) -> Any:
    """The client of engines in processes of their own, started with LLM's options."""
    from ..server import client
    from ..server.supervisor import Health

    patience = {} if settings.launcher is None else _HOSTS_AWAY
    health = Health(heartbeat_timeout=settings.heartbeat_timeout, **patience)
    engines = settings.data_parallel_size
    told = {**options, "rank_timeout": _NAMED_WITHIN * settings.heartbeat_timeout}
    command = client.engine_command(told, engines, settings.launcher)
    return client.EngineClient(command, tokenizer, health=health, engines=engines)


def _of_keys(weights: dict[str, float], keys: int) -> dict[str, float]:
    """A key's among keys, and a user's within its key: `key 0/` are the requests of a key without a user."""
    names = {f"key {number}" for number in range(keys)}
    for tenant in weights:
        if tenant.partition("/")[0] not in names:
            told = "key 0" if keys == 1 else f"key 0 to key {keys - 1}"
            raise InvalidRequest("tenant_weights", f"must name {told}, or a user of one as key 0/USER, got {tenant!r}")
    return weights


def _keys_of_environment() -> list[str]:
    keys = [key.strip() for key in os.environ.get(_KEYS, "").split(",")]
    if os.environ.get(_KEYS) is not None and not all(keys):
        raise InvalidRequest("api_key", f"{_KEYS} is set, and holds a key that is empty")
    return [key for key in keys if key]


def _set_up_logging() -> None:
    """Lines as they are for requests, with level and origin for all else; all to standard error."""
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    requests = logging.getLogger("fastserve.requests")
    requests.setLevel(logging.INFO)
    requests.propagate = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    requests.addHandler(handler)
