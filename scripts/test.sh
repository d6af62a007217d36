#!/usr/bin/env bash
# Linters and tests, for `make test`, which does the set-up before. What needs the CUDA kernels compiles them and runs
# beside the rest, which leaves most of a second core idle; its output comes at the end.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
log=.venv/.stamps/test-cuda.log

# Niced, because among the rest are tests that measure time. Only one build at a time may use the build folder.
cuda() {
  make -s compile-cuda CUDA_TARGET=cuda_emulation || return
  make -s compile-cuda &
  local gpu=$! status=0
  nice -n 10 "$python" -m pytest -p no:cacheprovider -m "not slow and cuda" || status=$?
  wait "$gpu" && return "$status"
}

cuda > "$log" 2>&1 &
cuda=$!
status=0
make -s lint && "$python" -m pytest -m "not slow and not cuda" || status=$?
wait "$cuda" || status=$?
cat "$log"
exit "$status"
