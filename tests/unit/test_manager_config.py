# SPDX-License-Identifier: Apache-2.0
"""The configuration file: what it gives, and how it says what is wrong."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from ism.errors import ConfigError
from ism.manager.config import ManagerConfig, default_config, load_config, parse_config
from ism.manager.quota import Quota

RUN = Path("/run/ism")

FULL = """
[manager]
log_level = "debug"
max_clients = 12
map_timeout_s = 2

[defaults]
window = "1G"
[defaults.quota]
regions = 7

[[domain]]
name = "blue"
gid = 0xB10E
chunk_size = "128 KiB"
bytes = "2 GiB"

[[domain]]
name = "red"

[fresh]
domain = "red"
socket = "any.sock"

[[device]]
name = "vm1"
domain = "blue"
devid = 5
socket = "/srv/vm1.sock"
socket_mode = "0660"
socket_owner = "qemu:kvm"
window = 268435456
vectors = 64
addresses = ["10.0.0.7", "fd00::/64"]
[device.quota]
bytes = "256 mib"
commands_per_s = 1000

[[device]]
name = "vm2"
domain = "red"
"""


def parse(text: str | bytes) -> ManagerConfig:
    return parse_config(text, "ism.toml", RUN)


def test_without_a_configuration_there_is_one_domain_and_a_socket_for_fresh_devices() -> None:
    config = default_config(RUN)
    assert [domain.name for domain in config.domains] == ["default"]
    assert config.domains[0].chunk_size == 64 * 1024
    assert config.devices == ()
    assert config.fresh is not None
    assert config.fresh.socket.path == RUN / "device.sock"
    assert config.fresh.socket.mode == 0o600
    assert config.fresh.shape.window_size == 8 << 30
    assert config.fresh.shape.vectors == 2048
    assert config.fresh.shape.quota == Quota(bytes=4 << 30, regions=4096, attachments=8192)


def test_a_full_configuration_arrives_whole() -> None:
    config = parse(FULL)
    assert (config.log_level, config.max_clients, config.map_timeout_s) == ("debug", 12, 2.0)
    blue, red = config.domains
    assert (blue.name, blue.gid, blue.chunk_size, blue.bytes_limit) == ("blue", 0xB10E, 128 * 1024, 2 << 30)
    assert (red.name, red.gid, red.chunk_size) == ("red", 0, 64 * 1024)
    vm1, vm2 = config.devices
    assert (vm1.name, vm1.domain, vm1.devid) == ("vm1", "blue", 5)
    assert (vm1.socket.path, vm1.socket.mode) == (Path("/srv/vm1.sock"), 0o660)
    assert (vm1.socket.user, vm1.socket.group) == ("qemu", "kvm")
    assert (vm1.shape.window_size, vm1.shape.vectors) == (256 << 20, 64)
    assert vm1.shape.quota == Quota(bytes=256 << 20, regions=7, attachments=8192, commands_per_s=1000)
    assert vm1.addresses == (ipaddress.ip_network("10.0.0.7/32"), ipaddress.ip_network("fd00::/64"))
    assert vm2.socket.path == RUN / "vm2.sock"
    assert vm2.shape.window_size == 1 << 30
    assert config.fresh is not None
    assert (config.fresh.domain, config.fresh.socket.path) == ("red", RUN / "any.sock")


def test_fresh_devices_can_be_switched_off() -> None:
    assert parse("[fresh]\nenabled = false").fresh is None


@pytest.mark.parametrize(
    ("text", "key", "problem"),
    [
        ("x = ", "", "is not TOML"),
        (b"\xff\xfe", "", "is not UTF-8"),
        ("a = " + "[" * 5000, "", "is not TOML"),
        ("a = " + "9" * 5000, "", "is not TOML"),
        ("[manger]", "manger", "did you mean 'manager'"),
        ("[[device]]\nname='a'\nwindw=1", "device[0].windw", "did you mean 'window'"),
        ("[defaults.quota]\nspeed=1", "defaults.quota.speed", "expected one of attachments, bytes"),
        ("[defaults]\nchunk_size=4096", "defaults.chunk_size", "unknown key"),
        ("manager = 1", "manager", "expected a table [manager], not the integer 1"),
        ("[domain]\nname='a'", "domain", "expected an array of tables [[domain]]"),
        ("domain = [1]", "domain", "expected an array of tables"),
        ("[[device]]", "device[0].name", "is required"),
        ("[[device]]\nname=''", "device[0].name", "1 to 64 letters"),
        ("[[device]]\nname='../x'", "device[0].name", "1 to 64 letters"),
        ("[[device]]\nname='a'\nwindow='3G'", "device[0].window", "not a power of two"),
        ("[[device]]\nname='a'\nwindow=4096", "device[0].window", "chunks of domain 'default'"),
        ("[[device]]\nname='a'\nwindow='1 KB'", "device[0].window", '"64 KiB"'),
        ("[[device]]\nname='a'\nwindow=true", "device[0].window", "not the boolean True"),
        ("[[device]]\nname='a'\nwindow='99999999T'", "device[0].window", "expected 4096 to"),
        ("[[device]]\nname='a'\nvectors=2", "device[0].vectors", "from 3 to 2048, not 2"),
        ("[[device]]\nname='a'\nvectors=2049", "device[0].vectors", "from 3 to 2048"),
        ("[[device]]\nname='a'\ndevid=0", "device[0].devid", "expected an integer from 1"),
        ("[[device]]\nname='a'\nquota=1", "device[0].quota", "expected a table"),
        ("[[device]]\nname='a'\ndomain='b'", "device[0].domain", "there is no domain 'b'; there are: default"),
        ("[[device]]\nname='a'\nsocket=''", "device[0].socket", "expected a path"),
        ("[[device]]\nname='a'\nsocket='" + "x" * 108 + "'", "device[0].socket", "at most 103"),
        ("[[device]]\nname='a'\nsocket=\"a\\u0000b\"", "device[0].socket", "expected a path"),
        ("[[device]]\nname='a'\nsocket_mode=0o660", "device[0].socket_mode", "expected a string"),
        ("[[device]]\nname='a'\nsocket_mode='999'", "device[0].socket_mode", '"0660"'),
        ("[[device]]\nname='a'\nsocket_owner='a:b:c'", "device[0].socket_owner", '"user:group"'),
        ("[[device]]\nname='a'\naddresses=['10.0.0.300']", "device[0].addresses", "expected addresses"),
        ("[[device]]\nname='a'\naddresses=[1]", "device[0].addresses", "an array of strings"),
        ("[[device]]\nname='a'\naddresses=['127.0.0.1']", "device[0].addresses", "every network namespace"),
        ("[[device]]\nname='a'\naddresses=['fe80::/64']", "device[0].addresses", "every network namespace"),
        (
            "[[device]]\nname='a'\naddresses=['10.0.0.1', '10.0.0.0/8']\n"
            "[[device]]\nname='b'\naddresses=['10.1.0.0/16', '::ffff:10.0.0.1']",
            "device[1].addresses",
            "::ffff:a00:1/128 is in device[0].addresses too",
        ),
        ("[[device]]\nname='a'\n[[device]]\nname='a'", "device[1].name", "the same as device[0].name"),
        (
            "[[device]]\nname='a'\ndevid=1\n[[device]]\nname='b'\ndevid=1",
            "device[1].devid",
            "the same as device[0].devid",
        ),
        (
            "[[device]]\nname='a'\n[[device]]\nname='b'\nsocket='./x/../a.sock'",
            "device[1].socket",
            "also device[0].socket",
        ),
        ("[[device]]\nname='device'", "fresh.socket", "is also device[0].socket"),
        ("[[device]]\nname='control'", "device[0].socket", "the control socket"),
        ("[[domain]]\nname='a'\ngid=0", "domain[0].gid", "expected an integer from 1"),
        ("[[domain]]\nname='a'\ngid=1\n[[domain]]\nname='b'\ngid=1", "domain[1].gid", "the same as domain[0].gid"),
        ("[[domain]]\nname='a'\n[[domain]]\nname='a'", "domain[1].name", "the same as domain[0].name"),
        ("[[domain]]\nname='a'\nchunk_size=2048", "domain[0].chunk_size", "expected 4096 to"),
        ("[[domain]]\nname='a'\nchunk_size=12288", "domain[0].chunk_size", "not a power of two"),
        ("[[domain]]\nname='a'\n[[domain]]\nname='b'", "fresh.domain", "several domains are configured"),
        ("[manager]\nlog_level='INFO'", "manager.log_level", "did you mean 'info'"),
        ("[manager]\nmax_clients=1.5", "manager.max_clients", "expected an integer, not the float 1.5"),
        ("[manager]\nmap_timeout_s=nan", "manager.map_timeout_s", "expected a number"),
        ("[fresh]\nenabled='no'", "fresh.enabled", "true or false"),
        ('"a.b" = 1', "'a.b'", "unknown key"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_key(text: str | bytes, key: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert caught.value.file == "ism.toml"
    assert caught.value.key == key
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        load_config(missing, tmp_path)
    missing.write_text("[fresh]\nenabled = false\n")
    assert load_config(missing, tmp_path).fresh is None


def test_nobody_needs_to_say_in_which_domain_no_fresh_devices_are() -> None:
    domains = "[[domain]]\nname='a'\n[[domain]]\nname='b'\n"
    assert parse(domains + "[fresh]\nenabled=false").fresh is None
    with pytest.raises(ConfigError, match=r"fresh\.enabled = false"):
        parse(domains)
    with pytest.raises(ConfigError, match="there is no domain 'c'"):
        parse(domains + "[fresh]\nenabled=false\ndomain='c'")


def test_two_domains_may_have_the_same_addresses_and_one_device_the_same_twice() -> None:
    config = parse(
        "[[domain]]\nname='a'\n[[domain]]\nname='b'\n[fresh]\nenabled=false\n"
        "[[device]]\nname='x'\ndomain='a'\naddresses=['10.0.0.1', '::ffff:10.0.0.1']\n"
        "[[device]]\nname='y'\ndomain='b'\naddresses=['10.0.0.1']"
    )
    assert [len(device.addresses) for device in config.devices] == [2, 1]
