#!/usr/bin/env bash
# Two processes of one run on this machine, four CPU devices each, as two hosts would run it:
#
#   experiments/launch/local_two_process.sh
#   experiments/launch/local_two_process.sh experiments.ddpm \
#     --config=configs/ddpm.py:smoke --workdir=runs/two [--config.mesh.fsdp=2 ...]
#
# PROCESSES, DEVICES (of each process) and PYTHON change what is in the first line; PYTHON is that of
# .venv, which is made where it is missing. SIGINT and SIGTERM reach all processes, which then save
# and end with 75; the same command goes on. The exit code is that of the first process to fail.
# When one has failed the others have GRACE seconds to see it by themselves.
set -u
cd "$(dirname "$0")/../.." || exit 1
PROCESSES=${PROCESSES:-2}
GRACE=${GRACE:-30}
if [ -z "${PYTHON:-}" ]; then
  PYTHON=.venv/bin/python
  [ -x $PYTHON ] || make .venv/.train-installed || exit 1
fi
[ $# -gt 0 ] || set -- experiments.ddpm --config=configs/ddpm.py:smoke --workdir=runs/two_processes
printf -v arguments ' %q' "$@"
export BLOGJAX_COMMAND=${BLOGJAX_COMMAND:-$0$arguments}
export JAX_NUM_CPU_DEVICES=${DEVICES:-4} JAX_PLATFORMS=cpu
port=$("$PYTHON" -c 'import socket
with socket.socket() as s:
    s.bind(("localhost", 0))
    print(s.getsockname()[1])') || exit 1

pids=()
for ((i = 0; i < PROCESSES; i++)); do
  "$PYTHON" -m "$@" --coordinator_address="localhost:$port" --num_processes="$PROCESSES" \
    --process_id="$i" &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' INT TERM

code=0
ended=0  # seconds since the epoch at which the first one failed
while ((${#pids[@]} > 0)); do
  alive=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      alive+=("$pid")
    else
      wait "$pid"
      status=$?
      if ((status != 0 && code == 0)); then
        code=$status
        ended=$(date +%s)
      fi
    fi
  done
  pids=(${alive[@]+"${alive[@]}"})
  ((ended > 0 && $(date +%s) - ended > GRACE)) && kill -KILL "${pids[@]}" 2>/dev/null
  sleep 0.2
done
exit $code
