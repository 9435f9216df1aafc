#!/usr/bin/env bash
# Gives a checkout of LLaVA or LLaVA-NeXT the flag: bash patches/apply.sh CHECKOUT [--check | --reverse]
#
# The patches have no lines of context, so git itself would apply them to any file that is long enough: what is compared
# here is the hash of each file, which the patch names.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
checkout=$(cd "${1:?usage: bash patches/apply.sh CHECKOUT [--check | --reverse]}" && pwd)
option=${2:-}
# a checkout that is a folder of another repository: git would pass over it without a word
export GIT_CEILING_DIRECTORIES=${checkout%/*}

has() { # PATCH before|after: every file that the patch names is in the checkout, as it is before or after the patch
    local path hashes known
    while read -r path hashes; do
        known=${hashes%%..*}
        [ "$2" = before ] || known=${hashes##*..}
        [[ -f $checkout/$path && $(git hash-object --no-filters "$checkout/$path") == "$known"* ]] || return 1
    done < <(awk '/^diff --git/ { path = substr($4, 3) } /^index/ { print path, $2 }' "$1")
}

wanted=before other=after
[ "$option" != --reverse ] || wanted=after other=before
for patch in "$here"/*.patch; do
    name=$(basename "$patch")
    if has "$patch" "$wanted"; then
        (cd "$checkout" && git apply --unidiff-zero ${option:+"$option"} "$patch")
        if [ -z "$option" ] && ! has "$patch" after; then # git did nothing, or the patch's lines changed without its hashes
            echo "$name was given to git, and its files in $checkout are not what the patch says: restore them by git checkout" >&2
            exit 1
        fi
        echo "$name fits $checkout"
        exit 0
    fi
    if has "$patch" "$other"; then
        if [ "$option" = --reverse ]; then echo "$name is not in $checkout"; else echo "$name is in $checkout already"; fi
        exit 0
    fi
done
{
    echo "No patch fits $checkout, which is at $(git -C "$checkout" rev-parse --verify -q HEAD || echo "no commit"). They are:"
    grep -h '^For ' "$here"/*.patch
    echo "Check out one of these, or leave the checkout as it is: fwd2bot llava train <its arguments> --fwd2bot 16"
} >&2
exit 1
