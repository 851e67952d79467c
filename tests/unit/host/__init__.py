# SPDX-License-Identifier: Apache-2.0
"""What the host is like; mirrors splicer/host."""
