# SPDX-License-Identifier: Apache-2.0
"""Measuring.

`ism perf`, a server and a client on two ends of anything: `parameters` (what is measured), `protocol` (what the two say
to each other; both sans-io), `control` (the connection on which they say it), `flows` (what the threads that move bytes
and the one that reports share), `on_blocking`, `on_trio`, `on_asyncio`, `on_view` (the bytes, by one surface each),
`histogram`, `report`, `server`, `client`.

The comparison of two transports in one run, for the demo and the benchmarks: `workloads`, `compare`, and its `far` end.

`ism perf compare`, of these sockets with their peers: the package `versus`. `plots` draws charts.
"""
