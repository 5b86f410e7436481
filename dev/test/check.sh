# What the shell tests share, to be sourced: counts of what held, what did not, what could not be tried.
# shellcheck shell=sh disable=SC2034 # the scripts print the counts
passed=0
failed=0
skipped=0

check() { # what, status of what was tested
    if [ "$2" = 0 ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED $1"
    fi
}
