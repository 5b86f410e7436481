#!/usr/bin/env bash
# A pre-training run by mpirun, of Open MPI, or MPICH's or Intel's. On one of the machines, which becomes rank 0's:
#     NODES=2 HOSTFILE=hosts dev/scripts/mpirun.sh SIZE ROUTER [the trainer's options...]
#     NODES          machines (1)
#     HOSTFILE       their names, a line each, this machine's first; not needed for one
#     GPUS_PER_NODE  all that nvidia-smi shows here
#     MASTER_ADDR, MASTER_PORT  where rank 0 listens (this machine's name, 29600)
# Not run on a cluster yet: what is tested (dev/test/test_scripts.sh) is the command that mpirun is given, not mpirun.
#
# The same on all machines: the program, at this path (the trainer needs no MPI library), the paths of DATA and TOKENIZER and what
# is there, and OUT, which must be on a file system that all share: all ranks write to each checkpoint. NCCL must have been built in
# (`make found` says so): it carries gradients between machines.
# The trainer reads OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK, _LOCAL_SIZE (Open MPI) or PMI_RANK, PMI_SIZE, MPI_LOCALRANKID,
# MPI_LOCALNRANKS (MPICH, Intel), and MASTER_ADDR and MASTER_PORT. mpirun gives no token that tells two runs apart: two at a time
# on one machine need two MASTER_PORTs.
# To stop: SIGTERM to the trainer of any one rank; all save and end. (Ctrl-C at Open MPI's mpirun leaves them about a second.)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

nodes=${NODES:-1}
per_node=${GPUS_PER_NODE:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)}
[[ $nodes =~ ^[1-9][0-9]*$ && $per_node =~ ^[1-9][0-9]*$ ]] || { echo "usage error: NODES=$nodes, GPUS_PER_NODE=$per_node" >&2 && exit 2; }
[ "$nodes" = 1 ] || [ -n "${HOSTFILE:-}" ] || { echo 'usage error: HOSTFILE=FILE names the machines' >&2 && exit 2; }
export MASTER_ADDR=${MASTER_ADDR:-$(hostname)}
export MASTER_PORT=${MASTER_PORT:-29600}
export LAUNCHED=1
export GPUS=$((nodes * per_node))
if mpirun --version 2>&1 | grep -i 'open.*mpi' >/dev/null; then
    # without binding, which would leave a rank with one core; "slot" is mpirun's word for a rank's place on a machine
    words="mpirun -np $GPUS ${HOSTFILE:+--hostfile $HOSTFILE} --map-by ppr:$per_node:node --bind-to none -x MASTER_ADDR -x MASTER_PORT"
else
    words="mpirun -n $GPUS -ppn $per_node ${HOSTFILE:+-f $HOSTFILE} -genv MASTER_ADDR $MASTER_ADDR -genv MASTER_PORT $MASTER_PORT"
fi
LAUNCHER=$words exec dev/scripts/pretrain.sh "$@"
