#!/bin/sh
# What `make` found on this machine, a line each, and what a missing piece costs.
# usage: dev/found.sh CC OPENMP NVCC GPU_ARCHS CUDA_ARCHS          (the Makefile's)
cc=$1 openmp=$2 nvcc=$3 gpu_archs=$4 cuda_archs=$5

nccl() { # the folder that holds NCCL, if any
    python=$(python3 -c 'import nvidia.nccl; print(list(nvidia.nccl.__path__)[0])' 2>/dev/null)
    for folder in "$NCCL_HOME" "${CUDA_HOME:-/usr/local/cuda}" /usr /usr/local "$python"; do
        if [ -n "$folder" ] && [ -e "$folder/include/nccl.h" ]; then
            echo "$folder"
            return
        fi
    done
}

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
found=$(nccl)
if [ -n "$found" ]; then
    echo "NCCL      $found"
else
    echo "NCCL      not found: one GPU a run. NCCL_HOME=/path names it"
fi
