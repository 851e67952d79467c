# SPDX-License-Identifier: Apache-2.0
"""Tests on the running kernel: real sockets in network namespaces, in a cgroup of their own."""
