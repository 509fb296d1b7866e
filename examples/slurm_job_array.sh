#!/usr/bin/env bash
# One alignment as SLURM job arrays: TEXT and IMAGE are read, OUT is written, all three shared.
#
#   bash examples/slurm_job_array.sh submit TEXT IMAGE OUT JOBS [sbatch options] [-- align options]
#
# submits three arrays of the same command, each after the one before, and then one job that ends them.
# Behind -- stand options of `realign-fast align` for every job, such as -- --bad-rows skip.
# Jobs run in the environment that submits them: activate the virtual environment and export
# AWS_PROFILE, TMPDIR and the like first. Two variables of it choose another command and the number of
# arrays; a side that is "" is left out:
#
#   COMMAND=apply ROUNDS=1 bash examples/slurm_job_array.sh submit TEXT "" OUT JOBS -- --aligner FITTED
#   COMMAND=unify ROUNDS=1 bash examples/slurm_job_array.sh submit TEXT IMAGE OUT JOBS -- --space FITTED
#   COMMAND=unify ROUNDS=3 bash examples/slurm_job_array.sh submit TEXT IMAGE OUT JOBS -- --fit-rows all
#
# An array goes as far as the one before allows: statistics, drift, aligned shards. Started again it
# goes on where it stopped: a finished shard is not read again. A job that reaches its time limit
# (--time, 2 hours unless the options say otherwise) gets SIGUSR1 a minute before, keeps what is finished
# (status 143) and is queued again, up to 20 times; so is one whose output another process holds (5),
# and, up to three times, one whose store did not answer (6). A job that gets SIGTERM, as scancel
# sends it, also keeps what is finished, but is not queued again.
# Logs: realign-STEP-JOB_TASK.log, with a line of JSON each minute. A job alone, as the arrays run it:
#
#   SLURM_ARRAY_TASK_ID=3 SLURM_ARRAY_TASK_COUNT=8 bash examples/slurm_job_array.sh round-1 TEXT IMAGE OUT
set -euo pipefail

if (($# < 4)) || [[ $1 == submit && ! ${5:-} =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: bash $0 submit TEXT IMAGE OUT JOBS [sbatch options] [-- align options]" >&2
  echo "   as: bash $0 submit s3://b/text s3://b/image s3://b/out 64 --cpus-per-task=4 --mem=4G" >&2
  echo "a job: bash $0 round-1|round-2|round-3|end TEXT IMAGE OUT [align options]" >&2
  exit 2
fi
step=$1 text=$2 image=$3 out=$4
command=("${COMMAND:-align}" ${text:+--text "$text"} ${image:+--image "$image"} --out "$out")
log=(--log-json)

run() { # in the background, so that bash passes signals on
  local status=0 times=20 time_is_up=
  realign-fast "$@" "${log[@]}" &
  trap 'kill -TERM $! 2>/dev/null' TERM
  trap 'time_is_up=1; kill -TERM $! 2>/dev/null' USR1
  wait $! || status=$?
  ! kill -0 $! 2>/dev/null || { status=0; wait $! || status=$?; } # a signal ended the first wait
  ((status != 6)) || times=3
  if [[ $status =~ ^(5|6)$ || $status$time_is_up == 1431 ]] &&
    [[ -n ${SLURM_JOB_ID:-} && ${SLURM_RESTART_COUNT:-0} -lt $times ]]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
  fi
  return "$status"
}

case $step in
  round-[123])
    run "${command[@]}" "${@:5}" --shard "${SLURM_ARRAY_TASK_ID:-1}/${SLURM_ARRAY_TASK_COUNT:-1}"
    ;;
  end)
    run "${command[@]}" "${@:5}"
    ;;
  submit)
    jobs=$5 sbatch_options=() after=()
    shift 5
    while (($#)) && [[ $1 != -- ]]; do
      sbatch_options+=("$1")
      shift
    done
    shift $(($# > 0)) # the --; options of align remain
    rounds=(round-1 round-2 round-3)
    for next in "${rounds[@]:0:${ROUNDS:-3}}" end; do
      array=()
      [[ $next == end ]] || array=(--array="1-$jobs")
      id=$(sbatch --parsable --job-name="realign-$next" --time=2:00:00 --signal=B:USR1@60 --requeue \
        --open-mode=append --output="realign-$next-%A_%a.log" "${array[@]}" "${after[@]}" "${sbatch_options[@]}" \
        "$(realpath "$0")" "$next" "$text" "$image" "$out" "$@")
      echo "$next: job $id"
      after=(--dependency="afterok:${id%%;*}")
    done
    ;;
  *)
    echo "$0: got the step $step, expected submit, round-1, round-2, round-3 or end" >&2
    exit 2
    ;;
esac
