# SPDX-License-Identifier: Apache-2.0
"""Who runs here, told by made-up engines; mirrors splicer/containers."""
