# SPDX-License-Identifier: Apache-2.0
"""Splices TCP connections whose two ends are on this host."""

__version__ = "0.2.0"
