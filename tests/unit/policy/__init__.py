# SPDX-License-Identifier: Apache-2.0
"""What shall hold; mirrors splicer/policy."""
