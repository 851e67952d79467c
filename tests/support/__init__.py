# SPDX-License-Identifier: Apache-2.0
"""What the kernel tests stand on: a host to run splicer on, a network laboratory, and peers that talk TCP."""
