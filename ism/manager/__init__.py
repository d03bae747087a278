# SPDX-License-Identifier: Apache-2.0
"""The host-side device manager: it owns every region of a host and serves one emulated device to each guest.

`registry` owns regions, tokens, grants and who holds what; `quota` what that may cost; `config` reads the TOML file;
`dma`, `bars`, `doorbells`, `devices` and `host` are the host side of one device on trio; `server` owns the sockets
and `control` answers `ism status`. It is not on the data path: bytes go through the regions' pages.
"""
