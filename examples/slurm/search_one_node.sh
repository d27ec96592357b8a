#!/bin/bash
# A search on the GPUs of one node. It stops five minutes before the end of its time and is queued again until it is done.
#   sbatch examples/slurm/search_one_node.sh
#SBATCH --job-name=longrope-search
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append

out=run
resume=()
if [ -e "$out/search.jsonl" ]; then resume=(--resume); fi

longrope search MODEL --target-length 128k --data books/ --device cuda --workers 8 -o "$out" --time-limit 3h55m "${resume[@]}"
code=$?
if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; exit 0; fi
exit "$code"
