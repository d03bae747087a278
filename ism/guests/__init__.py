# SPDX-License-Identifier: Apache-2.0
"""Virtual machines of this project's own making, for its tests, its demo and its measurements.

Stock QEMU and an unmodified Linux kernel, from Debian's packages, with Python, numba, trio and this project in a guest
image; everything is fetched and built by one command (`ism vm setup`) into a cache, needs no root, and changes nothing
of the host. Software emulation where KVM does not work. Booting takes half a minute under emulation, so a guest is
booted once, saved when its Python is warm, and restored from then on.

From the bottom up: `store` (the cache), `packages` (fetch, unpack), `image` (the guest's root and kernel), `payload`
(this project, with its compiled kernels), `machine` (one QEMU process), `guest` (what runs inside it, `inside` is the
guest's end), `snapshot` (boot once, restore), `lab` (a manager and guests that are wired up).
"""
