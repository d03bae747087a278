# SPDX-License-Identifier: Apache-2.0
"""The device side, sans-io: one emulated virtio-ism PCI function, and what it shares with the registry behind it.

`contract` says what passes between the function, the registry and the host; `function` is the PCI function; `window`
gives out chunks of a device's regions window.
"""
