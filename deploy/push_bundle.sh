#!/usr/bin/env bash
# Sends a bundle to a device over ssh, and installs it there.
set -euo pipefail

usage() {
    cat <<'END'
usage: deploy/push_bundle.sh BUNDLE [USER@]HOST [SSH ARGUMENTS...]

  deploy/push_bundle.sh bundle/tinystories admin@jetson.local
  deploy/push_bundle.sh bundle/tinystories jetson.local -p 2222

The device verifies, tests and serves it, or keeps the present one and says why. On the device, the user must be root,
or allowed to run sudo without a password.
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

# One connection: the files arrive on stdin, and are removed after the installation, however it ends.
# shellcheck disable=SC2016 # expanded on the device
tar -C "$bundle" -cf - . | ssh "$@" "$host" '
    set -eu
    folder=$(mktemp -d)
    trap "rm -rf \"$folder\"" EXIT
    tar -C "$folder" -xf -
    sudo=; [ "$(id -u)" = 0 ] || sudo="sudo -n"
    $sudo /opt/edgelm/current/bin/python -m edge.bundle install "$folder"'
