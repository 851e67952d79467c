# SPDX-License-Identifier: Apache-2.0
"""The kernel matrix: Debian's kernels under QEMU, and a part of the tests in each. See README.md.

`kernels` says what is tried and expected, `packages` gets Debian's packages, `guest` makes the disk and
boots, `inside` is what the guest runs, `report` judges and tabulates. once/
is what a guest has before bcc.
"""
