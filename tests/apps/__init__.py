# SPDX-License-Identifier: Apache-2.0
"""Real programs, each run over plain TCP and then with splicer attached: the outcome must be the same."""
