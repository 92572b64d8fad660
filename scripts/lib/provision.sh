# Installs what the scripts need: Debian packages and a virtual environment. Sourced by bash, from scripts/*;
# scripts/provision is its command line.
#
# UNIONFS_VENV   the directory of the virtual environment (default: .venv in the repository)

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
venv=${UNIONFS_VENV:-$repository/.venv}
build_packages=(fuse3 libfuse3-dev pkg-config gcc libc6-dev)

# packages_for WHAT: the Debian packages of a purpose, one per line.
packages_for() {
    case $1 in
        run) printf '%s\n' fuse3 libseccomp2 ;;
        test)
            printf '%s\n' "${build_packages[@]}" acl attr bindfs btrfs-progs bubblewrap busybox-static debootstrap \
                dosfstools e2fsprogs erofs-utils fio fish fuse-overlayfs git glusterfs-client glusterfs-server \
                keyutils libseccomp2 make mergerfs mount nginx-light openssh-sftp-server openssl procps rclone rsync \
                passt slirp4netns sqlite3 squashfs-tools sshfs strace tar util-linux xfsprogs zsh
            ;;
        dev) packages_for test ;;
        slow) # servers that slow tests and tests of sshfs start, and a browser
            printf '%s\n' chromium fonts-dejavu-core mariadb-server openssh-server postgresql stress-ng
            ;;
        clients) # container engines
            printf '%s\n' buildah containerd crun docker.io podman postgresql runc skopeo uidmap
            ;;
        deb) # what builds the Debian package
            printf '%s\n' "${build_packages[@]}" debhelper dpkg-dev git python3 python3-dev python3-venv
            ;;
        perf)
            printf '%s\n' coreutils findutils fio fuse-overlayfs fuse3 gcc git grep libc6-dev libseccomp2 make mergerfs \
                mount sqlite3 tar unionfs-fuse
            ;;
        vm) # what the host needs to build and run virtual machines
            printf '%s\n' busybox-static cpio debian-archive-keyring e2fsprogs git mmdebstrap qemu-system-x86 tar \
                util-linux xfsprogs
            ;;
        guest) # what the tests need in a virtual machine, besides the packages for `test`
            printf '%s\n' ca-certificates iproute2 kmod nfs-common nfs-kernel-server python3 python3-dev \
                python3-venv xz-utils zstd
            ;;
        *) die "unknown purpose $1; choose run, test, dev, slow, clients, deb, perf, vm or guest" ;;
    esac
}

die() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    exit 1
}

missing_packages() {
    local name
    for name in "$@"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null)" = installed ] || printf '%s\n' "$name"
    done
}

# install_packages NAME...: installs the missing ones, as root or through sudo; else prints the command to run.
install_packages() {
    command -v dpkg-query >/dev/null || die "this is neither Debian nor Ubuntu; install this system's equivalents of: $*"
    local missing as_root=()
    mapfile -t missing < <(missing_packages "$@")
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" != 0 ]; then
        if command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [ -t 0 ]; }; then
            as_root=(sudo)
        else
            die "packages are missing, and only root can install them: run apt-get install ${missing[*]}"
        fi
    fi
    echo "Installing ${missing[*]}"
    local apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y
        -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0)
    local install=("${apt[@]}" install --no-install-recommends "${missing[@]}")
    "${install[@]}" >/dev/null 2>&1 && return 0
    # Package lists are missing or outdated.
    "${apt[@]}" update >/dev/null && "${install[@]}" >/dev/null ||
        die "apt-get could not install ${missing[*]}; its messages are above"
}

usable_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# install_for WHAT...: installs the packages of these purposes.
install_for() {
    local what names=()
    for what in "$@"; do
        mapfile -t -O ${#names[@]} names < <(packages_for "$what")
    done
    install_packages "${names[@]}"
}

# install_node: installs Debian's npm unless another one is present.
install_node() {
    command -v npm >/dev/null || install_packages nodejs npm
}

# pick_python: sets $python to a Python of at least 3.11 that can create environments and build extensions.
pick_python() {
    local name
    python=
    for name in python3 python3.13 python3.12 python3.11 python3.14; do
        if usable_python "$name"; then
            python=$name
            break
        fi
    done
    if [ -z "$python" ]; then
        install_packages python3
        python=python3
        if ! usable_python "$python"; then
            install_packages python3.11
            python=python3.11
        fi
    fi
    # Debian's own interpreter comes without venv and headers; any other has both.
    local real
    real=$("$python" -c 'import os, sys; print(os.path.realpath(sys.executable))')
    case $real in
        /usr/bin/python3.*) install_packages "${real##*/}-venv" "${real##*/}-dev" ;;
    esac
}

# make_environment EXTRA: installs the project and its extra (run, perf, test or dev) in $venv, unless up to date.
make_environment() {
    local extra=$1 key name within=
    key=$(cat "$repository"/{pyproject.toml,setup.py} "$repository"/{unionfs/core/*.p[xy]*,launcher/*.c} <(printf '%s' "$repository") |
        sha256sum | cut -d' ' -f1)
    if [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.unionfs-$extra" 2>/dev/null)" = "$key" ]; then
        return 0
    fi
    install_packages "${build_packages[@]}"
    pick_python
    if ! usable_python "$venv/bin/python"; then
        echo "Creating a virtual environment in $venv"
        "$python" -m venv --clear "$venv" || die "$python could not create a virtual environment in $venv"
    fi
    local what=$repository
    [ "$extra" = run ] || what="$repository[$extra]"
    echo "Installing unionfs and its requirements into $venv"
    # compat: the path of the repository, instead of a finder that makes every start of the interpreter 20 ms longer
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check -e "$what" \
        --config-settings editable_mode=compat ||
        die "pip could not install the project's requirements; its messages are above"
    # dev contains test, test contains perf, and that contains run
    for name in dev test perf run; do
        if [ "$name" = "$extra" ] || [ -n "$within" ]; then
            within=yes
            printf '%s' "$key" >"$venv/.unionfs-$name"
        fi
    done
}
