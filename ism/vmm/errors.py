# SPDX-License-Identifier: Apache-2.0
"""The errors of this package, added to the package's one tree."""

from __future__ import annotations

from ism.errors import IsmError


class AgentBuildError(IsmError):
    """The map agent could not be built: no compiler, a compiler that fails, no safe place for the result."""
