# SPDX-License-Identifier: Apache-2.0
"""All checks of `splicer doctor`, in order."""

from __future__ import annotations

from splicer.doctor import host, kernel, others
from splicer.doctor.check import Check


def list_checks() -> tuple[Check, ...]:
    """Those whose failure explains others come first. Who else is here is looked at before anything is tried:
    the kernel frees what was a moment later, and it would be taken for somebody else's."""
    return (*host.list_checks(), *others.list_checks(), *kernel.list_checks())
