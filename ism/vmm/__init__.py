# SPDX-License-Identifier: Apache-2.0
"""What a virtual machine monitor of this host needs beside its own program: `agent` builds the map agent for QEMU.

Nothing here imports trio or Numba.
"""
