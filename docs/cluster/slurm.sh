#!/bin/bash
# sbatch docs/cluster/slurm.sh: trains on two machines with eight GPUs each, for as many time slices as it takes.
#
# Three minutes before the time limit, and when the job is preempted, SLURM sends SIGTERM to the job's steps. mixer then
# finishes its step, saves a checkpoint and exits with 143 on all machines; this script requeues the job, and the same
# command resumes the run. After a node failure or a preemption, SLURM requeues the job itself, because of --requeue.
#SBATCH --job-name=mixer-b16
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=mixer-%j.log

RUN=runs/b16   # on storage that all machines share
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# the shell on each machine expands its own SLURM_NODEID; --kill-on-bad-exit=0 lets every rank save
srun --kill-on-bad-exit=0 bash -c "exec mixer train imagenet-b16 --data /data/imagenet --out $RUN --resume auto \
    --processes 8 --nnodes $SLURM_JOB_NUM_NODES --node-rank \$SLURM_NODEID --rdzv-endpoint $FIRST:29500"
STATUS=$?

if [ "$STATUS" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$STATUS"
