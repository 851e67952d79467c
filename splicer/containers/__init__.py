# SPDX-License-Identifier: Apache-2.0
"""Who runs here: the containers of this host, as the engine and the kernel tell of them.

Owns the Docker SDK, the events of the engine and the inventory that is made of them.
Must not know of BPF, and of policy no more than that labels are text.
"""
