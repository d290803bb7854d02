#!/bin/bash
# sbatch docs/cluster/slurm.sh: trains on two machines with eight GPUs each, for as many time slices as it takes.
#
# Three minutes before the time is up (and when the job is preempted) SLURM sends SIGTERM to the job's steps. mixer then
# finishes its step, saves, and exits with 143, on all machines alike; the script puts the job into the queue again, and
# the same command goes on. After a node failure or a preemption SLURM does that by itself, because of --requeue.
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

# SLURM_NODEID differs from machine to machine, so a shell there reads it; --kill-on-bad-exit=0 lets every rank save
srun --kill-on-bad-exit=0 bash -c "exec mixer train imagenet-b16 --data /data/imagenet --out $RUN --resume auto \
    --processes 8 --machines $SLURM_JOB_NUM_NODES --machine \$SLURM_NODEID --meet $FIRST:29500"
STATUS=$?

if [ "$STATUS" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$STATUS"
