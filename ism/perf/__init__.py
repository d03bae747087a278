# SPDX-License-Identifier: Apache-2.0
"""Measuring: the same workloads over any trio stream, so that two transports are compared on the same work."""
