# SPDX-License-Identifier: Apache-2.0
"""`ism vm` without a guest: its options, and what its user is told when guests cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ism.cli import vm
from ism.guests.measure import Comparison, Sample, Transfer


def ism(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ism", "vm", *arguments],
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.parametrize("command", [[], ["setup"], ["demo"], ["bench"]])
def test_every_command_has_help(command: list[str]) -> None:
    done = ism(*command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(" ".join(["Usage: ism vm", *command]))


@pytest.mark.parametrize("command", ["setup", "demo", "bench"])
def test_a_cache_that_cannot_be_made_is_one_line(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = ism(command, ISM_VM_CACHE=str(tmp_path / "file" / "cache"))
    assert (done.stdout, done.returncode) == ("", 1)
    assert done.stderr.startswith("ism: cache: ")
    assert "ISM_VM_CACHE" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("text", "size"), [("64M", 64 << 20), ("8m", 8 << 20), ("512K", 512 << 10), ("5", 5)])
def test_sizes(text: str, size: int) -> None:
    assert vm._size(vm.demo.make_context("demo", []), vm.demo.params[0], text) == size


@pytest.mark.parametrize("text", ["", "M", "0", "-1M", "1.5M", "129M", "2G", "64MB", "²M"])
def test_a_strange_size_is_an_error_of_usage(text: str) -> None:
    done = CliRunner().invoke(vm.vm, ["demo", "--size", text])
    assert done.exit_code == 2
    assert "is not a size up to 128M" in done.output


def test_what_is_in_a_folder_is_counted_by_what_it_takes_on_the_disk(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 30)
        file.write(b"x" * 4096)
    os.link(tmp_path / "sparse", tmp_path / "linked")
    (tmp_path / "gone").symlink_to("nowhere")
    assert 4096 <= vm._used(tmp_path) < 1 << 20
    assert 4096 <= vm._used(tmp_path / "sparse") < 1 << 20


def test_ratios_are_taken_round_by_round_and_awake_against_the_better_of_tcps() -> None:
    smc = [Sample("smc", "SMC", 0.5, 0.1, 900.0), Sample("smc", "SMC", 0.5, 0.2, 400.0)]
    tcp = [Sample("tcp", "TCP", 0.4, 0.5, 100.0), Sample("tcp", "TCP", 0.6, 0.4, 100.0)]
    result = Comparison(smc, tcp)
    assert result.ratios() == pytest.approx({"awake": 3.0, "blocking": 1.0, "stream": 6.5})
    assert result.median("tcp", "best_s") == pytest.approx(0.4)


def test_a_comparison_without_streams_has_no_ratio_of_them() -> None:
    result = Comparison([Sample("smc", "SMC", 1.0, 1.0, 0.0)], [Sample("tcp", "TCP", 1.0, 1.0, 0.0)])
    assert set(result.ratios()) == {"awake", "blocking"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "TCP", "reason": "no device"}, "it should be SMC"),
        ({"sender_mode": "TCP"}, "it should be SMC"),
        ({"sha256": "other"}, "SHA-256 differs over shared memory: sent good, received other"),
    ],
)
def test_a_transfer_that_went_wrong_ends_the_demo(
    changes: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"mode": "SMC", "reason": "", "sender_mode": "SMC", "sha256": "good"} | changes
    monkeypatch.setattr("ism.guests.measure.transfer", lambda *_, **__: Transfer(size=8, seconds=1.0, **found))

    def body() -> None:
        vm._transfer(vm._console(), None, None, 8, "good", "shared memory", {})  # type: ignore[arg-type]

    with pytest.raises(Exception, match=words) as caught:
        body()
    assert caught.type.__name__ == "ClickException"


def test_without_a_checkout_the_demo_says_that_it_leaves_the_example_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ism.guests.measure.has_file", lambda *_: False)
    vm._rpc(vm._console(), None, None, "10.77.0.1")  # type: ignore[arg-type]
    assert capsys.readouterr().out == "RPC: left out, the examples are not here; a checkout of the project has them\n"
