# SPDX-License-Identifier: Apache-2.0
"""Reading one TOML table strictly: every key by type, every error with file and dotted key, no key left over.

It knows nothing of what the keys mean; `config` does. A table is consumed key by key and then closed, which is when
unknown keys are found.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from ism.errors import ConfigError

_SIZE = re.compile(r"([0-9]{1,20})\s*(?:([KMGT])(?:iB)?)?", re.IGNORECASE)
_SHIFT = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
MAX_SIZE = 1 << 46
_MISSING: Any = object()


def brief(value: object) -> str:
    """Show a value of a configuration in an error message, shortened; never raises."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 80:
        return "an integer far out of range"
    text = repr(value) if isinstance(value, str | int | float | bool) else f"a {kind_of(value)}"
    return text if len(text) <= 60 else text[:57] + "..."


def kind_of(value: object) -> str:
    """Name a value's TOML type."""
    kinds = {bool: "boolean", int: "integer", float: "float", str: "string", list: "array", dict: "table"}
    return kinds.get(type(value), type(value).__name__)


class TableReader:
    """One TOML table being consumed.

    Attributes: `file` (path for errors), `where` (dotted path of the table, "" for the document).
    """

    def __init__(self, file: str, where: str, table: dict[str, Any]) -> None:
        self.file, self.where = file, where
        self._table = table
        self._known: list[str] = []

    def fail(self, key: str, problem: str) -> NoReturn:
        """Raise ConfigError for a key of this table ("" = the table itself)."""
        raise ConfigError(self.file, self._dotted(key), problem)

    def has(self, key: str) -> bool:
        """Tell whether the file gives the key."""
        return key in self._table

    def string(self, key: str, default: str = _MISSING, *, choices: Sequence[str] = ()) -> str:
        """Consume a string, one of `choices` when given. Raises ConfigError."""
        value = self._take(key, default)
        if not isinstance(value, str):
            self._mistyped(key, "a string", value)
        if choices and key in self._table and value not in choices:
            close = difflib.get_close_matches(value.lower(), choices, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            self.fail(key, f"{brief(value)} is none of {', '.join(choices)}{hint}")
        return value

    def integer(self, key: str, default: int = _MISSING, *, low: int, high: int) -> int:
        """Consume an integer from `low` to `high`; the default may be outside. Raises ConfigError."""
        value = self._take(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            self._mistyped(key, "an integer", value)
        if key in self._table and not low <= value <= high:
            self.fail(key, f"expected an integer from {low} to {high}, not {brief(value)}")
        return value

    def number(self, key: str, default: float, *, low: float, high: float) -> float:
        """Consume an integer or a float from `low` to `high`. Raises ConfigError."""
        value = self._take(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            self._mistyped(key, "a number", value)
        if not low <= value <= high:
            self.fail(key, f"expected a number from {low:g} to {high:g}, not {brief(value)}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """Consume a boolean. Raises ConfigError."""
        value = self._take(key, default)
        if not isinstance(value, bool):
            self._mistyped(key, "true or false", value)
        return value

    def size(self, key: str, default: int, *, low: int = 0, high: int = MAX_SIZE, power_of_two: bool = False) -> int:
        """Consume a number of bytes: an integer, or a string such as "64 KiB" or "4G". Raises ConfigError."""
        value = self._take(key, default)
        if isinstance(value, str):
            match = _SIZE.fullmatch(value.strip())
            if match is None:
                self.fail(
                    key,
                    f'expected bytes, or a string such as "64 KiB", "512M" or "4G" (of 1024), not {brief(value)}',
                )
            value = int(match[1]) << _SHIFT[(match[2] or "").upper()]
        if not isinstance(value, int) or isinstance(value, bool):
            self._mistyped(key, 'bytes, or a string such as "64 KiB"', value)
        if not low <= value <= high:
            self.fail(key, f"expected {low} to {high} bytes, not {brief(value)}")
        if power_of_two and value & (value - 1):
            self.fail(key, f"{value} is not a power of two")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        """Consume an array of strings, empty when the key is missing. Raises ConfigError."""
        value = self._take(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self._mistyped(key, "an array of strings", value)
        return tuple(value)

    def table(self, key: str) -> TableReader:
        """Consume a table, empty when the key is missing. Raises ConfigError."""
        value = self._take(key, {})
        if not isinstance(value, dict):
            self._mistyped(key, f"a table [{self._dotted(key)}]", value)
        return TableReader(self.file, self._dotted(key), value)

    def tables(self, key: str) -> list[TableReader]:
        """Consume an array of tables, empty when the key is missing. Raises ConfigError."""
        value = self._take(key, [])
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            self._mistyped(key, f"an array of tables [[{self._dotted(key)}]]", value)
        return [TableReader(self.file, f"{self._dotted(key)}[{at}]", item) for at, item in enumerate(value)]

    def close(self) -> None:
        """End reading. Raises ConfigError for the first key that nobody asked for."""
        for key in self._table:
            if key not in self._known:
                close = difflib.get_close_matches(key[:80], self._known, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(sorted(self._known))}"
                self.fail(key, f"unknown key; {hint}")

    def _take(self, key: str, default: Any) -> Any:
        self._known.append(key)
        value = self._table.get(key, default)
        if value is _MISSING:
            self.fail(key, "is required")
        return value

    def _dotted(self, key: str) -> str:
        shown = key if re.fullmatch(r"[A-Za-z0-9_-]{1,60}", key) or not key else brief(key)
        return ".".join(part for part in (self.where, shown) if part)

    def _mistyped(self, key: str, expected: str, value: object) -> NoReturn:
        self.fail(key, f"expected {expected}, not the {kind_of(value)} {brief(value)}")
