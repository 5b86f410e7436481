#!/bin/sh
# The folder that holds NCCL (include/nccl.h; lib/libnccl.so or .so.2), if any: NCCL_HOME, CUDA's, the system's, or that of PyTorch's
# package nvidia-nccl. Prints nothing where there is none.
# usage: dev/nccl.sh
python=$(python3 -c 'import nvidia.nccl; print(list(nvidia.nccl.__path__)[0])' 2>/dev/null)
for folder in "$NCCL_HOME" "${CUDA_HOME:-/usr/local/cuda}" /usr /usr/local "$python"; do
    if [ -n "$folder" ] && [ -e "$folder/include/nccl.h" ]; then
        echo "$folder"
        exit
    fi
done
