# SPDX-License-Identifier: Apache-2.0
"""What shall hold: settings, rules, labels and overrides, which of them counts, and why.

Owns the configuration, its syntax, and the rules in the kernel, which it reconciles with what is wanted.
Must not know of single connections, of sweeps, or of the control socket.
"""
