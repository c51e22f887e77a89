#!/bin/sh
# Install Garrison and all it needs into $VENV. llama-cpp-python has no wheel and is compiled: show how far it is.
set -eu
cd "$(dirname "$0")/.."
: "${PYTHON:=python3}" "${VENV:=.venv}"
log="$VENV/install.log"

fail() {
    printf 'setup: %s\n  do this: %s\n' "$1" "$2" >&2
    exit 1
}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "Python 3.11 or newer is needed as '$PYTHON'" "sudo apt-get install python3 python3-venv"
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "Python's venv module is missing" "sudo apt-get install python3-venv"
for tool in gcc g++ make; do
    command -v "$tool" >/dev/null || fail "$tool is missing; llama.cpp is compiled here" "sudo apt-get install gcc g++ make"
done

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
echo "setup: installing into $VENV (the first time llama.cpp is compiled: 3 to 15 minutes on two cores; log: $log)"

# pip prints the compiler's "[ 12/340]" only when verbose; keep all of it in the log and show the counter alone.
status="$VENV/.pip-status"
{ "$VENV/bin/pip" install -v -c constraints.txt -e '.[dev]' 2>&1 && echo 0 >"$status" || echo 1 >"$status"; } |
    tee "$log" |
    awk -v tty="$([ -t 1 ] && echo 1 || echo 0)" '
        function show(text) {
            if (tty) { printf "\r\033[K  %s", text } else { print "  " text }
            fflush()
        }
        match($0, /\[ *[0-9]+\/[0-9]+\]/) {
            split(substr($0, RSTART + 1, RLENGTH - 2), part, "/")
            tenth = int(10 * part[1] / part[2])
            if (tty) { show("compiling llama.cpp: " part[1] + 0 "/" part[2]) }
            else if (tenth != last) { show("compiling llama.cpp: " tenth * 10 " %"); last = tenth }
        }
        /^ *(Downloading|Using cached) [^ ]*\/?[a-zA-Z0-9_.-]+\.(whl|tar\.gz)/ && tty { n = split($2, bits, "/"); show($1 " " bits[n]) }
        /^Building wheels? for collected packages/ { show("building wheels") }
        /^Installing collected packages/ { show("installing packages") }
        END { if (tty) printf "\r\033[K" }'
if [ "$(cat "$status")" != 0 ]; then
    tail -n 15 "$log" >&2
    fail "installing the Python packages failed; the whole log is in $log" "read the log's end, then run the same make again"
fi
rm -f "$status"
