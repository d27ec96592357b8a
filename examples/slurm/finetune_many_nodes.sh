#!/bin/bash
# Fine-tuning on many nodes with torchrun. At the time limit all processes end after the same step, with a checkpoint, and the job
# is queued again until it is done.
#   sbatch --nodes=4 examples/slurm/finetune_many_nodes.sh
#SBATCH --job-name=longrope-finetune
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append

out=tuned # on a file system that all nodes see, as the model and the texts
resume=()
if [ -e "$out" ]; then resume=(--resume); fi

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint="$head:29500" --no-python \
  longrope finetune MODEL --scaling run/scaling.json --data texts/ --length 128k --mix short:0.3,long:0.7 \
  --device cuda --bf16 --trainer fsdp.json -o "$out" --time-limit 23h50m "${resume[@]}"
code=$?
# torchrun reports a failure of its processes as 1; a run that stopped in time has a checkpoint and no result.
if [ "$code" -ne 0 ] && [ ! -e "$out/finetune.json" ] && compgen -G "$out/trainer/checkpoint-*" > /dev/null; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
