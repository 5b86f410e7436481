#!/usr/bin/env bash
# A pre-training run by PyTorch's launcher. On each of NODES machines:
#     NODES=2 HEAD=node0 dev/scripts/torchrun.sh SIZE ROUTER [the trainer's options...]
#     NODES          machines (1)
#     HEAD           name of one of them, where they meet, and its port (localhost:29500)
#     GPUS_PER_NODE  all that nvidia-smi shows
#     RUN_ID         the same on all machines, another one for each run at the same time (remoe)
#     MAX_RESTARTS   how often torchrun starts all ranks anew after a failure: pretrain.sh resumes the run (3)
# Not run on a cluster yet: what is tested (dev/test/test_scripts.sh) is the command that torchrun is given, not torchrun.
#
# The same on all machines: the program (one file on a shared file system, or the same build), the paths of DATA and TOKENIZER
# and what is there, and OUT, which must be on a file system that all share: all ranks write to each checkpoint. NCCL must have been
# built in (`make found` says so): it carries gradients between machines.
# The trainer reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT, TORCHELASTIC_RUN_ID; with
# TORCHELASTIC_USE_AGENT_STORE=True torchrun itself listens on MASTER_PORT, and rank 0 on the port after it.
# To stop: SIGTERM to the trainer of any one rank; all save and end. Ctrl-C at torchrun gives them 30 s (large writes 69 GB).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

nodes=${NODES:-1}
per_node=${GPUS_PER_NODE:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)}
[[ $nodes =~ ^[1-9][0-9]*$ && $per_node =~ ^[1-9][0-9]*$ ]] || { echo "usage error: NODES=$nodes, GPUS_PER_NODE=$per_node" >&2 && exit 2; }
head=${HEAD:-localhost}
[[ $head == *:* ]] || head+=:29500
export LAUNCHED=1
export GPUS=$((nodes * per_node))
unset LAUNCHER
# torchrun would set it to 1; the ranks of a machine share its cores
threads=$(($(nproc) / per_node))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
exec torchrun --nnodes "$nodes" --nproc-per-node "$per_node" --rdzv-backend c10d --rdzv-endpoint "$head" \
    --rdzv-id "${RUN_ID:-remoe}" --max-restarts "${MAX_RESTARTS:-3}" --no-python dev/scripts/pretrain.sh "$@"
