#!/usr/bin/env bash
# Installs the daemon as a systemd service from this checkout, or upgrades an installed one to it.
set -euo pipefail

usage() {
    cat <<'END'
usage: deploy/install.sh [--lan] [--http] [--images] [--dry-run]   install, or upgrade; a second run changes nothing
       deploy/install.sh --uninstall [--purge] [--dry-run]

  --lan        allow a broker in the local network, not only on this machine
  --http       serve HTTP on 127.0.0.1:8080, too (edgelm-http.socket); an upgrade keeps it
  --images     take pictures, with Pillow, too; an upgrade keeps it
  --dry-run    print what would be done, and do nothing
  --uninstall  remove service, program and caches; keep settings, state, bundles and the group
  --purge      with --uninstall: remove settings, state, bundles and the group, too

PYTHON sets the interpreter (default: python3). pip's own variables apply, such as PIP_INDEX_URL, or
PIP_NO_INDEX=1 PIP_FIND_LINKS=/media/wheels on a device without a network.

What goes where:
  /opt/edgelm/releases/VERSION-HASH   virtual environments; /opt/edgelm/current links to the one in use
  /opt/edgelm/bundles                 models; see: edgelm bundle --help
  /etc/edgelm/edgelm.toml             settings, written once and never overwritten
  /etc/systemd/system/edgelm.*        the units
  /usr/local/bin/edgelm               the command, unless another program has this name
  /opt/edgelm/engines, /var/cache/edgelm  TensorRT engines, built by root and by the daemon
  /var/lib/edgelm                     state: requests and answers not delivered yet
END
}

readonly OPT=/opt/edgelm ETC=/etc/edgelm UNITS=/etc/systemd/system GROUP=edgelm COMMAND=/usr/local/bin/edgelm
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly here
python=${PYTHON:-python3}
lan='' http='' images='' dry='' uninstall='' purge=''
umask 022

fail() {
    echo "error: $*" >&2
    exit 1
}

say() { echo "install: $*"; }

# All changes to the system go through this function.
run() {
    if [[ $dry ]]; then
        printf 'would run:'
        printf ' %q' "$@"
        echo
    else
        "$@"
    fi
}

# `settled` names the release that started; it is renamed to `unsettled` before the system changes. After an interrupted
# run, the next one finishes the installation and still knows the release to fall back to.
unsettle() {
    changed=yes
    [[ ! -e $OPT/settled ]] || run mv -f "$OPT/settled" "$OPT/unsettled"
}

settle() {
    run install -m 644 <(echo "$release") "$OPT/settled"
    run rm -f "$OPT/unsettled"
}

# put MODE FROM TO: replaces a file atomically.
put() {
    cmp -s "$2" "$3" && return
    unsettle
    run install -D -m "$1" "$2" "$3.new"
    run mv -f "$3.new" "$3"
}

# swap TARGET LINK: replaces a link atomically.
swap() {
    run ln -sfn "$1" "$2.new"
    run mv -fT "$2.new" "$2"
}

check_machine() {
    [[ $dry ]] || ((EUID == 0)) || fail "this needs root: sudo $0"
    [[ $dry || -d /run/systemd/system ]] || fail "systemd is not running; the daemon is installed as its service"
    command -v "$python" >/dev/null || fail "$python is not installed: install Python 3.10 or newer, or set PYTHON"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$("$python" --version) is too old: install 3.10 or newer, or set PYTHON"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make virtual environments: apt install python3-venv"
    # ProtectHome= hides home folders from the service.
    case $(readlink -f "$(command -v "$python")") in
        /home/* | /root/* | /run/user/*) fail "$python is in a home folder, which the service cannot read; set PYTHON" ;;
    esac
}

# Sets jetpack: the major version, empty on other machines; extras: for pip; visible: a flag of venv; compiler: the one
# that pip will call, empty where there is none.
detect_machine() {
    jetpack='' extras='' visible=''
    local release tensorrt='not found'
    if [[ -r /etc/nv_tegra_release ]]; then
        release=$(sed -n 's/^# R\([0-9]*\) .*/\1/p' /etc/nv_tegra_release)
        case $release in
            36) jetpack=6 extras=cuda12 ;;
            38 | 39) jetpack=7 extras=cuda13 ;;
            *) fail "/etc/nv_tegra_release names L4T R$release: JetPack 6 (R36) or newer is needed" ;;
        esac
    fi
    if "$python" -c 'import tensorrt' 2>/dev/null; then
        tensorrt=found visible=--system-site-packages # apt's TensorRT belongs to the driver; pip has none for Jetson
    else
        extras=''
    fi
    [[ ! $http ]] || extras=web${extras:+,$extras}
    [[ ! $images ]] || extras=images${extras:+,$extras}
    extras=${extras:+[$extras]}
    say "${jetpack:+Jetson with JetPack $jetpack, }Python $("$python" -c 'import platform; print(platform.python_version())'), TensorRT $tensorrt"
    compiler=${CXX:-$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("CXX") or "c++")')}
    command -v "${compiler%% *}" >/dev/null || compiler=''
    [[ $compiler || $visible ]] || ! grep -qE 'avx512_vnni|avx_vnni' /proc/cpuinfo ||
        say "without a C++ compiler ONNX Runtime decodes alone, more slowly: apt install g++, then run this again"
    [[ ! $jetpack || $visible ]] ||
        say "without TensorRT the model runs on the CPU: apt install python3-libnvinfer, then run this again"
}

# Sets release: the folder's name, from the version and a hash of everything that goes into it.
name_release() {
    local version hash
    version=$(sed -n 's/^version = "\([^"]*\)".*/\1/p' "$here/pyproject.toml")
    hash=$(cd "$here" && {
        find edge shared systemd -type f ! -path '*/__pycache__/*' ! -name '*.so' -print0
        printf '%s\0' pyproject.toml deploy/edgelm.toml deploy/constraints.txt
    } | LC_ALL=C sort -z | xargs -0 sha256sum |
        cat - <(echo "$extras $visible ${compiler:+compiled}" && "$python" -VV) | sha256sum | head -c 12)
    release=$version-$hash
}

# Virtual environments cannot be moved, so it is created in place; the last file written marks it as complete.
make_release() {
    local folder=$OPT/releases/$release source
    if [[ -e $folder/complete ]]; then
        return
    fi
    say "making $folder"
    run rm -rf "$folder"
    run mkdir -p "$OPT/releases"
    run "$python" -m venv ${visible:+"$visible"} "$folder"
    # A copy: the build writes files beside the sources, and the checkout may be read-only.
    source=/tmp/edgelm-source
    [[ $dry ]] || source=$(mktemp -d)
    # shellcheck disable=SC2064 # the folder's name as it is now
    trap "rm -rf '$source'" EXIT
    run cp -r "$here"/{pyproject.toml,README.md,LICENSE,edge,shared} "$source" # without the training host
    run "$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$here/deploy/constraints.txt" "$source$extras"
    run cp -r "$here/systemd" "$folder/systemd"
    run install -m 644 "$here/deploy/edgelm.toml" "$folder/edgelm.toml"
    run chmod -R go=rX "$folder"
    run touch "$folder/complete"
}

# deploy/edgelm.toml with the paths of this layout. Never overwritten.
write_settings() {
    [[ -e $ETC/edgelm.toml ]] && return
    run install -D -m 644 <(sed -e "s|^# bundle = .*|bundle = \"$OPT/bundles/current\"|" \
        -e 's|^# socket = .*|socket = "/run/edgelm.sock"|' \
        -e "s|^# socket_group = .*|socket_group = \"$GROUP\"|" "$here/deploy/edgelm.toml") "$ETC/edgelm.toml"
}

# place_units RELEASE: copies its units, and the drop-ins that this machine needs.
place_units() {
    local from=$OPT/releases/$1/systemd group groups='' drop_in
    [[ -d $from ]] || from=$here/systemd # a dry run
    if [[ -e $UNITS/edgelm.socket ]] && ! cmp -s "$from/edgelm.socket" "$UNITS/edgelm.socket"; then
        run systemctl stop edgelm.socket edgelm.service # to be opened again
    fi
    if [[ $http ]]; then
        if [[ -e $UNITS/edgelm-http.socket ]] && ! cmp -s "$from/edgelm-http.socket" "$UNITS/edgelm-http.socket"; then
            run systemctl stop edgelm-http.socket edgelm.service
        fi
        put 644 "$from/edgelm-http.socket" "$UNITS/edgelm-http.socket"
    fi
    put 644 "$from/edgelm.service" "$UNITS/edgelm.service"
    put 644 "$from/edgelm.socket" "$UNITS/edgelm.socket"
    if [[ $jetpack ]]; then
        for group in video render; do
            getent group "$group" >/dev/null && groups+="${groups:+ }$group"
        done
        drop_in=$(mktemp)
        sed "s|^SupplementaryGroups=.*|SupplementaryGroups=$groups|" "$from/jetson.conf" >"$drop_in"
        put 644 "$drop_in" "$UNITS/edgelm.service.d/10-jetson.conf"
        rm -f "$drop_in"
    fi
    if [[ $lan ]]; then
        put 644 "$from/lan.conf" "$UNITS/edgelm.service.d/20-lan.conf"
    fi
    run systemctl daemon-reload
}

# Links the command into the path, unless the name is taken by another program.
link_command() {
    if [[ -L $COMMAND && $(readlink "$COMMAND") == "$OPT"/* ]] || [[ ! -e $COMMAND && ! -L $COMMAND ]]; then
        swap "$OPT/current/bin/edgelm" "$COMMAND"
    else
        say "$COMMAND belongs to another program and is kept: use $OPT/current/bin/edgelm"
    fi
}

start_service() {
    local sockets=(edgelm.socket ${http:+edgelm-http.socket})
    run systemctl enable --quiet "${sockets[@]}" edgelm.service
    run systemctl reset-failed "${sockets[@]}" edgelm.service || true # clears the start limit
    if [[ $http ]] && ! systemctl --quiet is-active edgelm-http.socket; then
        run systemctl stop edgelm.service # systemd opens no socket for a service that runs
    fi
    run systemctl start "${sockets[@]}"
    run systemctl restart edgelm.service # returns when it is ready or has failed
}

install_it() {
    local before='' changed=''
    check_machine
    [[ ! -e $UNITS/edgelm-http.socket ]] || http=yes
    ! compgen -G "$OPT/current/lib/python3*/site-packages/PIL" >/dev/null || images=yes
    detect_machine
    name_release
    before=$(cat "$OPT/settled" 2>/dev/null || cat "$OPT/unsettled" 2>/dev/null || true)
    [[ $before == "$release" && -e $OPT/settled ]] || unsettle
    make_release
    getent group "$GROUP" >/dev/null || run groupadd --system "$GROUP"
    write_settings
    if [[ ! -e $OPT/bundles/current ]]; then
        run "$OPT/releases/$release/bin/python" -m edge.bundle install "$here/bundle/tinystories"
    fi
    place_units "$release"
    if [[ ! $changed ]] && systemctl --quiet is-active edgelm.service; then
        say "$release is installed and runs already"
        return
    fi
    swap "releases/$release" "$OPT/current"
    if ! start_service; then
        [[ $before && $before != "$release" ]] || fail "the service does not start; journalctl -u edgelm has the details"
        swap "releases/$before" "$OPT/current"
        place_units "$before"
        run rm -rf "$OPT/releases/$release"
        start_service || fail "neither $release nor $before starts; journalctl -u edgelm has the details"
        fail "$release does not start, and $before runs again; journalctl -u edgelm has the details"
    fi
    settle
    link_command
    local folder
    for folder in "$OPT"/releases/*; do # two are kept
        [[ ! -d $folder || $folder == */"$release" || $folder == */"${before:-$release}" ]] || run rm -rf "$folder"
    done
    [[ ! $dry ]] || { say "nothing was done: --dry-run" && return; }
    say "$release runs; settings: $ETC/edgelm.toml; clients of the socket join the group $GROUP"
}

# remove PATH...: removes those that exist, and names them.
remove() {
    local path
    for path in "$@"; do
        [[ -e $path || -L $path ]] || continue
        say "removing $path"
        run rm -rf "$path"
    done
}

# Home Assistant keeps a device that was announced to it; the daemon takes that back when it starts without the option.
withdraw_from_home_assistant() {
    local told=/var/lib/edgelm/homeassistant topic
    local drop_in=/run/systemd/system/edgelm.service.d/90-uninstall.conf
    [[ -e $told ]] || return 0
    say "removing this device from Home Assistant"
    run install -D -m 644 <(printf '[Service]\nEnvironment=EDGELM_HOMEASSISTANT_DISCOVERY=false\n') "$drop_in"
    run systemctl daemon-reload
    run systemctl restart edgelm.service || true
    for _ in {1..20}; do
        [[ ! $dry && -e $told ]] || break
        sleep 0.5
    done
    run rm -rf "${drop_in%/*}"
    [[ ! $dry && -e $told ]] || return 0
    while read -r topic; do
        say "the broker was not reached: mosquitto_pub -r -n -t '$topic' removes the device"
    done <"$told"
}

uninstall_it() {
    local path kept=''
    [[ $dry ]] || ((EUID == 0)) || fail "this needs root: sudo $0 --uninstall"
    if [[ -e $UNITS/edgelm.service || -e $UNITS/edgelm.socket ]]; then
        withdraw_from_home_assistant
        say "stopping and disabling edgelm.service and its sockets"
        [[ ! -e $UNITS/edgelm-http.socket ]] || run systemctl disable --quiet --now edgelm-http.socket || true
        run systemctl disable --quiet --now edgelm.socket edgelm.service || true
        remove "$UNITS"/{edgelm.service,edgelm.socket,edgelm-http.socket} "$UNITS"/edgelm.service.d/{10-jetson,20-lan}.conf
        [[ ! -d $UNITS/edgelm.service.d ]] || run rmdir --ignore-fail-on-non-empty "$UNITS/edgelm.service.d"
        run systemctl daemon-reload
    fi
    [[ ! -L $COMMAND || $(readlink "$COMMAND") != "$OPT"/* ]] || remove "$COMMAND"
    remove "$OPT"/{current,settled,unsettled,releases,engines} /var/cache/{private/,}edgelm
    if [[ $purge ]]; then
        remove "$OPT" "$ETC" /var/lib/{private/,}edgelm
        if getent group "$GROUP" >/dev/null; then
            say "removing the group $GROUP"
            run groupdel "$GROUP"
        fi
    else
        [[ ! -d $OPT ]] || run rmdir --ignore-fail-on-non-empty "$OPT"
        for path in "$ETC" /var/lib/{private/,}edgelm "$OPT/bundles"; do
            [[ ! -e $path ]] || kept+=" $path"
        done
        ! getent group "$GROUP" >/dev/null || kept+=", the group $GROUP"
        [[ ! $kept ]] || say "kept for the next installation:$kept; --uninstall --purge removes them, too"
    fi
    [[ ! $dry ]] || { say "nothing was done: --dry-run" && return; }
    say "edgelm is uninstalled"
}

for argument in "$@"; do
    case $argument in
        --lan) lan=yes ;;
        --http) http=yes ;;
        --images) images=yes ;;
        --dry-run) dry=yes ;;
        --uninstall) uninstall=yes ;;
        --purge) purge=yes ;;
        -h | --help)
            usage
            exit
            ;;
        *) fail "unknown argument $argument; deploy/install.sh --help lists them" ;;
    esac
done
[[ ! $uninstall || ! $lan ]] || fail "--lan cannot be combined with --uninstall"
[[ ! $uninstall || ! $http ]] || fail "--http cannot be combined with --uninstall"
[[ ! $uninstall || ! $images ]] || fail "--images cannot be combined with --uninstall"
[[ $uninstall || ! $purge ]] || fail "--purge needs --uninstall"
if [[ $uninstall ]]; then uninstall_it; else install_it; fi
