#!/bin/sh
# Runs nvcc and leaves out what ptxas has to say of the experts' products on Hopper, a line per kernel, fourteen in all:
#     ptxas info : (C7517) warpgroup.wait is injected in ... to allow use of registers defined by GMMA in ...grouped_kernel...
# ptxas adds a wait of its own where such a kernel first reads the sums of its wgmma. The kernels wait there anyhow, and the
# speeds in the README are measured with these waits. Of any other kernel the line is news, and is printed.
# usage: dev/nvcc.sh NVCC OPTIONS...          (the Makefile's)
expected='(C7517) warpgroup\.wait is injected .*hopper14grouped_kernel'
exec 3>&1
status=$({ { "$@" 2>&1 >&3; echo $? >&4; } | grep -v "$expected" >&2; } 4>&1)
exit "$status"
