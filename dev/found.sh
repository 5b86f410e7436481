#!/bin/sh
# What `make` found on this machine, a line each, and what a missing piece costs.
# usage: dev/found.sh CC OPENMP NVCC GPU_ARCHS CUDA_ARCHS          (the Makefile's)
cc=$1 openmp=$2 nvcc=$3 gpu_archs=$4 cuda_archs=$5

version=$($cc --version 2>/dev/null | head -n 1)
if [ "$openmp" = 1 ]; then
    echo "CPU       $cc with OpenMP: ${version:-not found}"
else
    echo "CPU       $cc without OpenMP, so one thread: ${version:-not found}"
fi
if [ -z "$nvcc" ]; then
    echo "CUDA      no nvcc: the CPU side only. It comes with the CUDA Toolkit, 12.4 or newer; NVCC=/path/to/nvcc names it"
    exit 0
fi
release=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
echo "CUDA      $nvcc, release $release, for$(printf ' sm_%s' $cuda_archs)"
if [ -z "$gpu_archs" ]; then
    echo "GPU       none to be seen (compute capability 8.0 or higher): CUDA_ARCHS names what to compile for, say 90a"
fi
found=$(dev/nccl.sh)
if [ -n "$found" ]; then
    echo "NCCL      $found"
else
    echo "NCCL      not found: the GPUs of one machine only, if they reach each other's memory. NCCL_HOME=/path names it"
fi
