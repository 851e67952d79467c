#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# scripts/deb.sh [DIRECTORY [VERSION]]    build the Debian package into a directory (dist), from what git knows of this tree
#
# What is needed for it is installed through apt where it is missing. The version is that of pyproject.toml if none is
# given, and the time that of the last commit, so the same commit gives the same package.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly INTO=$(realpath -m "${1:-dist}")
say() { printf 'deb: %s\n' "$1" >&2; }

for command in apt-get dpkg git; do
    command -v "$command" >/dev/null || { say "$command is missing: this needs Debian or Ubuntu, and a clone"; exit 4; }
done
missing=()
# What debian/control wants to be there, and what builds it.
needs=$(sed -n 's/^Build-Depends: //p' packaging/debian/control | tr ',' '\n' | sed 's/ *(.*//; s/debhelper-compat/debhelper/; s/ //g')
for package in build-essential dpkg-dev $needs; do
    [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
done
if ((${#missing[@]})); then
    say "installing ${missing[*]}"
    [[ $EUID == 0 ]] || { say "that takes root"; exit 1; }
    apt-get update -q >&2
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}" >&2
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/splicer-deb-XXXXXX")
trap 'rm -rf "$work"' EXIT
tree=$work/splicer
mkdir -p "$tree" "$INTO"
git ls-files -z | xargs -0 cp --parents --no-dereference -t "$tree"
cp -R "$tree/packaging/debian" "$tree/debian"
version=${2:-$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)}
when=$(git log -1 --format=%cD)
cat > "$tree/debian/changelog" <<CHANGES
splicer ($version) unstable; urgency=medium

  * See CHANGELOG.md.

 -- $(sed -n 's/^Maintainer: //p' packaging/debian/control)  $when
CHANGES
(cd "$tree" && dpkg-buildpackage --build=binary --no-sign --unsigned-changes >"$work/log" 2>&1) || {
    tail -n 40 "$work/log" >&2
    say "dpkg-buildpackage failed"
    exit 1
}
cp "$work"/splicer_*.deb "$INTO"/
for package in "$work"/splicer_*.deb; do
    printf '%s\n' "$INTO/$(basename "$package")"
done
