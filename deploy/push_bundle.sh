#!/usr/bin/env bash
# Sends a bundle to a device over ssh, and installs it there.
set -euo pipefail

usage() {
    cat <<'END'
usage: deploy/push_bundle.sh BUNDLE [USER@]HOST [SSH ARGUMENTS...]

  deploy/push_bundle.sh bundle/tinystories admin@jetson.local
  deploy/push_bundle.sh bundle/tinystories jetson.local -p 2222

The device verifies it, tests it, serves it, or goes on with the one before and says why. There, the user must be root,
or may run sudo without a password.
END
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit
fi
if (($# < 2)); then
    usage >&2
    exit 2
fi
bundle=$1 host=$2
shift 2
[[ -f $bundle/manifest.json ]] || {
    echo "error: $bundle is not a bundle: it has no manifest.json" >&2
    exit 66
}

# One connection: the files come in by stdin, and are gone when the installation ends, however it ends.
# shellcheck disable=SC2016 # these variables are the device's
tar -C "$bundle" -cf - . | ssh "$@" "$host" '
    set -eu
    folder=$(mktemp -d)
    trap "rm -rf \"$folder\"" EXIT
    tar -C "$folder" -xf -
    sudo=; [ "$(id -u)" = 0 ] || sudo="sudo -n"
    $sudo /opt/edgelm/current/bin/python -m edge.bundle install "$folder"'
