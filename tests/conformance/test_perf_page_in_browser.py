# SPDX-License-Identifier: Apache-2.0
"""The page of `ism perf compare`, made from a stored run, as Chromium draws it.

A frame around the page looks into it and writes what it found into its own document, which Chromium prints.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ism.perf import plots
from ism.perf.versus import text
from ism.perf.versus.page import CPU, LATENCY, THROUGHPUT, cpu_bars, page
from ism.perf.versus.result import over_size

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed (extra perf)"),
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian package chromium)"),
]

STORED: dict[str, Any] = json.loads((Path(__file__).parent / "perf_compare.json").read_text(encoding="utf-8"))
WIDTH, HEIGHT = 1100, 2600
LIMIT_S = 90
LOOK = """<!DOCTYPE html><meta charset="utf-8"><link rel="icon" href="data:,">
<iframe id="page" src="page.html" width="1100" height="4000"></iframe><pre id="found"></pre>
<script>
const frame = document.getElementById("page"), errors = [];
frame.addEventListener("load", () => {
  const inside = frame.contentDocument, boxes = {}, paths = {}, marks = {}, toggled = {};
  for (const element of inside.querySelectorAll("svg [id], svg[id]")) {
    const box = element.getBoundingClientRect();
    boxes[element.id] = [box.x, box.y, box.width, box.height];
    const path = element.querySelector(":scope > path");
    if (path) paths[element.id] = path.getAttribute("d");
    marks[element.id] = [...element.querySelectorAll("use")].filter(drawn).length;
  }
  for (const key of inside.querySelectorAll("svg text.key")) {
    const svg = key.closest("svg"), before = boxesOf(svg);
    key.dispatchEvent(new MouseEvent("click", {bubbles: true}));
    const gone = before.filter(id => inside.getElementById(id).getBoundingClientRect().width === 0);
    key.dispatchEvent(new MouseEvent("click", {bubbles: true}));
    toggled[svg.id + ": " + key.textContent] = [gone, before.length === boxesOf(svg).length];
  }
  document.getElementById("found").textContent = JSON.stringify({
    boxes, paths, marks, toggled, text: inside.body.innerText,
    svg_texts: [...inside.querySelectorAll("svg text")].map(one => one.textContent),
    titles: [...inside.querySelectorAll("svg")].map(one => one.getAttribute("aria-label")),
    rows: [...inside.querySelectorAll("table")].map(table => [table.caption.textContent,
      [...table.rows].map(row => [...row.cells].map(cell => cell.textContent))]),
    verdicts: [...inside.querySelectorAll("tr[class]")].map(row => [row.className, row.cells[4].textContent,
      inside.defaultView.getComputedStyle(row.cells[4]).color]),
    widest: inside.documentElement.scrollWidth, slipped: inside.getElementById("not-escaped") !== null,
    elsewhere: frame.contentWindow.performance.getEntriesByType("resource").map(one => one.name),
  });
});
function drawn(element) { return element.getBoundingClientRect().width > 0; }
function boxesOf(svg) { return [...svg.querySelectorAll("[id*='--']")].filter(drawn).map(one => one.id); }
</script>"""


@dataclass
class Seen:
    """What Chromium has made of the page. Attributes: `found` (by the script), `console`, `screenshot`."""

    found: dict[str, Any]
    console: list[str]
    screenshot: Path


def chromium(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        "--disable-dev-shm-usage", "--enable-logging=stderr", "--virtual-time-budget=10000",
        f"--user-data-dir={directory / 'profile'}", f"--window-size={WIDTH},{HEIGHT}", *options,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    directory = tmp_path_factory.mktemp("page")
    (directory / "page.html").write_text(page(STORED), encoding="utf-8")
    (directory / "look.html").write_text(LOOK, encoding="utf-8")
    looked = chromium(directory, "--dump-dom", f"file://{directory}/look.html")
    found = re.search(r'<pre id="found">(.*?)</pre>', looked.stdout, re.DOTALL)
    assert found is not None, looked.stderr
    assert found[1], looked.stderr
    picture = directory / "page.png"
    shot = chromium(directory, f"--screenshot={picture}", f"file://{directory}/page.html")
    console = [line for line in (looked.stderr + shot.stderr).splitlines() if "CONSOLE" in line]
    return Seen(json.loads(html.unescape(found[1])), console, picture)


def lines() -> dict[str, dict[str, list[tuple[float, float]]]]:
    return {
        THROUGHPUT: over_size(STORED, "stream", "bytes_per_s", 1e-9),
        LATENCY: over_size(STORED, "rtt", "p50_s", 1e6),
    }


def test_every_line_is_drawn_with_all_its_points(seen: Seen) -> None:
    for title, series in lines().items():
        assert len(series) >= 4
        for name, points in series.items():
            which = plots.chart_id(title, name)
            assert len(re.findall(r"[ML]", seen.found["paths"][which])) == len(points) == 4
            assert seen.found["marks"][which] == len(points)
            _, _, width, height = seen.found["boxes"][which]
            assert width > 100, which
            assert height > 1, which


def test_lines_go_up_where_their_values_do(seen: Seen) -> None:
    for title, series in lines().items():
        for name, points in series.items():
            path = seen.found["paths"][plots.chart_id(title, name)]
            at = [tuple(map(float, pair)) for pair in re.findall(r"[ML] (\S+) (\S+)", path)]
            assert [x for x, _ in at] == sorted(x for x, _ in at)
            for (_, value), (_, further), (_, y), (_, next_y) in zip(points, points[1:], at, at[1:], strict=False):
                assert (further > value) == (next_y < y), (title, name)


def test_every_bar_is_as_long_as_its_value(seen: Seen) -> None:
    bars = cpu_bars(STORED)
    assert len(bars) == 5
    widths = {name: seen.found["boxes"][plots.chart_id(CPU, "CPU", name)][2] for name in bars}
    scale = max(widths.values()) / max(bars.values())
    for name, value in bars.items():
        assert widths[name] == pytest.approx(value * scale, rel=0.02, abs=2), name


def test_charts_lie_within_the_page_one_below_the_other(seen: Seen) -> None:
    boxes = [seen.found["boxes"][plots.chart_id(title)] for title in (THROUGHPUT, LATENCY, CPU)]
    for x, _, width, height in boxes:
        assert x >= 0
        assert x + width <= WIDTH
        assert height > 100
    for (_, y, _, height), (_, below, _, _) in pairwise(boxes):
        assert y + height <= below
    assert seen.found["widest"] <= WIDTH


def test_titles_axes_and_legends_are_there_as_text(seen: Seen) -> None:
    assert seen.found["titles"] == [THROUGHPUT, LATENCY, CPU]
    wanted = {"message size", "GB/s", "round trip, median, microseconds", "64 B", "4 KiB", "64 KiB", "1 MiB"}
    wanted |= {THROUGHPUT, LATENCY, CPU, "CPU seconds per GB, messages of 64 KiB (less is better)"}
    wanted |= {name for series in lines().values() for name in series}
    assert wanted <= set(seen.found["svg_texts"])


def test_the_tables_have_the_numbers_of_the_run(seen: Seen) -> None:
    tables = dict(seen.found["rows"])
    for table in (text.goals(STORED), text.figures(STORED, "pinned")):
        assert tables[table.title] == [list(table.header), *(list(row) for row in table.rows)]
    facts = text.machine(STORED)
    assert tables["Machine and method"] == [list(pair) for pair in facts]
    assert any(row["verdict"] == "not measured" for row in STORED["goals"])


def test_verdicts_are_told_apart_by_colour_too(seen: Seen) -> None:
    colours = {word: colour for _, word, colour in seen.found["verdicts"]}
    assert {"held", "below goal", "below floor"} <= colours.keys()
    assert len(set(colours.values())) == len(colours)
    for kind, word, _ in seen.found["verdicts"]:
        assert kind == word.replace(" ", "-")


def test_absent_peers_and_failures_are_named_and_nothing_becomes_markup(seen: Seen) -> None:
    assert "not installed: zmq-ipc; to have it: pip install 'virtio-ism[peers]'" in seen.found["text"]
    assert '<b id="not-escaped">far end: & so on</b>' in seen.found["text"]
    assert not seen.found["slipped"]


def test_a_click_on_a_name_in_the_legend_hides_its_line_and_another_shows_it(seen: Seen) -> None:
    for title, series in lines().items():
        for name in series:
            gone, back = seen.found["toggled"][f"{plots.chart_id(title)}: {name}"]
            assert gone == [plots.chart_id(title, name)]
            assert back


def test_the_page_needs_nothing_from_elsewhere_and_says_nothing_on_the_console(seen: Seen) -> None:
    assert [name for name in seen.found["elsewhere"] if not name.startswith("data:")] == []
    assert seen.console == []


def test_the_screenshot_shows_text_and_all_colours_of_the_lines(seen: Seen) -> None:
    import numpy as np
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    picture = imread(seen.screenshot)[:, :, :3]
    assert picture.shape[:2] == (HEIGHT, WIDTH)
    white = np.all(picture > 0.99, axis=2)
    assert 0.5 < white.mean() < 0.99
    written = ~white.all(axis=1)
    assert written[: HEIGHT // 2].mean() > 0.3
    svg = page(STORED)
    for name in lines()[THROUGHPUT]:
        which = re.escape(plots.chart_id(THROUGHPUT, name))
        colour = re.search(rf'<g id="{which}">\s*<path[^>]*stroke: (#[0-9a-f]+)', svg)
        assert colour is not None
        near = np.abs(picture - np.array(to_rgb(colour[1]))).max(axis=2) < 0.05
        assert near.sum() > 100, name
