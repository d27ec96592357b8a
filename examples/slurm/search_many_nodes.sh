#!/bin/bash
# A search on the GPUs of many nodes: Ray starts its head on the first node and a worker on every other one.
#   sbatch --nodes=4 examples/slurm/search_many_nodes.sh
#SBATCH --job-name=longrope-search
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append

out=run # on a file system that all nodes see, as the model and the texts
resume=()
if [ -e "$out/search.jsonl" ]; then resume=(--resume); fi

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address="$head:6379"
srun --nodes=1 --ntasks=1 --nodelist="$head" ray start --head --port=6379 --include-dashboard=false --block &
sleep 20
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \
    ray start --address="$address" --block &
  sleep 20
fi

# Texts longer than one GPU's memory: --context-parallel 8 makes the 8 GPUs of a node one worker that shares every text.
longrope search MODEL --target-length 128k --data books/ --device cuda --ray-address "$address" -o "$out" \
  --time-limit 3h50m "${resume[@]}"
code=$?
if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; exit 0; fi
exit "$code"
