# SPDX-License-Identifier: Apache-2.0
"""Can this host run splicer, and what stands in its way: what must be there before anything is loaded.

Owns the checks of `splicer doctor`, in order, and the prerequisites that other commands ask for as well.
Must not know of command lines or terminals, and tries nothing in another way than `splicer run` does.
"""
