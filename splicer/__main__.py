# SPDX-License-Identifier: Apache-2.0
"""`python -m splicer`, the same as the `splicer` command."""

import sys

from splicer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
