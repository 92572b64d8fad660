"""ZFS for a machine: the module from Debian's zfs-dkms, and zfsutils-linux.

Debian ships the module as source. It is compiled in the image's root, at the host's speed, once for each
image: in an emulated machine that would take hours.
"""

from __future__ import annotations

from pathlib import Path

from scripts.lib.vm import image

# Without the file no-autoinstall, the package would compile the module for the host's kernel.
_BUILD = """
sed 's/ main$/ contrib/' /etc/apt/sources.list >/etc/apt/sources.list.d/contrib.list
printf '#!/bin/sh\\nexit 101\\n' >/usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
install='apt-get -q -y install --no-install-recommends'
apt-get -q update
$install dkms linux-headers-{release} zfsutils-linux
touch /etc/dkms/no-autoinstall
$install zfs-dkms
cd /usr/src/zfs-*
dkms install "zfs/${{PWD##*-}}" -k {release}
packages=$(dpkg-query -W -f '${{source:Package}} ${{Package}}\\n' | sed -n '/-dkms$/d; s/^zfs-linux //p')
{{
    dpkg -L $packages
    find /lib/modules/{release} -path '*/updates/*.ko*' -o -name 'modules.*'
}} | while read -r name; do
    if [ -h "$name" ] || [ -f "$name" ]; then printf '%s\\n' "${{name#/}}"; fi
done >/tmp/names
tar -c -f /tmp/zfs.tar -C / -T /tmp/names
"""


def built(kernel: image.Kernel) -> Path:
    """A tar of the files to add to the image's root; built by root if missing. Raises VmError."""

    def make(work: Path) -> Path:
        script = _BUILD.format(release=kernel.release)
        return image.chroot_over(kernel, work, script, doing="compiling ZFS") / "tmp/zfs.tar"

    note = "; this takes 10 minutes or more, once"
    return image.made_once(kernel.root.with_name("zfs.tar"), "ZFS", make, note=note)
