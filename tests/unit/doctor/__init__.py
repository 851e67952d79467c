# SPDX-License-Identifier: Apache-2.0
"""The command line, without a daemon or with a made-up one; mirrors splicer/cli."""
