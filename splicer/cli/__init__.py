# SPDX-License-Identifier: Apache-2.0
"""The command line: one module for each noun and verb, `main` puts them together; a new command goes here.

Owns arguments, help, exit codes and what people read. Asks the daemon over the control socket.
Must not keep what anybody else could want to know: whatever is not about text belongs below.
"""
