#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# Pid 1 of a guest until its root is there.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t devtmpfs dev /dev
for module in /modules/*.ko; do $b insmod "$module"; done
tries=0
until [ -b /dev/vdc ] || [ $tries -eq 100 ]; do $b sleep 0.1; tries=$((tries + 1)); done
$b mount -t ext4 /dev/vda /root || $b poweroff -f
$b mkdir -p /root/srv
$b mount -t tmpfs -o mode=755 srv /root/srv
$b tar -xf /dev/vdb -C /root/srv
$b umount /proc
exec $b switch_root /root /bin/sh /srv/vm/init.sh
