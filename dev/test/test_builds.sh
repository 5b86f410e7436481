#!/usr/bin/env bash
# What the programs and the Makefile do on other machines and with other compilers' options: fast-math is refused in the Makefile,
# by the compiler and at start; a CPU older than the build, a big-endian machine get a message; threads that wait soon sleep; a
# container's memory counts; make says early what is missing, and help names every target.
# usage: dev/test/test_builds.sh          (after make train_remoe; about 15 seconds)
cd "$(dirname "$0")/../.." || exit 1
. dev/test/check.sh
here=build/test/builds
compilers=
for compiler in gcc clang; do
    command -v $compiler >/dev/null && compilers="$compilers $compiler"
done
unset WERROR OMP_WAIT_POLICY GOMP_SPINCOUNT KMP_BLOCKTIME
rm -rf $here
mkdir -p $here

skip() {
    skipped=$((skipped + 1))
    echo "skipped: $1"
}

says() { # says STATUS TEXT COMMAND...: it exits so, says that, and a remedy
    local expected=$1 text=$2 status
    shift 2
    "$@" >$here/output 2>&1
    status=$?
    [ $status = "$expected" ] && grep -q -e "$text" $here/output && grep -q -e '---> ' $here/output
    status=$?
    check "exit $expected with '$text' and a remedy: $*" $status
    [ $status = 0 ] || sed 's/^/    /' $here/output
}

# --- fast-math
fast='-Ofast -ffast-math -funsafe-math-optimizations -ffinite-math-only -fassociative-math -freciprocal-math -fno-signed-zeros'
for flag in $fast; do
    says 2 "$flag: gives other losses" make -n train_remoe CFLAGS="-O3 $flag"
done
says 2 '-ffast-math: gives other losses' make -n train_remoe CC='cc -ffast-math'
says 2 '-Ofast: gives other losses' make -n train_remoecu NVCCFLAGS='-O3 -Xcompiler -march=native,-Ofast' NVCC=nvcc
says 2 '-ffinite-math-only: gives other losses' env CFLAGS=-ffinite-math-only make -n

cat >$here/start.c <<'C'
#include "llmc/machine.h"
int main(int argc, char **argv) {
    (void)argc;
    machine_start(argv);
    printf("started\n");
    return 0;
}
C
build="-std=c11 -D_GNU_SOURCE -I. -O2 $here/start.c -o $here/start"
# what a compiler admits to, by macros, is cancelled here as older compilers do not have it
hidden='-U__FAST_MATH__ -U__FINITE_MATH_ONLY__ -U__ASSOCIATIVE_MATH__ -U__RECIPROCAL_MATH__ -U__NO_SIGNED_ZEROS__'
for compiler in $compilers; do
    # shellcheck disable=SC2086 # options are many words
    $compiler $build && $here/start | grep -qx started
    check "$compiler: a plain build starts" $?
    for flag in -Ofast -ffast-math -ffinite-math-only; do
        # shellcheck disable=SC2086
        ! $compiler $build $flag 2>$here/output && grep -q 'no guard against NaN' $here/output
        check "$compiler $flag: refused as it is compiled" $?
    done
    while read -r text flags; do
        # shellcheck disable=SC2086
        $compiler $flags $hidden $build || check "$compiler $flags compiles" 1
        says 1 "that .*$text.*: its results would be others" $here/start
    done <<'FLAGS'
NaN -ffinite-math-only
reordered -fassociative-math -fno-signed-zeros -fno-trapping-math
divisions -freciprocal-math
-0 -fno-signed-zeros
reordered -funsafe-math-optimizations
NaN -ffast-math
FLAGS
    # flushing is switched on by what is linked
    # shellcheck disable=SC2086
    $compiler -std=c11 -D_GNU_SOURCE -I. -O2 -c $here/start.c -o $here/start.o &&
        $compiler -ffast-math $here/start.o -o $here/start
    says 1 'tiny numbers are flushed to zero' $here/start
done

# --- machines
for compiler in $compilers; do
    # shellcheck disable=SC2086
    ! $compiler -U__BYTE_ORDER__ -D__BYTE_ORDER__=__ORDER_BIG_ENDIAN__ $build 2>$here/output &&
        grep -q 'a big-endian machine' $here/output
    check "$compiler: a big-endian machine" $?
    if [ "$(uname -m)" = x86_64 ] && ! grep -qw fma4 /proc/cpuinfo; then
        # shellcheck disable=SC2086
        $compiler -march=native -mfma4 $build || check "$compiler -mfma4 compiles" 1
        says 1 'built for a CPU with fma4, which this one lacks' $here/start
    else
        skip 'a CPU older than the build: this one has all that is asked for, or is no x86'
    fi
done

# --- threads
spins() { # how long gcc's runtime spins, as the program is left with it
    OMP_DISPLAY_ENV=verbose "$@" 2>&1 >/dev/null | sed -n "s/.*GOMP_SPINCOUNT = '\([^']*\)'.*/\1/p" | tail -n 1
}
if [ -n "$(spins ./train_remoe --help)" ]; then
    [ "$(spins ./train_remoe --help)" = 1000 ] && [ "$(spins build/tokenize --help)" = 1000 ]
    check 'threads that wait soon sleep' $?
    [ "$(spins env GOMP_SPINCOUNT=77 ./train_remoe --help)" = 77 ] &&
        [ "$(spins env OMP_WAIT_POLICY=passive ./train_remoe --help)" = 0 ]
    check 'GOMP_SPINCOUNT and OMP_WAIT_POLICY are the user'\''s' $?
else
    skip 'how threads wait: not built with gcc and OpenMP'
fi

# --- memory of a container, where one may make a group
group=/sys/fs/cgroup/memory/remoe_test_$$
limit=memory.limit_in_bytes
if [ ! -d /sys/fs/cgroup/memory ]; then
    group=/sys/fs/cgroup/remoe_test_$$
    limit=memory.max
fi
model='--layers 2 --hidden 64 --heads 4 --vocab-size 2048 --experts 8 --steps 1 --seq-len 128 --val-data= --sample-tokens 0'
data='--train-data build/sample/train_*.bin --tokenizer build/sample'
if mkdir $group 2>/dev/null && [ -e $group/$limit ] && echo 300000000 2>/dev/null >$group/$limit; then
    limited() { # in the group
        bash -c "echo \$\$ >$group/cgroup.procs && exec \"\$@\"" bash "$@"
    }
    set -f
    # shellcheck disable=SC2086
    says 1 "$group/$limit allows 0.30" limited ./train_remoe $model $data --batch 4096 --out $here/run
    batch=$(sed -n 's/^  ---> \(--batch [0-9]*\) fits$/\1/p' $here/output)
    # the sum is that of the lines above it
    awk '/^memory/ { weights = $2 } / GB of activations/ { half = $5 }
         /^error/ { for (i = 1; i < NF; i++) if ($(i + 1) == "+") { a = $i; b = $(i + 2); sum = $(i + 4) } }
         END { exit !(a == weights && b > 0 && sum > a && sum - a - b < 0.001 && sum - a - b > -0.001) }' $here/output
    check 'the sum of the refusal is of the lines above it' $?
    # shellcheck disable=SC2086
    limited ./train_remoe $model $data $batch --out $here/run >$here/output 2>&1 && [ -n "$batch" ] &&
        ! grep -q "GB of memory" $here/output
    check "the batch that is said to fit does: $batch" $?
    set +f
else
    skip 'a container'\''s memory: no right to make a group'
fi
rmdir $group 2>/dev/null

# --- make
mkdir -p $here/bin
printf '#!/bin/sh\nexit 9\n' >$here/bin/nvidia-smi
chmod +x $here/bin/nvidia-smi
for target in compare test-cuda; do
    says 2 'no GPU is to be seen' env PATH="$PWD/$here/bin:$PATH" make -j1 $target NVCC=nvcc GPU=./train_remoecu CUDA_ARCHS=80
done
make help >$here/output
for target in $(sed -n 's/^\.PHONY://p' Makefile); do
    [ "$target" = all ] || [ "$target" = help ] || [ "$target" = need-gpu ] || grep -q "^make $target " $here/output
    check "make help names $target" $?
done
! make -n -B train_remoe data-tools train_remoecu_emulated train_remoecu NVCC=nvcc | grep -q -e -Werror
check 'a plain make: a new warning is none of the user'\''s business' $?
[ "$(make -n -B test test-emulated NVCC= | grep -c -e '-o .*\(remoe\|tokenizer\|tokenize\|emulated\|fp32\) ')" = \
    "$(make -n -B test test-emulated NVCC= | grep -c -e -Werror)" ]
check 'the tests'\'' builds: a warning is an error' $?
line='ptxas info    : (C7517) warpgroup.wait is injected in around line 7 to allow use of registers defined by GMMA in function'
dev/nvcc.sh sh -c "echo \"$line '_ZN6hopper14grouped_kernelILi4'\" >&2; echo \"$line 'another'\" >&2; echo out; exit 3" \
    >$here/out 2>$here/output
[ $? = 3 ] && [ "$(cat $here/out)" = out ] && [ "$(cat $here/output)" = "$line 'another'" ]
check 'dev/nvcc.sh leaves out what is expected, and no more' $?

echo "test_builds: $passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
