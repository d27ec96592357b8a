#!/bin/bash
# A search whose texts are longer than one GPU's memory: all GPUs of all nodes share every text. At the time limit it stops with a
# complete log, and the job is queued again until it is done.
#   sbatch --nodes=4 examples/slurm/search_shared_texts.sh
#SBATCH --job-name=longrope-search
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append

out=run # on a file system that all nodes see, as the model and the texts
resume=()
if [ -e "$out/search.jsonl" ]; then resume=(--resume); fi

processes=$((8 * SLURM_JOB_NUM_NODES))
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint="$head:29500" -m \
  longrope search MODEL --target-length 2M --data books/ --device cuda --context-parallel "$processes" \
  -o "$out" --time-limit 3h50m "${resume[@]}"
code=$?
# torchrun reports a failure of its processes as 1; a search that stopped in time has a log and no result.
if [ "$code" -ne 0 ] && [ -e "$out/search.jsonl" ] && [ ! -e "$out/scaling.json" ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
