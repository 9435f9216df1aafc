#!/usr/bin/env bash
# Gives a checkout of LLaVA or LLaVA-NeXT the flag: bash patches/apply.sh CHECKOUT [--check | --reverse]
#
# The patches have no lines of context, so git itself would apply them to any file that is long enough: what is compared
# here is the hash of each file, which the patch names.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
checkout=${1:?usage: bash patches/apply.sh CHECKOUT [--check | --reverse]}
option=${2:-}

fits() { # PATCH: every file that it names is in the checkout, as the patch knows it
    local path hashes known
    while read -r path hashes; do
        known=${hashes%%..*}
        [ "$option" != --reverse ] || known=${hashes##*..}
        [[ -f $checkout/$path && $(git hash-object --no-filters "$checkout/$path") == "$known"* ]] || return 1
    done < <(awk '/^diff --git/ { path = substr($4, 3) } /^index/ { print path, $2 }' "$1")
}

for patch in "$here"/*.patch; do
    if fits "$patch"; then
        git -C "$checkout" apply --unidiff-zero ${option:+"$option"} "$patch"
        echo "$(basename "$patch") fits $checkout"
        exit 0
    fi
done
{
    echo "No patch fits $checkout, which is at $(git -C "$checkout" rev-parse HEAD 2>/dev/null || echo "no commit"). They are:"
    grep -h '^For ' "$here"/*.patch
    echo "Check out one of these, or leave the checkout as it is: fwd2bot llava train <its arguments> --fwd2bot 16"
} >&2
exit 1
