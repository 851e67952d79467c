# SPDX-License-Identifier: Apache-2.0
"""The loop that makes it hold: `splicer run` from its start to the last drained connection.

Owns what happens when (adoption, drain, watch, stop), the control socket and its answers, the lock.
Must not know of command lines, terminals or tables of text.
"""
