# SPDX-License-Identifier: Apache-2.0
"""Charts as SVG text: the same text for the same values, everything findable by id, text as text."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ism.errors import FeatureMismatchError
from ism.perf.plots import bar_chart, chart_id, line_chart, require, size_text

pytestmark = pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed (extra perf)")

SVG = "{http://www.w3.org/2000/svg}"
SERIES = {
    "smc, trio": [(64.0, 1.0), (1024.0, 3.0), (65536.0, 9.5), (1048576.0, 9.0)],
    "TCP & co <x>": [(64.0, 0.25), (65536.0, 2.0)],
    "nothing": [],
}


def chart(**options: bool) -> str:
    return line_chart(None, "Some title & more", "message size", "GB/s", SERIES, xformat=size_text, **options)


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()).strip() for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("logx", [True, False])
@pytest.mark.parametrize("logy", [True, False])
def test_each_line_is_found_by_its_id_and_has_all_its_points(logx: bool, logy: bool) -> None:
    root = ElementTree.fromstring(chart(logx=logx, logy=logy))
    for name, points in SERIES.items():
        found = root.findall(f".//*[@id='{chart_id('Some title & more', name)}']")
        assert len(found) == bool(points)
        if points:
            path = found[0].find(f"{SVG}path")
            assert path is not None
            assert len(re.findall(r"[ML]", path.attrib["d"])) == len(points)
            assert len(list(found[0].iter(f"{SVG}use"))) == len(points)


def test_labels_ticks_title_and_legend_are_text() -> None:
    found = texts(chart())
    assert {"Some title & more", "message size", "GB/s", "smc, trio", "TCP & co <x>"} <= set(found)
    assert {"64 B", "1 KiB", "64 KiB", "1 MiB"} <= set(found)
    assert "nothing" not in found


def test_a_chart_has_an_accessible_title_and_no_date() -> None:
    svg = chart()
    root = ElementTree.fromstring(svg)
    title = root.find(f"{SVG}title")
    assert title is not None
    assert (root.attrib["role"], root.attrib["aria-label"], title.text) == ("img", *["Some title & more"] * 2)
    assert not re.search(r"\b20\d\d-\d\d-\d\d", svg)


def test_the_same_values_give_the_same_text_whatever_the_user_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib as mpl

    first = chart()
    monkeypatch.setitem(mpl.rcParams, "font.size", 30)
    monkeypatch.setitem(mpl.rcParams, "svg.fonttype", "path")
    assert chart() == first
    assert mpl.rcParams["font.size"] == 30


def test_two_charts_in_one_page_have_no_id_in_common_and_refer_to_their_own() -> None:
    pages = [chart(), bar_chart(None, "Another", "s", "", {"CPU": {"a": 1.0, "b": 2.0}})]
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in pages]
    assert not ids[0] & ids[1]
    for svg, own in zip(pages, ids, strict=True):
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) <= own


def test_each_bar_is_found_by_its_id_and_says_its_value(tmp_path: Path) -> None:
    file = tmp_path / "bars.svg"
    bars = {"64 KiB": {"smc": 0.123, "TCP": 0.5}, "1 MiB": {"smc": 0.25}}
    svg = bar_chart(file, "CPU", "s/GB", "", bars)
    assert file.read_text(encoding="utf-8") == svg
    root = ElementTree.fromstring(svg)
    for name, values in bars.items():
        for bar in values:
            assert root.find(f".//*[@id='{chart_id('CPU', name, bar)}']/{SVG}path") is not None
    assert {"0.123", "0.5", "0.25", "smc", "TCP", "64 KiB", "1 MiB"} <= set(texts(svg))


def test_charts_of_nothing_are_drawn() -> None:
    assert texts(line_chart(None, "Empty", "x", "y", {}))
    assert texts(bar_chart(None, "Empty", "x", "y", {"a": {}}))


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draws in (require, chart):
        with pytest.raises(FeatureMismatchError, match=re.escape("pip install 'virtio-ism[perf]'")):
            draws()
