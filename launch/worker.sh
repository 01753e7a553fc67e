#!/usr/bin/env bash
# A worker's part: tpu_vm.sh copies this file to every worker and calls it there; gke.sh calls `once` in a container.
#
#   worker.sh install [SETUP]              runs SETUP in bash, then installs the package into ~/mask2dit_jax_env
#   worker.sh start GENERATION COMMAND...  in the background, from ~/mask2dit_jax; again until it exits with 0, or gives up
#   worker.sh once GENERATION COMMAND...   in the foreground, once
#   worker.sh state [GENERATION COMMAND...]  running, done, stopped, 'gave up: ...' or 'not running' (never was, or cut
#                                          off); of that command, if one is given
#   worker.sh idle                         fails if a command runs
#   worker.sh stop                         SIGTERM, by which training saves, and waits for the end
#   worker.sh log                          the last lines that the command printed
#
# A command that SIGTERM reached counts as stopped even if it exits with 0, as training does once it has saved: machines
# that are preempted send one, too, and training is not over then. `once` exits with 143 in that case.
#
# It gives up after 5 failures in a row within a minute of the start, and after 10 without progress: a newer checkpoint in
# the --workdir that the command names, or another number of files in its --out.
set -euo pipefail

tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=$HOME/mask2dit_jax_run
environment=$HOME/mask2dit_jax_env
restart_seconds=10
quick_seconds=60 quick_failures=5  # so many failures in a row, each so soon, are not worth another try
fruitless_failures=10              # nor are so many without progress, however late they come

die() {
  echo "worker.sh on $HOSTNAME: $*" >&2
  exit 1
}

# The lock is held by the supervisor and whatever it started, as long as one of them lives.
running() { ! flock --shared --nonblock "$folder/lock" true; }

# Runs a command to its end; SIGTERM is passed on, and remembered. Sets code.
stopped='' child=''
once() {
  "$@" &
  child=$!
  code=0
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do  # wait ended because of the signal, not the child
    code=0
    wait "$child" || code=$?
  done
}

enter() {  # GENERATION
  trap 'stopped=1; [[ ! $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM
  export TPU_GENERATION=$1 PYTHONUNBUFFERED=1 PATH="$environment/bin:$PATH"
  cd "$tree"
  # shellcheck source=launch/env.sh
  source launch/env.sh
}

# How far a command has come, as its folder tells: the newest checkpoint, or the number of files.
progress() {  # COMMAND...
  local word before='' folder_of
  for word in "$@"; do
    folder_of=$before before=''
    case $word in
      --workdir | --out) before=$word ;;
      --workdir=* | --out=*) folder_of=${word%%=*} word=${word#*=} ;;
    esac
    case $folder_of in
      --workdir)
        find "$word/checkpoints" -maxdepth 1 -regex '.*/[0-9]+' -printf '%f\n' 2>/dev/null | sort -n | tail -n 1 || true
        ;;
      --out) find "$word" -type f 2>/dev/null | wc -l || true ;;
    esac
  done
}

supervise() {
  local quick=0 fruitless=0 came='' began
  echo $$ >"$folder/pid"
  while [[ ! $stopped ]]; do
    began=$SECONDS
    came=$(progress "$@")
    echo "worker.sh: $(date '+%F %T') starts on $HOSTNAME: $*"
    once "$@"
    echo "worker.sh: $(date '+%F %T') exit code $code"
    if ((code == 0)); then break; fi
    if ((SECONDS - began < quick_seconds)); then quick=$((quick + 1)); else quick=0; fi
    if ((quick == quick_failures)); then
      echo "gave up: exit code $code, $quick times within $quick_seconds seconds of the start" >"$folder/state"
      return
    fi
    if [[ $(progress "$@") == "$came" ]]; then fruitless=$((fruitless + 1)); else fruitless=0; fi
    if ((fruitless == fruitless_failures)); then
      echo "gave up: exit code $code, $fruitless times in a row without progress" >"$folder/state"
      return
    fi
    sleep "$restart_seconds"
  done
  if [[ $stopped ]]; then echo 'stopped'; else echo 'done'; fi >"$folder/state"
}

mkdir -p "$folder"
case ${1:-} in
  install)
    if [[ ${2:-} ]]; then bash -c "$2" || die "--setup failed with exit code $?: mend it and run again."; fi
    # The machine's own Python may be older than the package wants, and may refuse packages.
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
    uv=$(python3 -m site --user-base)/bin/uv
    [[ -d $environment ]] || "$uv" venv --quiet --python '>=3.11,<3.14' "$environment"
    "$uv" pip install --quiet --python "$environment/bin/python" --editable "${tree}[tpu]"
    ;;
  start)
    exec 9>"$folder/lock"
    flock --timeout 2 9 || die "a command runs already: stop it first."
    rm -f "$folder/state"
    printf '%q ' "${@:2}" >"$folder/command"
    setsid nohup bash "$tree/launch/worker.sh" supervise "${@:2}" >>"$folder/log" 2>&1 </dev/null &
    ;;
  supervise)  # from start
    enter "$2"
    supervise "${@:3}"
    ;;
  once)
    enter "$2"
    once "${@:3}"
    [[ ! $stopped ]] || exit 143
    exit "$code"
    ;;
  state)
    other=''
    if (($# > 1)) && [[ $(printf '%q ' "${@:2}") != "$(cat "$folder/command" 2>/dev/null)" ]]; then other=1; fi
    if running; then
      if [[ $other ]]; then echo 'runs another command'; else echo 'running'; fi
    elif [[ $other || ! -e $folder/state ]]; then
      echo 'not running'
    else
      cat "$folder/state"
    fi
    ;;
  idle)
    ! running || die "a command runs: stop it first."
    ;;
  stop)
    if running; then
      kill -TERM "$(cat "$folder/pid")" || die "the supervisor is gone, what it started is not: see fuser $folder/lock."
      flock --shared --timeout 900 "$folder/lock" true || die "it still runs, 15 minutes after SIGTERM: see the log."
    fi
    ;;
  log) tail -n 100 "$folder/log" ;;
  *) sed -n '2,/^[^#]/{/^#/{s/^# \{0,1\}//;p;}}' "$0" ;;
esac
