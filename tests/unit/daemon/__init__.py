# SPDX-License-Identifier: Apache-2.0
"""The daemon, with everything around it replaced; mirrors splicer/daemon."""
