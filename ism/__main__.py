# SPDX-License-Identifier: Apache-2.0
"""`python -m ism` is the `ism` command."""

from ism.cli import main

if __name__ == "__main__":
    main()
