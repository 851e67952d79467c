#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Pid 1 of a guest once it has its root: mounts, modules, then inside.py.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
mount -t proc proc /proc
mount -t sysfs sys /sys
mountpoint -q /dev || mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t tracefs trace /sys/kernel/tracing
mount -t securityfs security /sys/kernel/security
ln -sf /proc/self/fd /dev/fd
hostname guest
ip link set lo up
for module in /srv/modules/*.ko; do insmod "$module"; done
mkdir -p /srv/results/kept
python3 -P /srv/vm/inside.py </dev/null 2>&1
echo o >/proc/sysrq-trigger
sleep 60
