# SPDX-License-Identifier: Apache-2.0
"""Tests with a real dockerd and the images of this repository."""
