#!/usr/bin/env bash
# One alignment as SLURM job arrays: TEXT and IMAGE are read, OUT is written, all three shared.
#
#   bash examples/slurm_job_array.sh submit TEXT IMAGE OUT JOBS [sbatch options]
#
# submits six steps, each after the one before: the statistics of both sides (an array), merge, the
# drift (an array), merge, apply (an array), merge. Started again it goes on where it stopped: a
# finished shard is not read again. A job alone, as the arrays run it:
#
#   SLURM_ARRAY_TASK_ID=3 SLURM_ARRAY_TASK_COUNT=8 bash examples/slurm_job_array.sh drift TEXT IMAGE OUT
set -euo pipefail

step=${1:?"submit, statistics, drift, apply or merge"} text=$2 image=$3 out=$4
part="${SLURM_ARRAY_TASK_ID:-1}/${SLURM_ARRAY_TASK_COUNT:-1}"

case $step in
  statistics)
    realign-fast stats --text "$text" --out "$out" --shard "$part"
    realign-fast stats --image "$image" --out "$out" --shard "$part"
    ;;
  drift)
    realign-fast stats --text "$text" --out "$out" --aligner "$out/half.safetensors" --shard "$part"
    ;;
  apply)
    realign-fast apply --text "$text" --aligner "$out" --out "$out" --shard "$part"
    ;;
  merge)
    realign-fast merge --text "$text" --image "$image" --out "$out"
    ;;
  submit)
    jobs=$5
    after=()
    for next in statistics merge drift merge apply merge; do
      array=()
      [[ $next == merge ]] || array=(--array="1-$jobs")
      id=$(sbatch --parsable --job-name="realign-$next" "${array[@]}" "${after[@]}" "${@:6}" \
        "$(realpath "$0")" "$next" "$text" "$image" "$out")
      echo "$next: job $id"
      after=(--dependency="afterok:${id%%;*}")
    done
    ;;
  *)
    echo "$0: got the step $step, expected submit, statistics, drift, apply or merge" >&2
    exit 2
    ;;
esac
