#!/bin/sh
# See that the official Node clients are there, for the tests: npm of the virtual environment installs what
# tests/node/package-lock.json names. Prints nothing when there is nothing to do.
set -eu
cd "$(dirname "$0")/.."
: "${VENV:=.venv}"
clients="tests/node"
installed="$clients/node_modules/.package-lock.json"

fail() {
    printf 'node: %s\n  do this: %s\n' "$1" "$2" >&2
    exit 1
}

[ -e "$installed" ] && [ ! "$clients/package-lock.json" -nt "$installed" ] && exit 0
[ -x "$VENV/bin/npm" ] || fail "the virtual environment has no npm" "make setup"
echo "node: installing the official Node clients into $clients/node_modules"
log="$VENV/npm.log"
"$VENV/bin/npm" ci --prefix "$clients" --ignore-scripts --no-audit --no-fund >"$log" 2>&1 || {
    tail -n 15 "$log" >&2
    fail "npm cannot install them; the whole log is in $log" "read the log's end, then run the same make again"
}
touch "$installed" # npm keeps the time of the lock file's own making
