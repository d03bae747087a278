# SPDX-License-Identifier: Apache-2.0
"""What can be called of a service: its public async methods, and for each a msgspec type made from its annotations.

And what its handlers raise: any exception, or a ServiceError that carries data.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

import msgspec

_LONGEST_TEXT = 1000


class ServiceError(Exception):
    """For handlers to raise, or derive from: `data` (what msgspec can encode) reaches the client with the message."""

    def __init__(self, message: str, data: object = None) -> None:
        super().__init__(message)
        self.data = data


class UnknownMethodError(ServiceError):
    """The service has no such method."""


class BadArgumentsError(ServiceError):
    """The arguments do not fit the method's annotations."""


class CallCancelledError(ServiceError):
    """The client gave up the call."""


def describe(exc: Exception) -> tuple[str, str, object]:
    """Return what a client is told of an exception: its type's name, its message, its data. Never raises."""
    while isinstance(exc, ExceptionGroup) and len(exc.exceptions) == 1:
        exc = exc.exceptions[0]
    try:
        message = str(exc)
    except Exception:
        message = "an exception without words"
    data = exc.data if isinstance(exc, ServiceError) else None
    return _sendable(type(exc).__name__), _sendable(message), data


def _sendable(text: str) -> str:
    return text[:_LONGEST_TEXT].encode("utf-8", "replace").decode()


class Method:
    """One method of a service. Attributes: `name`, `signature`, `arguments` (a Struct type), `result` (a type)."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        """Raises TypeError for a function that cannot be called remotely."""
        parameters = list(inspect.signature(function).parameters.values())[1:]
        hints = typing.get_type_hints(function, include_extras=True)
        fields: list[Any] = []
        for each in parameters:
            if each.kind not in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY) or each.name not in hints:
                raise TypeError(f"parameter {each.name} of {name} must be a plain one with an annotation")
            fields.append((each.name, hints[each.name], *([] if each.default is each.empty else [each.default])))
        if "return" not in hints:
            raise TypeError(f"{name} must say what it returns")
        self.name, self.result = name, hints["return"]
        self.signature = inspect.Signature(parameters)
        self.arguments = msgspec.defstruct(name, fields, kw_only=True, forbid_unknown_fields=True)


@functools.cache
def methods(service: type[Any]) -> dict[str, Method]:
    """Return what can be called of a service, by name. Raises TypeError for a class that is none."""
    found = inspect.getmembers(service, inspect.iscoroutinefunction)
    return {name: Method(name, function) for name, function in found if not name.startswith("_")}
