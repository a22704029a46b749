# Sourced by the other tools: brings a Debian machine into the state in which hvfuse runs.
#
#   setup run            what `hvfuse` itself needs
#   setup dev            what its tests need as well
#   setup bench          and what it is measured against
#
# Afterwards $hvfuse_python is the interpreter of a private virtual environment ($HVFUSE_VENV, else .venv
# at the top of the repository) that holds exactly the versions pinned in tools/requirements*.txt.
#
# The copy of the requirements file inside the environment is the stamp of a finished set-up: written
# last, so a set-up that was killed is begun again from nothing. Two set-ups at once wait for each other.
# Everything is said on stderr, so that stdout belongs to the program. Only apt-get needs root.

hvfuse_root=$(cd "${BASH_SOURCE[0]%/*}/.." && pwd -P)
hvfuse_venv=${HVFUSE_VENV:-$hvfuse_root/.venv}
hvfuse_python=$hvfuse_venv/bin/python

readonly exit_prerequisite=10
readonly usable_python='import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))'

setup() {
    local kind=$1
    if [[ $(type -t fusermount3) ]] && is_installed requirements.txt; then
        if [[ $kind == run ]] || { [[ ! $(missing_packages "$kind") ]] && is_installed requirements-dev.txt; }; then
            return
        fi
    fi
    mkdir -p "$hvfuse_venv" 2>/dev/null && [[ -w $hvfuse_venv ]] ||
        refuse "$hvfuse_venv cannot be written; run once: sudo $0"
    ( flock 9 && install_everything "$kind" 9<&- ) 9<"$hvfuse_venv" || exit
}

is_installed() {
    [[ -x $hvfuse_python ]] && cmp -s "$hvfuse_root/tools/$1" "$hvfuse_venv/installed-$1"
}

install_everything() {
    local kind=$1 missing=() more python
    type -t fusermount3 >/dev/null || missing+=(fuse3)
    if [[ $kind != run ]]; then
        read -ra more <<<"$(missing_packages "$kind")"
        missing+=(${more[@]+"${more[@]}"})
    fi
    if ! is_installed requirements.txt; then
        find_python >/dev/null || missing+=(python3 python3-venv)
        [[ -e /etc/ssl/certs/ca-certificates.crt ]] || missing+=(ca-certificates)
    fi
    ((${#missing[@]} == 0)) || install_packages "${missing[@]}"

    if ! is_installed requirements.txt; then
        python=$(find_python) || refuse "Python 3.11 or later with its venv module is needed"
        say "making a virtual environment in $hvfuse_venv"
        "$python" -m venv --clear "$hvfuse_venv" >&2 || refuse "$python could not make $hvfuse_venv"
        install_requirements requirements.txt
    fi
    if [[ $kind != run ]] && ! is_installed requirements-dev.txt; then
        install_requirements requirements-dev.txt
    fi
}

# The system's own interpreter if it will do, else the first on PATH; by its real path, so that an
# upgrade that takes the interpreter away is noticed.
find_python() {
    local candidate
    for candidate in /usr/bin/python3 python3; do
        if "$candidate" -c "$usable_python" 2>/dev/null; then
            "$candidate" -c 'import os, sys; print(os.path.realpath(sys.executable))'
            return
        fi
    done
    return 1
}

missing_packages() {
    local kind=$1 pair pairs=(
        qemu-img:qemu-utils qemu-io:qemu-utils fio:fio mkfs.ext4:e2fsprogs losetup:mount vhdiinfo:libvhdi-utils rsync:rsync
        qemu-system-x86_64:qemu-system-x86 busybox:busybox-static # a guest; its kernel is fetched by its test
    )
    if [[ $kind == bench ]]; then
        pairs+=("gcc:gcc libc6-dev" pkg-config:pkg-config) # the storage daemon comes with qemu
        [[ -e /usr/include/fuse3/fuse_lowlevel.h ]] || printf 'libfuse3-dev '
    fi
    for pair in "${pairs[@]}"; do
        [[ $(PATH=$PATH:/usr/sbin:/sbin type -t "${pair%:*}") ]] || printf '%s ' "${pair#*:}"
    done
}

install_packages() {
    local install="apt-get install --no-install-recommends $*"
    type -t apt-get >/dev/null || refuse "needed on this machine: $*"
    ((EUID == 0)) || refuse "a package is missing; run: sudo $install"
    say "installing $*"
    export DEBIAN_FRONTEND=noninteractive
    quietly apt-get -q -o DPkg::Lock::Timeout=300 update || say "apt-get update failed; trying with what is known"
    # shellcheck disable=SC2086
    quietly apt-get -q -y -o DPkg::Lock::Timeout=300 ${install#apt-get } || refuse "this failed: $install"
    hash -r
}

install_requirements() {
    say "installing the packages of tools/$1"
    "$hvfuse_python" -m pip install -qq --disable-pip-version-check --no-input --only-binary :all: \
        --require-hashes -r "$hvfuse_root/tools/$1" >&2 || refuse "pip could not install tools/$1 (see above)"
    cp "$hvfuse_root/tools/$1" "$hvfuse_venv/installing" && mv "$hvfuse_venv/installing" "$hvfuse_venv/installed-$1"
}

# Show what a command says only if it fails.
quietly() {
    local said
    said=$("$@" 2>&1 </dev/null) || { printf '%s\n' "$said" >&2 && return 1; }
}

say() {
    printf 'hvfuse: %s\n' "$*" >&2
}

refuse() {
    say "$*"
    exit "$exit_prerequisite"
}
