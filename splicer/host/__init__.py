# SPDX-License-Identifier: Apache-2.0
"""What the host is like: cgroups, network namespaces, processes, the service manager.

Owns the reading of /proc, of the cgroup tree and of namespaces, and psutil.
Must not know of BPF, of containers' engines, or of what splicer wants with any of it.
"""
