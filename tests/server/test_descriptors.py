"""Every connection takes a file descriptor: the soft limit becomes the hard one."""

from __future__ import annotations

import subprocess
import sys

LIMITS = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 1000)); "
RAISE = "from fastserve.server.descriptors import raise_limit; print(raise_limit()); "
TELL = "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"


def test_the_soft_limit_is_raised() -> None:
    done = subprocess.run([sys.executable, "-c", LIMITS + RAISE + TELL], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["936", "1000", "1000"]  # 64 are the server's own
