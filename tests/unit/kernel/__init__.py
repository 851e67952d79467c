# SPDX-License-Identifier: Apache-2.0
"""What can be said of BPF without loading any; mirrors splicer/kernel."""
