#!/usr/bin/env bash
# Runs a command on TPU slices of a GKE cluster through xpk (pip install xpk, 1.16; it needs kubectl and docker, too).
#
#   launch/gke.sh cluster CLUSTER --slice=v6e-256x2 --spot
#   launch/gke.sh train   NAME --cluster=CLUSTER --slice=v6e-256x2 -- python -m mask2dit_jax.main --config=... --workdir=...
#
# cluster  makes a cluster with a pool of nodes for every slice.
# train    builds an image of this folder, in which the command is run by all hosts; after a failure or a preemption all
#          start again, at most 100 times. See it with `xpk workload list`, end it with `xpk workload delete`.
#
# --slice=SLICE        as in the configuration: v4-, v5e-, v5p- or v6e-N; v6e-256x2 means two slices.
# --project=, --zone=  or from gcloud's configuration.
# --spot               of cluster: capacity that may be preempted; else on demand.
# --storage=NAME       of train: a volume that `xpk storage attach` knows, for the workdir, which hosts share.
# --dry-run            prints the commands and runs none.
set -euo pipefail
# shellcheck source=launch/slices.sh
source "$(dirname "${BASH_SOURCE[0]}")/slices.sh"

words=() slice='' cluster='' capacity=--on-demand storage=() remote_command=()
while (($#)); do
  case $1 in
    --slice=*) slice=${1#*=} ;;
    --cluster=*) cluster=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --spot) capacity=--spot ;;
    --storage=*) storage=("$1") ;;
    --dry-run) dry_run=1 ;;
    -h | --help) usage; exit ;;
    --) remote_command=("${@:2}"); break ;;
    -*) die "unknown flag $1: see --help." ;;
    *) words+=("$1") ;;
  esac
  shift
done
((${#words[@]} == 2)) || die "give an action and a name, not '${words[*]}': see --help."
[[ $slice ]] || die "give --slice=, such as v5p-128 or v6e-256x2."
read_slice "$slice"
size=("--tpu-type=$accelerator" "--num-slices=$slices")

case ${words[0]} in
  cluster)
    read_place
    call "mend what xpk says above, then give the same command again, which goes on from there." \
      xpk cluster create "--cluster=${words[1]}" "${size[@]}" "$capacity" "${where[@]}"
    ;;
  train)
    [[ $cluster ]] || die "give --cluster=, the name of one that 'launch/gke.sh cluster' made."
    ((${#remote_command[@]})) || die "train needs a command after --: see --help."
    refuse_buckets "${remote_command[@]}"
    read_place
    # Training exits with 1 when a peer is lost; xpk restarts only after codes that it is told.
    call "mend what xpk says above; 'xpk workload delete' removes a workload that was made half." \
      xpk workload create "--workload=${words[1]}" "--cluster=$cluster" "${size[@]}" "${storage[@]}" \
      --base-docker-image=python:3.12 "--script-dir=$root" --max-restarts=100 --restart-on-exit-codes=1 \
      "--command=pip install --quiet '.[tpu]' && exec bash launch/worker.sh once $generation $(quote "${remote_command[@]}")" \
      "${where[@]}"
    ;;
  *) die "unknown action '${words[0]}': use cluster or train." ;;
esac
