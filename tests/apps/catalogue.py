# SPDX-License-Identifier: Apache-2.0
"""All cases, in the order in which they run."""

from __future__ import annotations

from apps import cpython, databases, iperf3, languages, web
from apps.case import Case

CASES: tuple[Case, ...] = (*cpython.CASES, *web.CASES, *iperf3.CASES, *databases.CASES, *languages.CASES)
