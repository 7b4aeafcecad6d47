#!/bin/bash
# Under SLURM, back in the queue before the time limit, going on from the newest whole checkpoint:
#     sbatch configs/slurm.sh --config configs/cross_size.yaml --config configs/node_8gpu.yaml
# Not run on a cluster by us yet; the signal, the save and the requeue are tested with SLURM's variables.
#SBATCH --job-name=opcd
#SBATCH --nodes=1                 # of several, the queries of a step (data.batch_size) are divided among all GPUs
#SBATCH --ntasks-per-node=8       # one process a GPU: trainer.devices
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300         # seconds before the limit: a step, a rollout and a save must fit
#SBATCH --requeue
#SBATCH --open-mode=append        # one log for all starts
#SBATCH --output=opcd-%j.log

# trainer.default_root_dir (runs) must lie on a file system that all nodes see.
export HF_HUB_OFFLINE=1           # models and data are in the cache already: nodes often reach no network
srun opcd fit "$@" --trainer.num_nodes "$SLURM_JOB_NUM_NODES" --ckpt_path last
