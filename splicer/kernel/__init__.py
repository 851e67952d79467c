# SPDX-License-Identifier: Apache-2.0
"""Everything that touches BPF: compiling, loading, pinning and running the programs of bpf/, and their maps.

Owns libbpf, bcc, BTF and the layout that bpf/types.h shares with Python.
Must not know who runs in a container, which policy is wanted, or when the daemon does what.
"""
