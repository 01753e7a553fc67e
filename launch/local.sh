#!/usr/bin/env bash
# Trains with N processes on this machine, as the hosts of a pod do.
#
#   launch/local.sh [--dry-run] N -- --config=configs/tiny.py:smoke --workdir=runs/smoke
#
# Starts N times `python -m mask2dit_jax.main --coordinator=... --num_processes=N --process_id=I` with what follows --,
# and puts [I] before every line of process I. If one fails, the others are stopped (SIGTERM, after ten seconds SIGKILL),
# and its exit code is that of this script. SIGTERM and Ctrl-C are passed on as SIGTERM, by which training saves. A second
# Ctrl-C stops them at once.
# --dry-run prints the commands and runs none.
set -euo pipefail

die() {
  echo "launch/local.sh: $*" >&2
  exit 1
}

dry_run=''
case ${1:-} in
  -h | --help) sed -n '2,/^[^#]/{/^#/{s/^# \{0,1\}//;p;}}' "$0"; exit ;;
  --dry-run) dry_run=1; shift ;;
esac
[[ ${1:-} =~ ^[1-9][0-9]*$ && ${2:-} == -- ]] || die "give the number of processes, --, and the flags of main: see --help."
count=$1
shift 2

# Below the range from which systems take ports of outgoing connections.
port=''
while [[ ! $port ]] || (exec 3<>"/dev/tcp/localhost/$port") 2>/dev/null; do port=$((16384 + RANDOM % 16384)); done

pids=() printers=() stopped=''
stop() {
  stopped=1
  kill -TERM "${pids[@]}" 2>/dev/null || true
}
interrupted=''
# shellcheck disable=SC2329  # called by the trap
interrupt() {
  if [[ $interrupted ]]; then kill -KILL "${pids[@]}" 2>/dev/null || true; fi
  interrupted=1
  stop
}
trap stop TERM
trap interrupt INT

for ((i = 0; i < count; i++)); do
  command=(python -m mask2dit_jax.main "--coordinator=localhost:$port" "--num_processes=$count" "--process_id=$i" "$@")
  if [[ $dry_run ]]; then
    echo "${command[*]@Q}"
    continue
  fi
  exec {lines}> >(
    trap '' TERM INT
    while IFS= read -r line || [[ $line ]]; do printf '[%d] %s\n' "$i" "$line"; done
  )
  printers+=($!)
  PYTHONUNBUFFERED=1 "${command[@]}" >&"$lines" 2>&1 {lines}>&- &
  pids+=($!)
  exec {lines}>&-
done
if [[ $dry_run ]]; then exit; fi
if [[ $stopped ]]; then stop; fi  # those that were started after the signal

failed=0 killer=''
running=("${pids[@]}")
while ((${#running[@]})); do
  still=()
  for pid in "${running[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then still+=("$pid"); continue; fi
    code=0
    wait "$pid" || code=$?
    if ((!failed)); then failed=$code; fi
  done
  running=("${still[@]}")
  if ((failed && ${#running[@]})) && [[ ! $killer ]]; then
    echo "launch/local.sh: a process failed with exit code $failed: stopping the others." >&2
    stop
    (sleep 10; kill -KILL "${running[@]}") >/dev/null 2>&1 &
    killer=$!
  fi
  sleep 0.3
done
if [[ $killer ]]; then kill "$killer" 2>/dev/null || true; fi
wait "${printers[@]}" || true
exit "$failed"
