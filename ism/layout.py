# SPDX-License-Identifier: Apache-2.0
"""Field tables: every structure that crosses a boundary is declared once, here is the machinery.

A `Struct` subclass lists its fields with width, offset and meaning; from the table come the explicit-endian codec,
the size assertion (at import) and the offsets. Nothing here knows any particular structure.

    class Header(Struct, size=4, byte_order="<"):
        kind: int = field("B", 0, "message kind, 1..4")
        length: int = field("H", 2, "whole message, bytes")

Gaps between fields are reserved bytes: written as zero, ignored on reading.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from typing import Any, ClassVar, Self, dataclass_transform

Buffer = bytes | bytearray | memoryview


def field(fmt: str, offset: int, meaning: str, *, default: Any = 0) -> Any:
    """Declare one field.

    Args:
        fmt: one `struct` code without byte order: B H I Q b h i q, or "16s" for bytes.
        offset: byte offset from the start of the structure.
        meaning: one line with unit and access, for the docs table.
        default: value when the constructor is not given one.
    """
    if fmt.endswith("s") and default == 0:
        default = bytes(int(fmt[:-1] or 1))
    return dataclasses.field(default=default, metadata={"fmt": fmt, "offset": offset, "meaning": meaning})


@dataclasses.dataclass(frozen=True)
class FieldInfo:
    """One row of a field table: `offset` and `size` in bytes."""

    name: str
    fmt: str
    offset: int
    size: int
    meaning: str


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
class Struct:
    """Base of every declared structure; instances are frozen dataclasses with `pack()` and `unpack()`."""

    SIZE: ClassVar[int]
    ORDER: ClassVar[str]
    FIELDS: ClassVar[tuple[FieldInfo, ...]]
    _by_name: ClassVar[dict[str, FieldInfo]]
    _codec: ClassVar[struct.Struct]
    _names: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, *, size: int, byte_order: str = "<") -> None:
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        rows = [
            FieldInfo(
                f.name,
                f.metadata["fmt"],
                f.metadata["offset"],
                struct.calcsize("=" + f.metadata["fmt"]),
                f.metadata["meaning"],
            )
            for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        ]
        rows.sort(key=lambda row: row.offset)
        codec, end = byte_order, 0
        for row in rows:
            if row.offset < end:
                raise TypeError(f"{cls.__name__}.{row.name} at {row.offset} overlaps the field that ends at {end}")
            codec += f"{row.offset - end}x" + row.fmt
            end = row.offset + row.size
        if end > size:
            raise TypeError(f"{cls.__name__} needs {end} bytes, declared {size}")
        cls._codec = struct.Struct(codec + f"{size - end}x")
        assert cls._codec.size == size
        cls.SIZE, cls.ORDER, cls.FIELDS = size, byte_order, tuple(rows)
        cls._names = tuple(row.name for row in rows)
        cls._by_name = {row.name: row for row in rows}

    def pack(self) -> bytes:
        """Encode to exactly `SIZE` bytes. Raises `struct.error` when a value does not fit its field."""
        return self._codec.pack(*map(self.__dict__.__getitem__, self._names))

    def pack_into(self, buffer: bytearray | memoryview, offset: int = 0) -> None:
        """Encode into `buffer` at `offset`."""
        self._codec.pack_into(buffer, offset, *map(self.__dict__.__getitem__, self._names))

    @classmethod
    def unpack(cls, data: Buffer, offset: int = 0) -> Self:
        """Decode `SIZE` bytes at `offset`. Raises `struct.error` when fewer are there."""
        made = object.__new__(cls)
        # past the frozen constructor, which sets field by field: messages are decoded by the thousand
        made.__dict__.update(zip(cls._names, cls._codec.unpack_from(data, offset), strict=True))
        return made

    @classmethod
    def offset_of(cls, name: str) -> int:
        """Byte offset of the named field. Raises KeyError for an unknown name."""
        return cls.info(name).offset

    @classmethod
    def info(cls, name: str) -> FieldInfo:
        """Table row of the named field. Raises KeyError for an unknown name."""
        try:
            return cls._by_name[name]
        except KeyError:
            raise KeyError(f"{cls.__name__} has no field {name!r}") from None

    @classmethod
    def markdown(cls) -> Iterator[str]:
        """Lines of the docs table of this structure."""
        yield "| offset | size | field | meaning |"
        yield "|---|---|---|---|"
        for row in cls.FIELDS:
            yield f"| {row.offset} | {row.size} | {row.name} | {row.meaning} |"
