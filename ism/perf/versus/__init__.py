# SPDX-License-Identifier: Apache-2.0
"""`ism perf compare`: these sockets and their peers, measured on one machine in one run.

`catalog` names the peers, one module a family has each of them (`peers_*`, `iperf`), and `talk` and `talk_async` have
the two workloads that all of them run: round trips, and a one-way stream. Two processes (`end`) move the bytes; the
command's own process (`pair`, `rounds`) tells them what to do and stays out of the way. `probe` looks where the
machine has put the two CPUs, `machine` says what machine it is, `goals` judges, `result` is the document, `text` and
`page` show it.
"""
