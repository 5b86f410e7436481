#!/bin/sh
# The built-in sample: this project's own sources, tests and docs as JSON Lines, a few KB a document.
#     data/make_sample.sh [FILE]          (default: data/sample.jsonl)
#     data/make_sample.sh --check         is data/sample.jsonl stale? Exit 1 if a quarter of it is no longer in the sources
# Long files are cut at blank lines before unindented ones, that is between functions or sections. What would
# exceed 400 KB is thinned out evenly, domain by domain. Made files ("do not edit") and what is no source or doc are left out.
set -eu
case ${1:-} in
--check) ;;
-*)
    sed -n '2,5s/^# \{0,1\}//p' "$0"
    [ "$1" = --help ] || [ "$1" = -h ] || exit 2
    exit 0
    ;;
esac
cd "$(dirname "$0")/.."
out=${1:-data/sample.jsonl}
check=0
[ "$out" != --check ] || { check=1; mkdir -p build; out=build/sample_check; }
limit=400000
tab=$(printf '\t')
LC_ALL=C
export LC_ALL

if ! git rev-parse --git-dir >/dev/null 2>&1; then
    echo "error: make sample lists this project's files with git, and this is no git checkout" >&2
    echo "  ---> git clone the project, or use data/sample.jsonl as it is" >&2
    exit 1
fi

domain_of() {
    case $1 in
    *.cu | *.cuh) echo cuda ;;
    *.c | *.h) echo c ;;
    *.py) echo python ;;
    *.md) echo markdown ;;
    Makefile | */Makefile | *.mk) echo make ;;
    *.sh | .ci/run) echo shell ;;
    esac
}

git ls-files | sort | while IFS= read -r path; do
    domain=$(domain_of "$path")
    if [ -z "$domain" ] || [ ! -s "$path" ] || head -n 5 "$path" | grep -q "do not edit"; then
        continue
    fi
    sed -e 's/\\/\\\\/g' -e 's/"/\\"/g' -e "s/$tab/\\\\t/g" -e 's/[[:cntrl:]]//g' "$path" |
        awk -v domain="$domain" '
        function flush() {
            if (text != "") {
                print "{\"text\": \"" text "\", \"meta\": {\"pile_set_name\": \"" domain "\"}}"
            }
            text = ""
        }
        {
            if (length(text) > 3000 && blank && $0 ~ /^[^ \\})]/) {
                flush()
            }
            blank = $0 == ""
            text = text $0 "\\n"
        }
        END { flush() }'
done >"$out.all"

if [ $check = 1 ]; then
    all=$(wc -l <data/sample.jsonl)
    found=$(grep -cFxf "$out.all" data/sample.jsonl || true)
    kinds() { sed 's/.*"pile_set_name": "\([^"]*\)".*/\1/' "$1" | sort -u | tr '\n' ' '; }
    echo "data/sample.jsonl: $found of $all documents are still in the sources; domains $(kinds data/sample.jsonl)"
    if [ $((4 * found)) -lt $((3 * all)) ] || [ "$(kinds data/sample.jsonl)" != "$(kinds "$out.all")" ]; then
        echo "error: data/sample.jsonl is stale" >&2
        echo "  ---> make sample" >&2
        exit 1
    fi
    exit 0
fi

awk -v limit=$limit '
    { line[NR] = $0; total += length($0) + 1; match($0, /"pile_set_name": "[^"]*"/); domain[NR] = substr($0, RSTART) }
    END {
        for (i = 1; i <= NR; i++) {
            k = seen[domain[i]]++ # the first of each domain stays
            if (limit >= total || k == 0 || int(k * limit / total) > int((k - 1) * limit / total)) {
                size += length(line[i]) + 1
                if (size <= limit) { print line[i] }
            }
        }
    }' "$out.all" >"$out.tmp"
rm "$out.all"
mv "$out.tmp" "$out"
echo "$out: $(wc -l <"$out") documents, $(wc -c <"$out") bytes"
