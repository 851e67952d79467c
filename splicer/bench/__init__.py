# SPDX-License-Identifier: Apache-2.0
"""What splicing changes: plain and spliced by turns, with the noise of plain against plain beside it.

Owns suites and their loads, network namespaces for them, ratios, verdicts in words, tables and pictures.
Must not know of command lines, and measures with a daemon as its users have it, through its control socket.
"""
