#!/usr/bin/env bash
# Runs an experiment as several processes on this machine, for trying things out:
#
#     scripts/launch/local.sh 2 experiments.mnist_lenet --smoke --devices 8
#
# Process 0 writes to the terminal, the others to local-process-N.log. Ctrl-C stops all of them.
# The exit code is 0, or that of the first process that failed.
set -um  # With job control each process gets Ctrl-C once: from the traps below.
if [ $# -lt 2 ]; then
  echo "usage: $0 PROCESSES MODULE [FLAG ...]" >&2
  exit 2
fi
count=$1 module=$2
shift 2
port=$(python -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])')
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM
trap 'kill -INT "${pids[@]}" 2>/dev/null' INT
for ((index = count - 1; index >= 0; index--)); do
  command=(python -m "$module" --coordinator "localhost:$port" --num-processes "$count"
           --process-id "$index" "$@")
  if [ "$index" -eq 0 ]; then
    "${command[@]}" &
  else
    "${command[@]}" >"local-process-$index.log" 2>&1 &
  fi
  pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
  wait "$pid"
  ended=$?
  # A signal ends `wait` before the process that was waited for.
  while kill -0 "$pid" 2>/dev/null; do
    wait "$pid"
    ended=$?
  done
  if [ "$code" -eq 0 ]; then code=$ended; fi
done
exit "$code"
