"""Cuts the line between the hosts of one engine while streams are under way, and compares every byte they carry.

    python benchmarks/hosts.py                       # a tiny model, tensor-parallel; three cuts, then an idle one
    python benchmarks/hosts.py --model smollm2 --cuts 5 --options --pipeline-parallel-size 2
    python benchmarks/hosts.py --ranks-a-host 2 --options --tensor-parallel-size 2 --pipeline-parallel-size 2

The hosts are two network namespaces of this machine, each with its own address, host name and loopback, joined by one
line (a veth pair). MPICH's mpiexec starts the ranks, those of the second host through a stand-in for ssh, so that none
is a child of the server; and their messages go over the line, for UCX is told to use TCP.

A round: when the engine is up, the second host's end of the line is taken down in the middle of streams. The server has
to find out within --heartbeat-timeout; what the engine has on the second host has to end by itself; no engine starts
while the line is down, and when it is up again the streams have to go on to the same end. The last round does the same
while nothing is asked. The exit code is 1 if anything was otherwise. Needs root; removes what it has made.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tiny_model
from chaos import Chaos, Phase, make_requests, table, what_is_left
from served import Server, until

from fastserve.distributed import mpi_library

_HOSTS = ("one", "two")
_ADDRESSES = ("10.213.0.1", "10.213.0.2")
_LINE_UP = 10.0  # seconds it may take to come up
_DEVICE = "line"
_SHELL = Path(__file__).with_name("remote_shell.py")
_MARGIN = 1.0  # seconds beside the heartbeat's timeout: until this program sees what the server has found
_NEVER = 3.0  # heartbeat timeouts: who has not noticed by then does not
_RECOVERY = 120.0  # seconds in which the engine has to be back when the line is
_TICK = 0.05  # seconds between looks


class CannotRun(RuntimeError):
    """This machine or this user cannot do it. The message is one line."""


# --- two hosts --------------------------------------------------------------------------------------------------------


def ip(*arguments: str) -> str:
    """What `ip` prints. Raises CannotRun with what it complains of."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise CannotRun(f"ip {shlex.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def on_host(space: str, name: str, *command: str) -> list[str]:
    """A command as it is run in a namespace: with its network, and with a host name."""
    return ["ip", "netns", "exec", space, "unshare", "--uts", "sh", "-c", f'hostname {name} && exec "$@"', "", *command]


@contextlib.contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Their namespaces. Whatever runs there in the end is killed."""
    spaces = [f"fastserve-{os.getpid()}-{host}" for host in _HOSTS]
    try:
        for space in spaces:
            ip("netns", "add", space)
            ip("-n", space, "link", "set", "lo", "up")
        ip("link", "add", _DEVICE, "netns", spaces[0], "type", "veth", "peer", "name", _DEVICE, "netns", spaces[1])
        for space, address in zip(spaces, _ADDRESSES, strict=True):
            ip("-n", space, "address", "add", f"{address}/24", "dev", _DEVICE)
            ip("-n", space, "link", "set", _DEVICE, "up")
        until_up(spaces)
        yield spaces
    finally:
        for space in spaces:
            with contextlib.suppress(CannotRun):  # it was not made
                for process in processes_of(space):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                ip("netns", "delete", space)


def until_up(spaces: Sequence[str]) -> None:
    """Waits for the line, which takes a moment: a rank that came first would not find it. Raises CannotRun."""
    end = time.monotonic() + _LINE_UP
    while not all("state UP" in ip("-n", space, "link", "show", _DEVICE) for space in spaces):
        if time.monotonic() > end:
            raise CannotRun(f"the line between the hosts is not up after {_LINE_UP:.0f} seconds")
        time.sleep(0.01)


def processes_of(space: str) -> set[int]:
    return {int(line) for line in ip("netns", "pids", space).split()}


def check_machine() -> None:
    """Raises CannotRun."""
    if os.geteuid() != 0:
        raise CannotRun("needs root, for network namespaces")
    for program, package in (("ip", "iproute2"), ("unshare", "util-linux"), ("hostname", "hostname")):
        if shutil.which(program) is None:
            raise CannotRun(f"needs {program}: apt-get install {package}")
    library = mpi_library()
    if library is None or not library.startswith("MPICH") or not _mpiexec().exists():
        raise CannotRun(f"needs MPICH (pip install mpich, then make build); this build has {library or 'no MPI'}")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(two_hosts())
        except CannotRun as error:
            raise CannotRun(f"cannot make network namespaces here: {error}") from None


def _mpiexec() -> Path:
    return Path(sys.prefix) / "bin" / "mpiexec"


class Line:
    """Between the hosts, seen from the first. `shell` is the process of the second that stands in for sshd."""

    def __init__(self, other: str, shell: int) -> None:
        self._other = other
        self._shell = shell

    def turn(self, state: str) -> None:
        """Up or down: the second host's end."""
        ip("-n", self._other, "link", "set", _DEVICE, state)

    def carried(self) -> int:
        """Bytes so far, both ways."""
        lines = Path("/proc/net/dev").read_text().splitlines()
        counts = next(line.split(":")[1].split() for line in lines if line.strip().startswith(f"{_DEVICE}:"))
        return int(counts[0]) + int(counts[8])

    def processes(self) -> set[int]:
        """What an engine has on the second host: ranks, and those who started them."""
        return processes_of(self._other) - {self._shell}


# --- what is done to the line -----------------------------------------------------------------------------------------


@dataclass
class Cut:
    """One line of the table. Seconds are counted from the cut, those of `back` from the repair."""

    phase: str
    streams: int  # under way when the line was cut
    found: float  # until the server had no engine
    ended: float | None  # until the engine had nothing on the second host any more; None: it always had
    failed: int  # starts, while the line was down
    back: float  # until the engine was up again
    why: str  # as the server's log has it


class Cuts:
    """Cuts the line, waits, and mends it."""

    def __init__(self, server: Server, chaos: Chaos, line: Line, given: argparse.Namespace) -> None:
        self._server, self._chaos, self._line, self._given = server, chaos, line, given
        self.cuts: list[Cut] = []

    @property
    def passed(self) -> bool:
        within = self._given.heartbeat_timeout + _MARGIN
        return all(cut.found <= within and cut.ended is not None and cut.failed > 0 for cut in self.cuts)

    async def cut(self, phase: Phase, count: int) -> None:
        """Return when the engine is up again."""
        server, timeout = self._server, self._given.heartbeat_timeout
        await asyncio.wait_for(server.engines(), _RECOVERY)
        await asyncio.sleep(self._chaos.rng.uniform(0.0, self._chaos.window))
        streams, log = self._chaos.note_under_way(phase), len(server.log())
        self._line.turn("down")
        began = time.monotonic()
        try:
            await until(self._is_down, _NEVER * timeout)
            found = time.monotonic() - began
            ended = await self._until_nothing_is_there(began)
            await asyncio.sleep(max(0.0, self._given.down - (time.monotonic() - began)))
            said = server.log()[log:]
        finally:
            self._line.turn("up")
        mended = time.monotonic()
        await asyncio.wait_for(server.engines(), _RECOVERY)
        back = time.monotonic() - mended
        why = re.search(r"supervisor: (.*); it was up for", said)
        failed = len(re.findall(r"restart \d+ of the engine failed", said))
        self.cuts.append(Cut(phase.name, streams, found, ended, failed, back, why[1] if why else "nothing was said"))

    async def idle(self) -> Phase:
        """The same while nothing is asked; then every request is, once."""
        phase = Phase("cut, idle")
        began, before = time.monotonic(), (await self._server.health())["engine"]["restarts"]
        await self.cut(phase, 0)
        await self._chaos.once(phase)
        phase.disturbances, phase.restarts = 1, (await self._server.health())["engine"]["restarts"] - before
        phase.seconds = time.monotonic() - began
        return phase

    async def _is_down(self) -> bool:
        return bool((await self._server.health())["status"] != "ok")

    async def _until_nothing_is_there(self, began: float) -> float | None:
        while self._line.processes():
            if time.monotonic() - began > _NEVER * self._given.heartbeat_timeout:
                return None
            await asyncio.sleep(_TICK)
        return time.monotonic() - began


async def run(given: argparse.Namespace, line: Line, launcher: str) -> int:
    """On the first host. Returns the exit code."""
    options = ["--model", given.model, "--launcher", launcher, "--heartbeat-timeout", str(given.heartbeat_timeout)]
    requests = make_requests(given.streams, given.tokens, given.seed)
    async with Server([*options, *given.options]) as server:
        there, before = len(line.processes()), line.carried()
        chaos = Chaos(server, requests, random.Random(given.seed), given.window)
        cuts = Cuts(server, chaos, line, given)
        phases = [await chaos.undisturbed()]
        carried = line.carried() - before
        if given.cuts:
            phases.append(await chaos.disturbed("cut", given.cuts, cuts.cut))
        phases.append(await cuts.idle())
        left, remains = await what_is_left(server)
    passed = not left and all(phase.passed for phase in phases) and cuts.passed and there > 0 and carried > 0
    print(table(phases))
    print(_cuts_table(cuts.cuts, given))
    print(f"{there} processes on the second host; {carried / 2**20:.1f} MiB crossed the line while nothing was cut")
    print(f"afterwards: {json.dumps(remains)}")
    if given.json is not None:
        found = {"model": given.model, "options": given.options, "heartbeat_timeout": given.heartbeat_timeout}
        found |= {"phases": [asdict(phase) for phase in phases], "cuts": [asdict(cut) for cut in cuts.cuts]}
        given.json.write_text(json.dumps({**found, "left": remains, "passed": passed}, indent=1) + "\n")
    return 0 if passed else 1


def _cuts_table(cuts: Sequence[Cut], given: argparse.Namespace) -> str:
    lines = [
        f"seconds after the cut (heartbeat timeout {given.heartbeat_timeout:g} s, line down for {given.down:g} s):",
        f"{'':12} {'under way':>10} {'found out':>10} {'ranks gone':>11} {'failed starts':>14} {'back after':>11}",
    ]
    for cut in cuts:
        ended = "never" if cut.ended is None else f"{cut.ended:.2f}"
        lines.append(
            f"{cut.phase:12} {cut.streams:10} {cut.found:10.2f} {ended:>11} {cut.failed:14} {cut.back:11.2f}  {cut.why}"
        )
    return "\n".join(lines)


# --- the command line -------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    given = _parse(arguments)
    if given.inside is not None:
        other, shell, launcher, given.model = given.inside
        return asyncio.run(run(given, Line(other, int(shell)), launcher))
    signal.signal(signal.SIGTERM, _stop)
    try:
        check_machine()
        return _with_hosts(given, arguments)
    except CannotRun as error:
        print(f"hosts: {error}", file=sys.stderr)
        return 2


def _with_hosts(given: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Make the hosts, and run this program again on the first one."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastserve-hosts-")))
        model = tiny_model.write(folder / "model") if given.model == "tiny" else given.model
        first, second = stack.enter_context(two_hosts())
        shell = subprocess.Popen(on_host(second, _HOSTS[1], sys.executable, str(_SHELL), "serve", _ADDRESSES[1]))
        ssh = folder / "ssh"
        ssh.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, str(_SHELL)])} "$@"\n')
        ssh.chmod(0o755)
        hosts = ",".join(f"{address}:{given.ranks_a_host}" for address in _ADDRESSES)
        launcher = shlex.join(
            [str(_mpiexec()), "-hosts", hosts, "-iface", _DEVICE, "-launcher", "ssh", "-launcher-exec", str(ssh)]
        )
        inside = ["--inside", second, str(shell.pid), launcher, str(model)]
        command = [sys.executable, str(Path(__file__).resolve()), *inside, *arguments]
        with subprocess.Popen(
            on_host(first, _HOSTS[0], *command), env={**os.environ, "UCX_TLS": "tcp,self"}
        ) as benchmark:
            try:
                return benchmark.wait()
            finally:
                benchmark.kill()


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="streams of an engine on two hosts whose line is cut again and again")
    parser.add_argument("--model", default="tiny", help="tiny is made up on the spot (default: %(default)s)")
    parser.add_argument("--ranks-a-host", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--cuts", type=int, default=3, help="under streams (default: %(default)s)")
    parser.add_argument("--down", type=float, default=25.0, help="seconds that the line is down (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=16, help="at once (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=400, help="of the longest answer (default: %(default)s)")
    parser.add_argument(
        "--window", type=float, default=2.0, help="seconds after its start in which the line is cut (default: 2)"
    )
    parser.add_argument("--heartbeat-timeout", type=float, default=6.0, help="seconds (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of requests and moments (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="a file for all figures")
    parser.add_argument("--inside", nargs=4, help=argparse.SUPPRESS)  # how it runs itself on the first host
    parser.add_argument(
        "--options",
        nargs=argparse.REMAINDER,
        default=["--tensor-parallel-size", "2"],
        help="the last: how the ranks share the model, and more for fastserve serve (default: tensor-parallel)",
    )
    return parser.parse_args(arguments)


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
