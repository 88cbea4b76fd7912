#!/usr/bin/env bash
# Starts torchrun on this machine, and says by its exit code whether the run has to be started again.
#
#   launch/local.sh [TORCHRUN OPTIONS] -- [TRAINER ARGUMENTS]
#
#   launch/local.sh --nproc-per-node=4 -- --config=imagenet/resnet50 --run.dir=runs/resnet50
#   launch/local.sh --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d --rdzv-endpoint=HOST:29400 --rdzv-id=NAME -- ...
#
# The second line runs on each of two machines that see the same run directory. torchrun's environment (PET_NNODES,
# PET_NPROC_PER_NODE, ...) works too. PYTHON names the interpreter.
#
# Exit codes: 0 the run is over; 75 it was preempted, has saved a checkpoint, and goes on when started again; else
# torchrun's own. For 75 the run directory must be known here: give --run.dir=DIR, joined by the equals sign.
set -uo pipefail

# With torchrun's shared store, a restart after a killed rank hangs or costs further restarts.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export PET_MAX_RESTARTS="${PET_MAX_RESTARTS:-3}"
export PET_NPROC_PER_NODE="${PET_NPROC_PER_NODE:-auto}"

torchrun_options=()
for argument in "$@"; do
  if [[ $argument == -- ]]; then
    while [[ $1 != -- ]]; do
      torchrun_options+=("$1")
      shift
    done
    shift
    break
  fi
done

several_machines=${PET_NNODES:-}${PET_RDZV_ENDPOINT:-}
for option in ${torchrun_options[@]+"${torchrun_options[@]}"}; do
  case $option in
    --nnodes* | --rdzv* | --node[-_]rank* | --master* | --standalone) several_machines=1 ;;
  esac
done
[[ -n $several_machines ]] || torchrun_options+=(--standalone)
# Where a node knows its number, the first one keeps the rendezvous, whatever name service says of its address.
[[ -z ${PET_NODE_RANK:-} ]] || export PET_RDZV_CONF="${PET_RDZV_CONF:-is_host=$((PET_NODE_RANK == 0))}"

marker=
for argument in "$@"; do
  [[ $argument != --run.dir=* ]] || marker=${argument#--run.dir=}/preempted
done
content() { [[ -z $marker ]] || cat -- "$marker" 2>/dev/null; }
# An earlier start's marker stays until the run goes on; only one written from now on speaks of this start.
before=$(content)

torchrun=
stopped=
trap 'stopped=1; [[ -z $torchrun ]] || kill -TERM "$torchrun" 2>/dev/null' TERM INT HUP USR1
"${PYTHON:-python3}" -m torch.distributed.run ${torchrun_options[@]+"${torchrun_options[@]}"} \
  -m locsgd_dist.train "$@" &
torchrun=$!
[[ -z $stopped ]] || kill -TERM "$torchrun"
# A signal ends `wait`, not torchrun, which first lets its ranks save.
while :; do
  wait "$torchrun"
  code=$?
  kill -0 "$torchrun" 2>/dev/null || break
done

after=$(content)
if [[ -n $after && $after != "$before" ]]; then
  echo "launch: preempted, start again to go on: ${marker%/preempted}" >&2
  exit 75
fi
exit "$code"
