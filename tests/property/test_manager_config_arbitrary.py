# SPDX-License-Identifier: Apache-2.0
"""Whatever a configuration file holds: a configuration comes out, or ConfigError, nothing else."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from ism.errors import ConfigError
from ism.manager.config import ManagerConfig, parse_config

KEYS = (
    *("name", "gid", "chunk_size", "bytes", "domain", "devid", "socket", "socket_mode", "socket_owner", "window"),
    *("vectors", "quota", "addresses", "enabled", "log_level", "max_clients", "map_timeout_s", "regions"),
    *("attachments", "commands_per_s"),
)
scalars = st.one_of(
    st.integers(-5, 5).map(str),
    st.integers(0, 1 << 70).map(str),
    st.sampled_from(["true", "false", "nan", "-inf", "1.5", "1979-05-27", "07:32:00", "[]", "{}", "[[1]]", "[{}]"]),
    st.sampled_from(['"default"', '"64 KiB"', '"4G"', '"0660"', '"a:b"', '"info"', '"a"', '"\\u0000"', '"x.sock"']),
    st.text(st.characters(exclude_characters="'", exclude_categories=["C"]), max_size=8).map(lambda text: f"'{text}'"),
)
keys = st.one_of(st.sampled_from(KEYS), st.text("abc_", min_size=1, max_size=4))
lines = st.one_of(
    st.tuples(keys, scalars).map(" = ".join),
    st.sampled_from(["[manager]", "[defaults]", "[defaults.quota]", "[[domain]]", "[[device]]", "[device.quota]"]),
    st.sampled_from(["[fresh]", "[fresh.quota]", "[a.b]", "[[domain.x]]"]),
)
documents = st.lists(lines, max_size=12).map("\n".join)


def check(data: str | bytes) -> None:
    config: ManagerConfig | ConfigError
    try:
        config = parse_config(data, "f", Path("/r"))
    except ConfigError as error:
        config = error
    if isinstance(config, ConfigError):
        assert config.file == "f"
        assert "\n" not in str(config)
        return
    assert isinstance(config, ManagerConfig)
    chunks = {domain.name: domain.chunk_size for domain in config.domains}
    shapes = [(device.domain, device.shape) for device in config.devices]
    if config.fresh is not None:
        shapes.append((config.fresh.domain, config.fresh.shape))
    for domain, shape in shapes:
        assert shape.window_size % chunks[domain] == 0
        assert 3 <= shape.vectors <= 2048


@given(documents)
def test_lines_of_a_configuration_in_any_order(text: str) -> None:
    check(text)


@given(st.one_of(st.binary(max_size=64), st.text(max_size=64)))
def test_arbitrary_bytes_and_text(data: str | bytes) -> None:
    check(data)
