"""What stands in for ssh between hosts that are namespaces of one machine; no keys, no encryption, for benchmarks only.

    python benchmarks/remote_shell.py serve ADDRESS            # as sshd: on the host with that address
    python benchmarks/remote_shell.py [-x] ADDRESS COMMAND…    # as ssh: run a command there, and show what it says

As with ssh, the command is no child of the caller's: it lives on when the caller is killed, or when the line is cut.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

_PORT = 2222
_CONNECT_TIMEOUT = 3.0  # seconds
_FAILED = 255  # ssh's own


def serve(address: str) -> None:
    """Returns never."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the commands
    with socket.create_server((address, _PORT)) as server:
        while True:
            caller, _ = server.accept()
            with caller, caller.makefile() as lines:
                asked = json.loads(lines.readline())
                # It has the line itself, which ends when the last of its processes has.
                subprocess.Popen(
                    ["sh", "-c", asked["command"]],
                    cwd=asked["folder"],
                    stdin=subprocess.DEVNULL,
                    stdout=caller.fileno(),
                    stderr=caller.fileno(),
                    start_new_session=True,
                )


def call(address: str, command: str) -> int:
    """Returns the exit status: 255 where the host is not reached, else 0."""
    try:
        line = socket.create_connection((address, _PORT), _CONNECT_TIMEOUT)
    except OSError as error:
        print(f"remote_shell: connect to host {address} port {_PORT}: {error}", file=sys.stderr)
        return _FAILED
    with line:
        line.settimeout(None)
        line.sendall(json.dumps({"command": command, "folder": os.getcwd()}).encode() + b"\n")
        while said := line.recv(2**16):
            sys.stdout.buffer.write(said)
            sys.stdout.buffer.flush()
    return 0


def main(arguments: Sequence[str]) -> int:
    given = [argument for argument in arguments if argument != "-x"]
    if len(given) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    if given[0] == "serve":
        serve(given[1])
    return call(given[0], " ".join(given[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
