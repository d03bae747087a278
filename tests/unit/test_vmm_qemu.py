# SPDX-License-Identifier: Apache-2.0
"""QEMU's options: for a shell, as JSON, for libvirt; and `ism qemu-args`, which prints them."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from ism.cli import cli
from ism.errors import ConfigError, IsmError, TransportError
from ism.manager.config import parse_config
from ism.vmm import agent
from ism.vmm.qemu import (
    LIBVIRT_NAMESPACE,
    MIB,
    QemuArguments,
    VfioUserDevice,
    as_json_values,
    escaped,
    libvirt_domain,
    qemu_arguments,
)

GIB = 1 << 30
AGENT = Path("/var/lib/ism/agent-0.so")
VM1 = VfioUserDevice(Path("/run/ism/vm1.sock"), "ism-vm1")
UGLY = """/run/a b/it's,"<&>$HOME\\.sock"""
QEMU = f"{{{LIBVIRT_NAMESPACE}}}"


def pairs(what: QemuArguments) -> list[tuple[str, str]]:
    return list(zip(what.arguments[::2], what.arguments[1::2], strict=True))


def as_the_shell_sees_it(command: str, tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    """The arguments and the environment of the program that a shell starts."""
    program = tmp_path / "print"
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))\n"
    )
    program.chmod(0o755)
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    arguments, environment = json.loads(done.stdout)
    return arguments, environment


# the options


def test_a_machine_has_shared_memory_of_its_size_and_a_client_of_the_socket() -> None:
    what = qemu_arguments([VM1], memory=2 * GIB, agent=AGENT)
    machine, memory, backend, device = pairs(what)
    assert machine == ("-machine", "q35,memory-backend=ism-ram")
    assert memory == ("-m", "2048M")
    assert backend == ("-object", "memory-backend-memfd,id=ism-ram,size=2048M,share=on")
    assert device[0] == "-device"
    assert json.loads(device[1]) == {
        "driver": "vfio-user-pci",
        "id": "ism-vm1",
        "socket": {"type": "unix", "path": "/run/ism/vm1.sock"},
    }
    assert what.environment == {"LD_PRELOAD": str(AGENT)}


def test_without_the_agent_only_the_environment_differs() -> None:
    with_agent, without = (qemu_arguments([VM1], memory=GIB, agent=library) for library in (AGENT, None))
    assert without.arguments == with_agent.arguments
    assert without.environment == {}


def test_the_iommu_comes_before_every_other_device() -> None:
    what = qemu_arguments([VM1], memory=GIB, agent=None, iommu=True)
    devices = [value for option, value in pairs(what) if option == "-device"]
    assert devices[0] == "intel-iommu,intremap=on,caching-mode=on"
    assert json.loads(devices[1])["driver"] == "vfio-user-pci"
    assert ("-machine", "kernel-irqchip=split") in pairs(what)


def test_a_device_is_on_the_bus_that_is_named() -> None:
    device = VfioUserDevice(Path("/s"), "one", "rp0")
    assert json.loads(device.json())["bus"] == "rp0"


def test_commas_in_values_are_written_twice() -> None:
    assert escaped("a,b,,c") == "a,,b,,,,c"
    what = qemu_arguments([VM1], memory=GIB, agent=None, machine="a,b")
    assert what.arguments[1] == "a,,b,memory-backend=ism-ram"


@pytest.mark.parametrize("memory", [0, -MIB, MIB - 1, MIB + 1])
def test_memory_is_a_number_of_mib(memory: int) -> None:
    with pytest.raises(ValueError, match="MiB"):
        qemu_arguments([VM1], memory=memory, agent=None)


@pytest.mark.parametrize(
    ("path", "ident", "bus"),
    [
        ("relative", "a", ""),
        ("/" + "x" * 107, "a", ""),
        ("/\udcff", "a", ""),
        ("/s", "", ""),
        ("/s", "1a", ""),
        ("/s", "a b", ""),
        ("/s", "a", "b/c"),
    ],
)
def test_what_qemu_would_refuse_is_refused(path: str, ident: str, bus: str) -> None:
    with pytest.raises(ValueError, match=r"path|UTF-8|name"):
        VfioUserDevice(Path(path), ident, bus)


# their forms


def test_a_shell_gives_qemu_exactly_the_arguments_and_the_environment(tmp_path: Path) -> None:
    what = QemuArguments(("-device", VfioUserDevice(Path(UGLY), "x").json(), "-S"), {"ISM_SHOWN": "a 'b' $c"})
    command = what.shell(str(tmp_path / "print"))
    assert not command.endswith(("\n", "\\"))
    arguments, environment = as_the_shell_sees_it(f"{command} -M q35 -nodefaults", tmp_path)
    assert arguments == [*what.arguments, "-M", "q35", "-nodefaults"]
    assert json.loads(arguments[1])["socket"]["path"] == UGLY
    assert environment["ISM_SHOWN"] == "a 'b' $c"


def test_a_shell_command_has_an_option_a_line() -> None:
    lines = qemu_arguments([VM1], memory=GIB, agent=AGENT).shell().split(" \\\n")
    assert lines[0] == f"LD_PRELOAD={AGENT}"
    assert lines[1] == "qemu-system-x86_64"
    assert all(line.startswith("  -") for line in lines[2:])
    assert len(lines) == 2 + 4


def test_values_for_programs_are_what_the_shell_gets() -> None:
    what = qemu_arguments([VM1], memory=GIB, agent=AGENT)
    values = json.loads(json.dumps(as_json_values(what, "/opt/qemu")))
    assert values == {
        "program": "/opt/qemu",
        "environment": {"LD_PRELOAD": str(AGENT)},
        "arguments": list(what.arguments),
    }


def test_a_libvirt_domain_holds_any_path() -> None:
    text = libvirt_domain([VM1, VfioUserDevice(Path(UGLY), "x")], agent=AGENT)
    domain = ElementTree.fromstring(text)
    assert domain.tag == "domain"
    source, access = domain.find("memoryBacking/source"), domain.find("memoryBacking/access")
    assert source is not None
    assert access is not None
    assert (source.get("type"), access.get("mode")) == ("memfd", "shared")
    words = [element.get("value") or "" for element in domain.iterfind(f"{QEMU}commandline/{QEMU}arg")]
    assert words[::2] == ["-device", "-device"]
    assert [json.loads(word)["socket"]["path"] for word in words[1::2]] == [str(VM1.socket), UGLY]
    variable = domain.find(f"{QEMU}commandline/{QEMU}env")
    assert variable is not None
    assert (variable.get("name"), variable.get("value")) == ("LD_PRELOAD", str(AGENT))
    assert domain.find("devices") is None


def test_a_libvirt_domain_without_the_agent_and_with_an_iommu() -> None:
    domain = ElementTree.fromstring(libvirt_domain([VM1], agent=None, iommu=True))
    assert domain.find(f"{QEMU}commandline/{QEMU}env") is None
    chip, driver = domain.find("features/ioapic"), domain.find("devices/iommu/driver")
    assert chip is not None
    assert driver is not None
    assert chip.get("driver") == "qemu"
    assert driver.attrib == {"intremap": "on", "caching_mode": "on"}


def test_a_path_that_xml_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="XML"):
        libvirt_domain([VM1], agent=Path("/a\x01.so"))


# ism qemu-args

CONFIG = """
[[device]]
name = "vm1"
[[device]]
name = "vm2"
socket = "SOCKET"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "ism.toml"
    file.write_text(CONFIG.replace("SOCKET", "/run/two,2.sock"))
    return file


@pytest.fixture
def no_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ISM_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


def qemu_args(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["qemu-args", *map(str, arguments)])


def words_of(done: Result) -> list[str]:
    assert done.exit_code == 0, done.exception
    return shlex.split(done.output.replace("\\\n", ""))


def refusal(*arguments: str | Path) -> IsmError:
    error = qemu_args(*arguments).exception
    assert isinstance(error, IsmError)
    assert "\n" not in str(error)
    return error


def test_the_socket_is_where_the_configuration_puts_it(config: Path, no_manager: Path) -> None:
    for name, path in (("vm1", str(no_manager / "vm1.sock")), ("vm2", "/run/two,2.sock")):
        done = qemu_args(name, "--config", config, "--no-agent", "--memory", "1 GiB")
        words = words_of(done)
        assert words[0] == "qemu-system-x86_64"
        assert words[words.index("-m") + 1] == "1024M"
        device = json.loads(words[words.index("-device") + 1])
        assert device["socket"]["path"] == path
        assert device["id"] == f"ism-{name}"


def test_several_devices_are_one_machines(config: Path, no_manager: Path) -> None:
    values = json.loads(qemu_args("vm1", "vm2", "vm1", "--config", config, "--no-agent", "--json").output)
    devices = [json.loads(word)["id"] for word in values["arguments"] if word.startswith("{")]
    assert devices == ["ism-vm1", "ism-vm2"]
    assert qemu_args("vm1", "vm2", "--config", config, "--no-agent", "--id", "x").exit_code == 2


def test_id_bus_machine_and_program_can_be_chosen(config: Path, no_manager: Path) -> None:
    chosen = ["--id", "nic", "--bus", "rp1", "--machine", "virt", "--qemu", "/opt/my qemu"]
    words = words_of(qemu_args("vm1", "--config", config, "--no-agent", *chosen))
    assert words[0] == "/opt/my qemu"
    assert words[2] == "virt,memory-backend=ism-ram"
    device = json.loads(words[-1])
    assert (device["id"], device["bus"]) == ("nic", "rp1")


def test_the_agent_is_built_where_it_is_wanted_and_preloaded(
    config: Path, no_manager: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path | None] = []

    def library(cache_dir: Path | None = None) -> Path:
        asked.append(cache_dir)
        return AGENT

    monkeypatch.setattr(agent, "agent_library", library)
    first = qemu_args("vm1", "--config", config).output.splitlines()[0]
    assert first == f"LD_PRELOAD={AGENT} \\"
    qemu_args("vm1", "--config", config, "--agent-dir", tmp_path)
    assert asked == [None, tmp_path]
    assert "LD_PRELOAD" not in qemu_args("vm1", "--config", config, "--no-agent").output
    assert len(asked) == 2


def test_libvirt_gets_a_domain_and_a_word_about_a_folder_it_cannot_enter(
    config: Path, no_manager: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(agent, "agent_library", lambda _=None: folder / "agent.so")
    done = qemu_args("vm1", "--config", config, "--libvirt")
    assert done.exit_code == 0
    assert ElementTree.fromstring(done.stdout).find(f"{QEMU}commandline/{QEMU}env") is not None
    assert done.stderr.startswith(f"ism: {folder} is closed to other users")
    assert qemu_args("vm1", "--config", config, "--libvirt", "--json").exit_code == 2


def test_an_unknown_device_is_refused_with_the_names_of_those_there_are(config: Path, no_manager: Path) -> None:
    error = refusal("vm3", "--config", config)
    assert isinstance(error, ConfigError)
    assert str(error) == f"{config}: device: there is no device 'vm3'; there are: vm1, vm2"
    config.write_text("")
    assert "add a [[device]]" in str(refusal("vm3", "--config", config))


@pytest.mark.parametrize("memory", ["512", "0", "1.5G", "lots", "1025K"])
def test_a_size_of_memory_that_is_none_is_refused(config: Path, no_manager: Path, memory: str) -> None:
    error = refusal("vm1", "--config", config, "--memory", memory)
    assert str(error).startswith("command line: --memory: ")


def test_a_name_that_qemu_does_not_take_is_refused(config: Path, no_manager: Path) -> None:
    assert "no name in QEMU" in str(refusal("vm1", "--config", config, "--no-agent", "--id", "a b"))


def test_without_a_manager_and_a_configuration_it_says_what_to_do(no_manager: Path) -> None:
    error = refusal("vm1")
    assert isinstance(error, TransportError)
    assert "run `ism manager`, or name its configuration (--config)" in str(error)


@pytest.fixture
def running(tmp_path: Path, no_manager: Path) -> Iterator[Path]:
    """A manager with the configuration that is the value."""
    file = tmp_path / "ism.toml"
    file.write_text(CONFIG.replace("SOCKET", str(tmp_path / "two.sock")))
    command = [sys.executable, "-m", "ism", "manager", "--config", str(file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "a fresh device" in line:
                break
        yield file
        process.terminate()
        process.stderr.read()


def test_the_manager_that_runs_is_asked_when_no_configuration_is_named(running: Path, tmp_path: Path) -> None:
    words = words_of(qemu_args("vm2", "--no-agent"))
    assert json.loads(words[-1])["socket"]["path"] == str(tmp_path / "two.sock")
    assert "there are: vm1, vm2" in str(refusal("vm3"))
    running.write_text(running.read_text() + '[[device]]\nname = "vm3"\n')
    assert "has not read it: restart it" in str(refusal("vm3"))


# docs/vm.md

PAGE = (Path(__file__).parents[2] / "docs" / "vm.md").read_text()


def block_of(first: str) -> str:
    """The indented block of the page that starts with these characters."""
    start = PAGE.index(f"\n    {first}") + 1
    lines = itertools.takewhile(lambda line: not line or line.startswith("    "), PAGE[start:].split("\n"))
    return textwrap.dedent("\n".join(lines)).strip()


def test_the_page_shows_what_the_command_prints() -> None:
    library = Path("/home/me/.cache/ism/agent-0123456789abcdef.so")
    assert block_of("LD_PRELOAD=") == qemu_arguments([VM1], memory=4 * GIB, agent=library, iommu=True).shell()


def test_the_page_has_a_configuration_with_two_machines(tmp_path: Path) -> None:
    settings = parse_config(block_of("[fresh]"), "docs/vm.md", tmp_path)
    assert [device.name for device in settings.devices] == ["vm1", "vm2"]
    assert all(device.addresses and device.socket.user for device in settings.devices)
