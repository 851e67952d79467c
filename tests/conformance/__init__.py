# SPDX-License-Identifier: Apache-2.0
"""Conformance: what an application can observe of a spliced connection equals plain TCP, call by call."""
