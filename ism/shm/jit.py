# SPDX-License-Identifier: Apache-2.0
"""Numba's decorators and code-generation helpers, typed the way this package uses them.

Numba's own annotations are partial and change from release to release, so the one place that meets them is here.
Nothing in this module generates code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba.core.cgutils
import numba.extending

F = TypeVar("F", bound=Callable[..., Any])

numba_types: Any = numba.types
cgutils: Any = numba.core.cgutils
native_value: Any = numba.extending.NativeValue
attribute: Any = numba.extending.make_attribute_wrapper


def intrinsic(function: Callable[..., Any]) -> Any:
    """Make a function that emits LLVM IR callable from compiled code."""
    return cast("Any", numba.extending.intrinsic)(function)


def helper(function: F) -> F:
    """Mark a function that kernels call: it is compiled into each of them, never on its own."""
    return cast("F", cast("Any", numba.njit)(error_model="numpy")(function))


def kernel(function: Callable[..., Any], *, cache: bool) -> Any:
    """Make a Numba dispatcher of a function that Python calls. Raises RuntimeError when no cache folder is writable."""
    return cast("Any", numba.njit)(cache=cache, error_model="numpy")(function)


def depends_on(dispatcher: Any, stamp: object) -> None:
    """Have what is cached for a dispatcher count only while `stamp` is what it was; by itself Numba looks at one file.

    Numba's own classes have no way to say so. Where they have changed their attributes the cache is as good as theirs.
    """
    file: Any = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if hasattr(file, "_source_stamp"):
        file._source_stamp = (file._source_stamp, stamp)


def unboxes(kind: type) -> Callable[[F], F]:
    """Register how a Python object becomes a native value of type `kind`."""
    return cast("Callable[[F], F]", cast("Any", numba.extending.unbox)(kind))


def boxes(kind: type) -> Callable[[F], F]:
    """Register how a native value of type `kind` becomes a Python object."""
    return cast("Callable[[F], F]", cast("Any", numba.extending.box)(kind))


def has_model(kind: type) -> Callable[[type], type]:
    """Register the native representation of type `kind`."""
    return cast("Callable[[type], type]", cast("Any", numba.extending.register_model)(kind))
