#!/bin/sh
# See that there is a Mosquitto: the system's, or Debian's packages unpacked into .broker without root.
# Forced to unpack with GARRISON_UNPACK_BROKER=1. Prints nothing when there is nothing to do.
set -eu
cd "$(dirname "$0")/.."
broker=".broker"

fail() {
    printf 'broker: %s\n  do this: sudo apt-get install mosquitto\n' "$1" >&2
    exit 1
}

if [ -z "${GARRISON_UNPACK_BROKER:-}" ]; then
    if command -v mosquitto >/dev/null 2>&1 || [ -x /usr/sbin/mosquitto ]; then
        exit 0
    fi
fi
[ -x "$broker/usr/sbin/mosquitto" ] && exit 0

command -v apt-get >/dev/null && command -v dpkg >/dev/null ||
    fail "Mosquitto is not installed, and this is no Debian from which to unpack it"
echo "broker: Mosquitto is not installed; unpacking Debian's packages into $broker"

# apt's lists, caches, and state all live in the checkout; only the system's list of sources is read.
# Made whole beside its place: an interrupted run must not leave half a broker that the next one takes for a whole.
root="$PWD/$broker.partial"
rm -rf "$root"
mkdir -p "$root/apt/lists/partial" "$root/apt/cache/archives/partial" "$root/packages"
apt() {
    tool=$1
    shift
    "$tool" -qq -o Dir::State::Lists="$root/apt/lists" -o Dir::Cache="$root/apt/cache" \
        -o Dir::State::extended_states="$root/apt/extended_states" -o Debug::NoLocking=1 \
        -o APT::Sandbox::User="$(id -un)" "$@"
}
apt apt-get update || fail "Debian's package lists cannot be read"

# What mosquitto needs beyond what this system has; by name when the simulation says it is installed already.
wanted=$(apt apt-get -s install --no-install-recommends mosquitto 2>/dev/null | awk '$1 == "Inst" {print $2}')
[ -n "$wanted" ] || wanted="mosquitto libwebsockets17 libcjson1 libdlt2 libwrap0 libev4 libuv1"
(cd "$root/packages" && apt apt-get download $wanted) || fail "Debian's packages cannot be downloaded"
for package in "$root"/packages/*.deb; do
    dpkg -x "$package" "$root"
done
libraries="$root/usr/lib/$(dpkg-architecture -qDEB_HOST_MULTIARCH 2>/dev/null || gcc -print-multiarch)"
LD_LIBRARY_PATH="$libraries" "$root/usr/sbin/mosquitto" -h >/dev/null 2>&1 || [ $? -ne 127 ] ||
    fail "the unpacked Mosquitto does not start"
rm -rf "$root/packages" "$root/apt" "$broker"
mv "$root" "$broker"
