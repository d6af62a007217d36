#!/usr/bin/env bash
# Serves a model over many hosts with MPI: scripts/serve_mpi.sh --help
set -euo pipefail

usage() {
  cat << 'END'
usage: scripts/serve_mpi.sh HOSTFILE [options of fastserve serve]

Starts `fastserve serve` on this host, with the ranks of its engine on the hosts of HOSTFILE:

    # one host a line, this one first, and how many ranks it takes (default: 1)
    node1 slots=2
    node2 slots=2

    scripts/serve_mpi.sh hosts --model /models/llama --tensor-parallel-size 2 --pipeline-parallel-size 2

Ranks fill the hosts in order: rank = pipeline rank × tensor-parallel size + tensor rank. So with as many slots a host as
the tensor-parallel size, sums over ranks stay inside a host. `node1:2` is the same as `node1 slots=2`.

All hosts need the same Python with FastServe at the same path, the model at the same path, and ssh from this host
without a password; the first host is this one, since the API server and rank 0 share it. A rank uses all cores of its
host, or its share where a host has several; --threads says otherwise.

The environment may hold
  PYTHON        the Python to use (default: that of .venv beside scripts, else python3)
  MPIEXEC       the launcher (default: the one beside PYTHON, else mpiexec or mpirun of PATH), MPICH's or Open MPI's:
                that of the MPI which FastServe was built with (`fastserve info` tells)
  MPIEXEC_ARGS  more options for it, such as "-iface eth1" (MPICH) or "--mca btl_tcp_if_include eth1" (Open MPI)
END
}

die() {
  echo "serve_mpi.sh: $*" >&2
  exit 2
}

# Whether a name or an address is this host's.
is_here() {
  local name=$1 address
  case $name in localhost | 127.* | ::1 | "$(hostname)" | "$(hostname -s 2> /dev/null || true)") return 0 ;; esac
  local -a mine
  read -ra mine <<< "$(hostname -I 2> /dev/null || true)"
  while read -r address _; do
    case " ${mine[*]} 127.0.0.1 127.0.1.1 ::1 " in *" $address "*) return 0 ;; esac
  done < <(getent ahosts "$name" || true)
  return 1
}

[ $# -gt 0 ] || { usage >&2; exit 2; }
case $1 in -h | --help) usage; exit 0 ;; esac
host_file=$1
shift
[ -f "$host_file" ] && [ -r "$host_file" ] || die "no host file $host_file (scripts/serve_mpi.sh --help)"

# --- the hosts --------------------------------------------------------------------------------------------------------
hosts=() slots=0 number=0
while IFS= read -r line || [ -n "$line" ]; do
  number=$((number + 1)) line=${line%$'\r'}
  read -ra words <<< "${line%%#*}"
  [ ${#words[@]} -gt 0 ] || continue
  name=${words[0]} count=1
  case ${words[1]:-} in
    "") if [[ $name =~ ^([^:]+):([^:]*)$ ]]; then name=${BASH_REMATCH[1]} count=${BASH_REMATCH[2]}; fi ;;
    slots=*) count=${words[1]#slots=} ;;
    *) count= ;;
  esac
  if [ ${#words[@]} -gt 2 ] || ! [[ $count =~ ^[1-9][0-9]{0,4}$ && $name =~ ^[A-Za-z0-9_.-]+$ ]]; then
    die "$host_file:$number: must be HOST, HOST:RANKS or HOST slots=RANKS, got '$line'"
  fi
  hosts+=("$name:$count") slots=$((slots + count))
done < "$host_file"
[ ${#hosts[@]} -gt 0 ] || die "$host_file names no host"
first=${hosts[0]%:*}
is_here "$first" || die "the first host of $host_file must be this one ($(hostname)), as rank 0 shares it with the API \
server, and is $first"

# --- how many ranks ---------------------------------------------------------------------------------------------------
tensor=1 pipeline=1 before=
for word in "$@"; do
  case $before in
    --tensor-parallel-size) tensor=$word ;;
    --pipeline-parallel-size) pipeline=$word ;;
  esac
  case $word in
    --tensor-parallel-size=*) tensor=${word#*=} ;;
    --pipeline-parallel-size=*) pipeline=${word#*=} ;;
    --launcher | --launcher=*) die "--launcher is what this script is for: leave it out" ;;
    -h | --help) usage; exit 0 ;;
  esac
  before=$word
done
for size in "$tensor" "$pipeline"; do
  [[ $size =~ ^[1-9][0-9]{0,4}$ ]] || die "--tensor-parallel-size and --pipeline-parallel-size must be whole numbers \
from 1, got '$size'"
done
ranks=$((tensor * pipeline))
[ "$ranks" -gt 1 ] || die "a model over several hosts needs --tensor-parallel-size or --pipeline-parallel-size above 1"
[ "$ranks" -eq "$slots" ] || die "$host_file has $slots slots, and --tensor-parallel-size $tensor × \
--pipeline-parallel-size $pipeline are $ranks ranks"

# --- Python and the launcher ------------------------------------------------------------------------------------------
beside=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/python
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ ! -x "$beside" ] || PYTHON=$beside
fi
command -v "$PYTHON" > /dev/null || die "there is no Python at PYTHON=$PYTHON"
PYTHON=$(command -v "$PYTHON")
library=$("$PYTHON" -c 'from fastserve.distributed import mpi_library; print(mpi_library() or "")' 2> /dev/null) \
  || die "$PYTHON has no FastServe that works ($("$PYTHON" -c 'import fastserve.distributed' 2>&1 | tail -n 1)): make \
setup, or set PYTHON"
[ -n "$library" ] || die "FastServe was built without MPI: install mpich or openmpi, then make build"

if [ -z "${MPIEXEC:-}" ]; then
  for MPIEXEC in "$(dirname "$PYTHON")/mpiexec" mpiexec mpirun ""; do
    [ -z "$MPIEXEC" ] || ! command -v "$MPIEXEC" > /dev/null || break
  done
  [ -n "$MPIEXEC" ] || die "there is no mpiexec or mpirun beside $PYTHON and on PATH; set MPIEXEC"
fi
command -v "$MPIEXEC" > /dev/null || die "there is no launcher at MPIEXEC=$MPIEXEC"
MPIEXEC=$(command -v "$MPIEXEC")
list=$(IFS=,; echo "${hosts[*]}")
version=$("$MPIEXEC" --version 2>&1 || true)
case $version in
  *HYDRA* | *[Hh]ydra*)
    flavor=MPICH
    # It hands on the whole environment, and binds nobody to a core.
    launcher=("$MPIEXEC" -hosts "$list")
    ;;
  *"Open MPI"* | *OpenRTE* | *PRRTE*)
    flavor="Open MPI"
    # By itself it binds each rank to one core, and hands on nothing of the environment.
    launcher=("$MPIEXEC" --host "$list" --map-by slot --bind-to none)
    while IFS= read -r name; do launcher+=(-x "$name"); done < <(compgen -e | grep -E \
      '^(PATH|PYTHONPATH|LD_LIBRARY_PATH|VIRTUAL_ENV|FASTSERVE_.*|HF_.*|UCX_.*|FI_.*|CUDA_.*|NCCL_.*)$' || true)
    [ "$(id -u)" -ne 0 ] || launcher+=(--allow-run-as-root)
    ;;
  *) die "$MPIEXEC is neither MPICH's nor Open MPI's launcher: ${version%%$'\n'*}" ;;
esac
case $library in
  "$flavor"*) ;;
  *) die "FastServe was built with $library, and $MPIEXEC is $flavor's: set MPIEXEC to the launcher of $library" ;;
esac
read -ra more <<< "${MPIEXEC_ARGS:-}"
launcher+=(${more[@]+"${more[@]}"})

quoted=$(printf '%q ' "${launcher[@]}")
command=("$PYTHON" -m fastserve serve --launcher "${quoted% }" "$@")
printf '%q ' "${command[@]}" >&2
echo >&2
exec "${command[@]}"
