# SPDX-License-Identifier: Apache-2.0
"""vfio-user for Python: a device in one process, its driver or VMM in another, over a UNIX socket.

Usable alone: it knows nothing of virtio or of shared regions. Follows the vfio-user specification, version 0.0, as
stock QEMU speaks it. Importing this package, the client or the client's end of the map channel does not import trio.

    client              blocking client, for any thread
    server              trio server; a device is a `handler.DeviceHandler`
    map_channel         client's end of the map channel; map_channel_server the other, map_channel_wire the packets
    wire, payloads,     sans-io codecs: framing, messages, negotiation
    capabilities
    fds                 descriptors as owned values, and over sockets
"""
