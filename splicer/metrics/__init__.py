# SPDX-License-Identifier: Apache-2.0
"""What a monitoring system is told: which metrics there are, their names and sums, and the page.

Owns prometheus-client, the labels, and sums that never go back while parties come and go.
Must not know of BPF, of containers, or of where a number is from.
"""
