#!/usr/bin/env bash
# A real Apptainer on Debian 12, which has none: the package of Debian's newer suites with the C library
# it wants, in a folder of its own. Nothing of the system is installed or changed, and no root is needed.
# usage: apptainer_up.sh PREFIX; then PATH=PREFIX/usr/bin:$PATH
set -euo pipefail
PREFIX=$(realpath -m "$1")
if [ -x "$PREFIX/usr/bin/apptainer" ]; then exec "$PREFIX/usr/bin/apptainer" --version; fi
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{lists/partial,cache/archives/partial,root}

# Whatever mirror this machine uses; Apptainer is in sid, its libraries are the older ones of trixie.
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -v security | sort -u | head -1)
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
for suite in trixie sid; do echo "deb [signed-by=$keyring] $mirror $suite main"; done > "$work/sources.list"
printf 'Package: *\nPin: release n=sid\nPin-Priority: 100\n' > "$work/preferences"
touch "$work/status"
apt=(apt-get -qq -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=/dev/null
  -o "Dir::Etc::preferences=$work/preferences" -o Dir::Etc::preferencesparts=/dev/null
  -o "Dir::State::lists=$work/lists" -o "Dir::State::status=$work/status" -o "Dir::Cache=$work/cache"
  -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o Acquire::Languages=none
  -o Debug::NoLocking=1 -o APT::Sandbox::User= -o APT::Install-Recommends=no)
"${apt[@]}" update
# With an empty list of installed packages these come with all that they need.
"${apt[@]}" install --download-only -y apptainer/sid squashfs-tools squashfuse patchelf > /dev/null
for deb in "$work"/cache/archives/*.deb; do dpkg-deb -x "$deb" "$work/root"; done

# Built beside, so that a killed script leaves nothing that looks whole; everyone may run it.
root=$work/root part=$PREFIX.$$.part
libraries=$part/glibc lib=usr/lib/x86_64-linux-gnu
umask 022
mkdir -p "$libraries" "$part/usr/bin" "$part/$lib"
cp -a "$root"/$lib/*.so* "$libraries"
cp -a "$root/$lib/apptainer" "$part/$lib"
for program in apptainer mksquashfs unsquashfs squashfuse squashfuse_ll; do
  if [ -e "$root/usr/bin/$program" ]; then cp -a "$root/usr/bin/$program" "$part/usr/bin"; fi
done
# The command finds its folders relative to usr, what it starts relative to usr/lib.
mkdir -p "$part/usr/var/lib/apptainer/mnt/session" "$part/usr/var/lib/apptainer/mnt/source"
mkdir "$part/usr/etc"
cp -a "$root/etc/apptainer" "$part/usr/etc"
ln -s ../etc "$part/usr/lib/etc"
ln -s ../var "$part/usr/lib/var"
for program in "$part"/usr/bin/* "$part/$lib/apptainer/bin/starter"; do
  "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries" "$root/usr/bin/patchelf" \
    --set-interpreter "$PREFIX/glibc/ld-linux-x86-64.so.2" --force-rpath --set-rpath "$PREFIX/glibc" "$program"
done
# A root that a container has left without CAP_SYS_RESOURCE could start nothing with "full".
sed -i 's/^root default capabilities = full/root default capabilities = no/' "$part/usr/etc/apptainer/apptainer.conf"
mv -T "$part" "$PREFIX" 2> /dev/null || rm -rf "$part"
"$PREFIX/usr/bin/apptainer" --version
