#!/bin/sh
# See that there is a SoftHSM, a PKCS#11 token in software for the tests: the system's, or Debian's packages unpacked
# into .softhsm without root. Prints nothing when there is nothing to do.
set -eu
cd "$(dirname "$0")/.."
softhsm=".softhsm"

fail() {
    printf 'softhsm: %s\n  do this: sudo apt-get install softhsm2\n' "$1" >&2
    exit 1
}

[ -e /usr/lib/softhsm/libsofthsm2.so ] && command -v softhsm2-util >/dev/null 2>&1 && exit 0
[ -x "$softhsm/usr/bin/softhsm2-util" ] && exit 0

command -v apt-get >/dev/null && command -v dpkg >/dev/null ||
    fail "SoftHSM is not installed, and this is no Debian from which to unpack it"
echo "softhsm: SoftHSM is not installed; unpacking Debian's packages into $softhsm"

# As scripts/broker.sh: apt's state lives in the checkout, and the folder gets its name only when it is whole.
root="$PWD/$softhsm.partial"
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
(cd "$root/packages" && apt apt-get download softhsm2 libsofthsm2) || fail "Debian's packages cannot be downloaded"
for package in "$root"/packages/*.deb; do
    dpkg -x "$package" "$root"
done
rm -rf "$root/packages" "$root/apt" "$softhsm"
mv "$root" "$softhsm"
