# SPDX-License-Identifier: Apache-2.0
"""Tests that need no privileges and no kernel features."""
