# SPDX-License-Identifier: Apache-2.0
"""Constants and layouts that the driver and the device share; no behaviour."""
