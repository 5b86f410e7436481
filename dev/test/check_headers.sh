#!/bin/sh
# Every header of llmc/ and data/ compiles alone, as C11 and as C++17, by gcc and by clang, with and without OpenMP, without a warning.
# usage: dev/test/check_headers.sh [HEADER...]
cd "$(dirname "$0")/../.." || exit 1
make -s build/hf_code.h || exit 1 # made from dev/hf
headers=${*:-llmc/*.h llmc/*/*.h data/*.h}
flags="-O1 -D_GNU_SOURCE -Wall -Wextra -Werror -I. -c -o /dev/null"
compiled=0
failed=0

compile() { # compiler, language, standard, OpenMP flags, header
    if ! printf '#include "%s"\n' "$5" | $1 -x "$2" -std="$3" $4 $flags -; then
        echo "FAILED $5: $1 -std=$3 $4"
        failed=$((failed + 1))
    fi
    compiled=$((compiled + 1))
}

for compiler in gcc clang; do
    if ! command -v $compiler >/dev/null; then
        echo "skipped: no $compiler"
        continue
    fi
    for openmp in -fopenmp "-fopenmp-simd -Wno-unknown-pragmas" -Wno-unknown-pragmas; do
        if ! echo 'int x;' | $compiler $openmp -x c -c -o /dev/null - 2>/dev/null; then
            echo "skipped: $compiler $openmp"
            continue
        fi
        for header in $headers; do
            compile $compiler c c11 "$openmp" "$header"
            compile $compiler c++ c++17 "$openmp" "$header"
        done
    done
done
echo "check_headers: $compiled compilations, $failed failed"
[ "$failed" = 0 ] && [ "$compiled" -gt 0 ]
