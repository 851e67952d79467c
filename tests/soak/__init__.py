# SPDX-License-Identifier: Apache-2.0
"""The chaos soak: see README.md beside this file."""
