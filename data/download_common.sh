# shellcheck shell=sh
# What the download scripts share; sourced by them.
#     add URL FILE [SHA256]    one more file to fetch
#     download DIR             says how much there is to fetch and the room for it, then fetches it
# A file is FILE.part until it is whole, and is continued where it was when the script is started again. It is
# checked against SHA256, or against the hash that the server itself publishes, as Hugging Face does.
# --help prints the comment at the beginning of the script that sources this.
set -eu

files=""
newline='
'

fail() {
    printf 'error: %s\n  ---> %s\n' "$1" "$2" >&2
    exit 1
}

# the script's own comment, and what else may be said to it than folders and numbers: nothing
help() {
    awk 'NR > 1 && !/^#/ { exit } NR > 1 && !/shellcheck/ { sub(/^# ?/, ""); print }' "$0"
}

usage_error() {
    printf 'usage error: %s\n  ---> %s --help\n' "$1" "$0" >&2
    exit 2
}

number() { # what, text
    case $2 in
    '' | *[!0-9]*) usage_error "$1 expects a number, not '$2'" ;;
    esac
}

for argument in "$@"; do
    case $argument in
    -h | --help)
        help
        exit 0
        ;;
    -*) usage_error "no option $argument" ;;
    '') usage_error "an empty argument" ;;
    esac
done

command -v curl >/dev/null || fail "curl is not installed" "install curl"

add() {
    files="$files$1 $2 ${3:--}$newline"
}

hash_of() {
    if command -v sha256sum >/dev/null; then
        sha256sum "$1" | cut -d ' ' -f 1
    else
        shasum -a 256 "$1" | cut -d ' ' -f 1
    fi
}

size_of() {
    if [ -f "$1" ]; then
        wc -c <"$1" | tr -d ' '
    else
        echo 0
    fi
}

gigabytes() {
    awk -v bytes="$1" 'BEGIN { printf "%.2f GB", bytes / 1e9 }'
}

# "SIZE SHA256" of a URL, from the headers alone; "-" where the server does not say
remote() {
    headers=$(curl -sSfIL --retry 3 "$1") ||
        fail "cannot reach $1" "check the network, and whether the file still exists"
    printf '%s\n' "$headers" | tr -d '\r"' | awk '
        tolower($1) == "content-length:" { length_ = $2 }
        tolower($1) == "x-linked-size:" { linked = $2 }
        tolower($1) == "x-linked-etag:" && $2 ~ /^[0-9a-f]+$/ && length($2) == 64 { hash = $2 }
        END { print (linked != "" ? linked : length_ != "" ? length_ : "-"), (hash != "" ? hash : "-") }'
}

fetch() { # url file size hash
    part=$2.part
    mkdir -p "$(dirname "$2")"
    if [ "$(size_of "$part")" != "$3" ]; then
        curl -fL -C - --retry 5 --retry-delay 5 -o "$part" "$1" ||
            fail "fetching $1 stopped" "start this script again: it goes on where it was"
    fi
    if [ "$3" != - ] && [ "$(size_of "$part")" != "$3" ]; then
        fail "$part has $(size_of "$part") bytes, expected $3" "rm $part, and start this script again"
    fi
    if [ "$4" != - ] && [ "$(hash_of "$part")" != "$4" ]; then
        fail "$part is not the published file: its SHA-256 is $(hash_of "$part"), expected $4" \
            "rm $part, and start this script again"
    fi
    mv "$part" "$2"
}

download() {
    dir=$1
    mkdir -p "$dir" || fail "cannot make the folder $dir" "name another: $0 DIR"
    plan=""
    bytes=0
    while read -r url file hash; do
        if [ -z "$url" ] || [ -f "$dir/$file" ]; then
            continue
        fi
        about=$(remote "$url")
        size=${about% *}
        [ "$hash" != - ] || hash=${about#* }
        plan="$plan$url $dir/$file $size $hash$newline"
        [ "$size" = - ] || bytes=$((bytes + size - $(size_of "$dir/$file.part")))
    done <<END
$files
END
    free=$(df -Pk "$dir" | awk 'NR == 2 { printf "%.0f", $4 * 1024 }')
    echo "to fetch into $dir: $(gigabytes $bytes); free there: $(gigabytes "$free")"
    [ "$bytes" -lt "$free" ] ||
        fail "not enough room in $dir" "free some disk space, or name another folder: $0 DIR"
    while read -r url file size hash; do
        [ -z "$url" ] || fetch "$url" "$file" "$size" "$hash"
    done <<END
$plan
END
    echo "$dir: complete"
}
