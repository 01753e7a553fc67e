# Sourced by tpu_vm.sh and gke.sh: TPU slices by name, where they are, commands that a dry run only prints, errors.
# shellcheck shell=bash disable=SC2034  # variables are used by those files

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "$0: bash $BASH_VERSION is too old: use 4.4 or newer." >&2
  exit 1
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=''  # not empty: print commands instead of running them
project='' zone=''  # of --project and --zone
where=()  # what these become in a gcloud or xpk command

die() {
  echo "launch/${0##*/}: $*" >&2
  exit 1
}

# The comment at the head of the script.
usage() { sed -n '2,/^[^#]/{/^#/{s/^# \{0,1\}//;p;}}' "$0"; }

# Words as one line that a shell reads back as the same words.
quote() {
  local word line=''
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  printf '%s' "${line:1}"
}

# call HINT COMMAND...: runs the command or, in a dry run, prints it. If it fails, HINT says what to do.
call() {
  local hint=$1 code=0
  shift
  if [[ $dry_run ]]; then
    quote "$@"
    echo
    return
  fi
  "$@" || code=$?
  ((code == 0)) || die "'$(quote "$@")' failed with exit code $code: $hint"
}

# A slice as in --config=configs/sft.py:v6e-256x2. Numbers count cores for v4 and v5p, which have two a chip, and chips
# for v5e and v6e. Accelerator types: https://docs.cloud.google.com/tpu/docs/v4, .../v5e, .../v5p, .../v6e; runtime
# versions: https://docs.cloud.google.com/tpu/docs/runtimes (JAX).
read_slice() {
  [[ $1 =~ ^(v[0-9]+[a-z]?)-([1-9][0-9]*)(x([1-9][0-9]*))?$ ]] ||
    die "--slice='$1' is no slice: write v5p-128, or v6e-256x2 for two slices."
  generation=${BASH_REMATCH[1]} slices=${BASH_REMATCH[4]:-1}
  case $generation in
    v4)  accelerator=v4-        runtime=tpu-ubuntu2204-base ;;
    v5e) accelerator=v5litepod- runtime=v2-alpha-tpuv5-lite ;;
    v5p) accelerator=v5p-       runtime=v2-alpha-tpuv5 ;;
    v6e) accelerator=v6e-       runtime=v2-alpha-tpuv6e ;;
    *) die "--slice='$1': unknown generation $generation: use v4, v5e, v5p or v6e." ;;
  esac
  accelerator+=${BASH_REMATCH[2]}
}

# refuse_buckets COMMAND...: buckets do not work yet in the package's commands. Told here, it takes no slice to learn it.
refuse_buckets() {
  local word
  [[ " $* " == *" mask2dit_jax."* ]] || return 0
  for word; do
    [[ ! $word =~ ^(--[A-Za-z_.]+=)?[A-Za-z][A-Za-z0-9+.-]+:/ ]] ||
      die "'$word' is not on the workers: buckets and URLs do not work yet; mount it (gcsfuse, NFS) and give the local path."
  done
}

# configured PROPERTY VARIABLE FLAG: takes it from gcloud's configuration, and fixes it for the commands that follow.
configured() {
  if [[ $dry_run ]]; then
    echo "gcloud config get $1"
    return
  fi
  local value
  value=$(gcloud config get "$1") || die "gcloud does not give its $1: is it installed? Or give $3."
  [[ $value ]] || die "no $1: give $3, or set it by 'gcloud config set $1 VALUE'."
  export "$2=$value"
}

read_place() {
  if [[ $project ]]; then where+=("--project=$project"); else configured core/project CLOUDSDK_CORE_PROJECT --project=ID; fi
  if [[ $zone ]]; then where+=("--zone=$zone"); else configured compute/zone CLOUDSDK_COMPUTE_ZONE --zone=ZONE; fi
}
