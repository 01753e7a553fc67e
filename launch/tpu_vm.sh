#!/usr/bin/env bash
# Runs a command, such as training, on all workers of Cloud TPU VMs: one slice, or several.
#
#   launch/tpu_vm.sh train  NAME --slice=v6e-256x2 --spot -- python -m mask2dit_jax.main --config=... --workdir=/shared/...
#   launch/tpu_vm.sh create NAME --slice=v5p-128
#   launch/tpu_vm.sh run    NAME --slice=v5p-128 -- python -m mask2dit_jax.main --config=... --workdir=/shared/...
#   launch/tpu_vm.sh status NAME --slice=v5p-128     # or logs, stop, delete
#
# create   makes the slices. `x2` or --queued asks by a queued resource, which waits for capacity.
# run      copies this source tree, installs it, starts the command and returns. On every worker the command is started
#          again, after ten seconds, until it exits with 0; five failures within a minute of the start end that, and ten
#          without a newer checkpoint in the command's --workdir.
# train    create, run, and then looks every minute, as long as this script runs: slices that are preempted are deleted
#          and made again, and the command is run on them, until it has exited with 0 on all workers. It gives up after
#          five failures in a row. Interrupted, the same line goes on from there. The command must resume by itself, from
#          a folder that outlives the slices.
# status   the state of the slices and of the command on each worker.
# logs     the last lines that the command printed on --worker=0 of each slice (or another, or all).
# stop     SIGTERM to the command on all workers, by which training saves; `train` would start it again.
# delete   the slices, if create made them: it marks them by the label created-by=mask2dit-jax.
#
# --slice=SLICE        as in the configuration: v4-, v5e-, v5p- or v6e-N; v6e-256x2 means two slices.
# --project=, --zone=  or from gcloud's configuration.
# --spot               capacity that may be preempted.
# --queued             a queued resource for one slice, too; to be given to every command about it.
# --create-flag=FLAG   for gcloud's create, such as --reserved or --network=NAME; may be repeated.
# --setup=SHELL        every worker runs it before the installation, each time: mount the shared folder here.
# --dry-run            prints the commands and runs none.
#
# Hosts share the workdir, so it must be a folder that all of them mount: NFS (Filestore), say. A slice of several hosts
# needs gcloud's key in the agent: ssh-add ~/.ssh/google_compute_engine.
set -euo pipefail
# shellcheck source=launch/slices.sh
source "$(dirname "${BASH_SOURCE[0]}")/slices.sh"

label='created-by=mask2dit-jax'
again="mend what gcloud says above, then give the same command again."

read_arguments() {
  local words=() slice=''
  queued='' spot=() create_flags=() setup='' which=0 remote_command=()
  while (($#)); do
    case $1 in
      --slice=*) slice=${1#*=} ;;
      --project=*) project=${1#*=} ;;
      --zone=*) zone=${1#*=} ;;
      --spot) spot=(--spot) ;;
      --queued) queued=1 ;;
      --create-flag=*) create_flags+=("${1#*=}") ;;
      --setup=*) setup=${1#*=} ;;
      --worker=*) which=${1#*=} ;;
      --dry-run) dry_run=1 ;;
      -h | --help) usage; exit ;;
      --) remote_command=("${@:2}"); break ;;
      -*) die "unknown flag $1: see --help." ;;
      *) words+=("$1") ;;
    esac
    shift
  done
  ((${#words[@]} == 2)) || die "give an action and a name, not '${words[*]}': see --help."
  action=${words[0]} name=${words[1]}
  [[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || die "name '$name': use lower case letters, digits and hyphens."
  [[ $slice ]] || die "give --slice=, such as v5p-128 or v6e-256x2."
  read_slice "$slice"
  if ((slices > 1)); then queued=1; fi
  case $action in
    run | train)
      ((${#remote_command[@]})) || die "$action needs a command after --: see --help."
      refuse_buckets "${remote_command[@]}"
      ;;
    create | status | logs | stop | delete) ((!${#remote_command[@]})) || die "$action takes no command." ;;
    *) die "unknown action '$action': use create, run, train, status, logs, stop or delete." ;;
  esac
  # Nodes of a queued resource are TPU VMs as others are, called NAME-0, NAME-1 if there are several.
  nodes=("$name")
  if ((slices > 1)); then mapfile -t nodes < <(for ((i = 0; i < slices; i++)); do echo "$name-$i"; done); fi
}

tpus() { call "$1" gcloud compute tpus "${@:2}" "${where[@]}" --quiet; }

# Sets state, empty if there is nothing of that name, and label_found.
look() {
  local api=tpu-vm fields='state,labels.created-by' line
  if [[ $queued ]]; then api=queued-resources fields='state.state,tpu.nodeSpec[0].node.labels.created-by'; fi
  line=$(tpus "$again" "$api" list "--filter=name~/$name\$" "--format=value($fields)") || return
  if [[ $dry_run ]]; then
    echo "$line"
    state=READY label_found=${label#*=}
    return
  fi
  state=${line%%$'\t'*} label_found=${line#*$'\t'}
}

create() {
  local flags=("--labels=$label" "${spot[@]}" "${create_flags[@]}")
  if [[ ! $queued ]]; then
    tpus "if there is no capacity, ask with --queued, which waits for it; else $again" tpu-vm create "$name" \
      "--accelerator-type=$accelerator" "--version=$runtime" "${flags[@]}"
    return
  fi
  local node=("--node-id=$name")
  if ((slices > 1)); then node=("--node-count=$slices" "--node-prefix=$name"); fi
  tpus "$again" queued-resources create "$name" "--accelerator-type=$accelerator" "--runtime-version=$runtime" \
    "${node[@]}" "${flags[@]}"
}

delete() {
  local kind=(tpu-vm delete "$name")
  if [[ $queued ]]; then kind=(queued-resources delete "$name" --force); fi
  [[ $label_found == "${label#*=}" ]] ||
    die "$name has no label $label, so that create did not make it: delete it yourself if it is yours."
  tpus "it may still be there and cost money: $again" "${kind[@]}"
}

ready() { [[ $state == READY || $state == ACTIVE ]]; }

require_ready() {
  look
  [[ $state ]] || die "there is no $name: create it, and give --queued if it was made so."
  ready || die "$name is $state: wait until status says READY or ACTIVE; if it never will, delete and create it."
}

# on_workers HINT WORKER COMMAND: a line of shell, on workers of all slices.
on_workers() {
  local node
  for node in "${nodes[@]}"; do tpus "$1" tpu-vm ssh "$node" "--worker=$2" "--command=$3"; done
}

worker=mask2dit_jax/launch/worker.sh  # on the workers, once `run` has copied it
on_all() { on_workers "$1" all "bash $worker $(quote "${@:2}")"; }
states() {
  on_workers "$again" all "if test -e $worker; then bash $worker $(quote state "$@"); else echo 'not running'; fi"
}

run() {
  local archive=$HOME/.cache/mask2dit_jax/$name.tar.gz parts=(mask2dit_jax configs launch) node
  call "make room or rights for it." mkdir -p "${archive%/*}"
  call "see tar's error above." tar -C "$root" --exclude=__pycache__ -czf "$archive" "${parts[@]}" setup.py \
    pyproject.toml README.md LICENSE
  for node in "${nodes[@]}"; do
    tpus "$again" tpu-vm scp "$archive" "$node:mask2dit_jax.tar.gz" --worker=all
  done
  local install="{ ! test -e $worker || bash $worker idle; }"
  install+=" && mkdir -p mask2dit_jax && cd mask2dit_jax && rm -rf ${parts[*]} && tar -xzf ../mask2dit_jax.tar.gz"
  install+=" && bash launch/worker.sh install${setup:+ $(quote "$setup")}"
  on_workers "a worker's own message is above; if a command runs there, stop it first; else $again" all "$install"
  on_all "some workers may have started: stop, then $again" start "$generation" "${remote_command[@]}"
}

# One look at what is there, and what follows from it. Exits with 1 after a failure, which may pass.
finished=10 hopeless=11
step() {
  local lines
  look || exit 1
  case $state in
    '') create ;;
    PREEMPTED | SUSPENDED | TERMINATED) delete ;;
    FAILED | STOPPED)
      echo "$name is $state: see gcloud's describe, delete it, then train again." >&2
      exit $hopeless
      ;;
    READY | ACTIVE)
      lines=$(states "$generation" "${remote_command[@]}") || exit 1
      case $(sort -u <<<"$lines") in
        running | 'done'$'\n'running) ;;
        'not running') run ;;
        'done') exit $finished ;;
        *another*)
          echo "Another command runs on $name: stop it first." >&2
          exit $hopeless
          ;;
        *'gave up'*)
          printf '%s\n' "$lines" "Workers gave up: see logs --worker=all, mend it, stop, then train again." >&2
          exit $hopeless
          ;;
        *)  # some workers were cut off: all start together
          on_all "$again" stop
          run
          ;;
      esac
      ;;
  esac  # other states are on their way
}

train() {
  local failures=0 code
  if [[ $dry_run ]]; then
    create
    look
    run
    echo '# Every minute:'
    look
    states "$generation" "${remote_command[@]}"
    echo '# After a preemption, before all of this again:'
    delete
    return
  fi
  while true; do
    code=0
    (step) || code=$?
    case $code in
      0) failures=0 ;;
      "$finished") echo "The command has exited with 0 on all workers. $name is still there: delete it."; return ;;
      "$hopeless") exit 1 ;;
      *) failures=$((failures + 1)) ;;
    esac
    ((failures < 5)) || die "five failures in a row with $name; what runs there goes on. To try again: the same command."
    sleep 60
  done
}

read_arguments "$@"
read_place
case $action in
  create) create ;;
  run) require_ready; run ;;
  train) train ;;
  status)
    look
    [[ $dry_run ]] || echo "$name: ${state:-does not exist}"
    if ready; then states; fi
    ;;
  logs) on_workers "$again" "$which" "bash $worker log" ;;
  stop) on_all "some may still run: $again" stop ;;
  delete)
    look
    [[ $state ]] || die "there is no $name to delete; give --queued if it was made so."
    delete
    ;;
esac
