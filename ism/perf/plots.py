# SPDX-License-Identifier: Apache-2.0
"""Charts as SVG text: lines over a range, and bars. The only importer of matplotlib, which the extra `perf` brings.

The same values give the same text: no dates, ids from the title. Text stays text, so that it can be searched and read
aloud. Every line and bar is a group with an id, `chart_id(title, series)` or `chart_id(title, series, bar)`, by which a
page or a test finds it; all ids of a chart begin with its title's, so several charts can be in one page.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from xml.sax.saxutils import quoteattr

from ism.errors import FeatureMismatchError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]

_COLOURS: Final = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5c00", "#56b4e9", "#e69f00", "#000000", "#7f7f7f", "#8c1aff",
)  # fmt: skip
"""Told apart by the colour-blind too (most of them are Okabe and Ito's); all are readable on white."""
_MARKS: Final = "osD^vP*X<>"
_STYLE: Final[dict[str, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ism",
    "path.simplify": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "text.parse_math": False,
}
_MOST_TICKS: Final = 14
_HEADROOM: Final = 1.08


def chart_id(title: str, *parts: str) -> str:
    """Return the id of a chart (`title` alone), of one of its lines, or of one of its bars."""
    return "--".join(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") or "x" for part in (title, *parts))


def size_text(size: float) -> str:
    """Return a number of bytes by its power of 1024: 65536 is "64 KiB"."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:g} {name}"
    return f"{size:g} B"


def line_chart(
    path: Path | str | None,
    title: str,
    xlabel: str,
    ylabel: str,
    series: Mapping[str, Points],
    *,
    logx: bool = True,
    logy: bool = False,
    xformat: Callable[[float], str] | None = None,
) -> str:
    """Draw a line for each series, with a mark at each point.

    Args: `path`: where to write the SVG as well, None: nowhere; `series`: name to (x, y) in order of x; one without
        points is left out; `logx` (to the base 2), `logy` (to the base 10): want values above 0; `xformat`: how a
        value of x is written at its tick.
    Returns: the SVG. Raises: FeatureMismatchError (no matplotlib), OSError (`path`).
    """
    with _figure(title, xlabel, ylabel) as (figure, axes):
        for number, (name, points) in enumerate((name, points) for name, points in series.items() if points):
            xs, ys = zip(*points, strict=True)
            axes.plot(
                xs, ys, label=name, gid=chart_id(title, name), color=_COLOURS[number % len(_COLOURS)], linewidth=1.8,
                marker=_MARKS[number % len(_MARKS)], markersize=5, linestyle="--" if number >= len(_COLOURS) else "-",
            )  # fmt: skip
        if logx:
            axes.set_xscale("log", base=2)
        _ticks(axes, sorted({x for points in series.values() for x, _ in points}), xformat)
        if logy:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter("")
        else:
            axes.set_ylim(bottom=0)
        _legend(axes)
        return _svg(figure, title, path)


def bar_chart(
    path: Path | str | None,
    title: str,
    xlabel: str,
    ylabel: str,
    series: Mapping[str, Mapping[str, float]],
    *,
    logx: bool = False,
) -> str:
    """Draw horizontal bars, one below the other, each with its value at its end.

    Args: `path`: as for `line_chart`; `series`: name to {what the bar is of: value}; of several series the bars of the
        same thing stand together. With one series there is no legend. `logx`: wants values above 0.
    Returns: the SVG. Raises: FeatureMismatchError, OSError.
    """
    names = list(dict.fromkeys(bar for bars in series.values() for bar in bars))
    rows = len(names) * len(series)
    with _figure(title, xlabel, ylabel, height=1.3 + 0.3 * max(rows, 3)) as (figure, axes):
        thick = 0.8 / max(len(series), 1)
        for number, (name, bars) in enumerate(series.items()):
            colour = _COLOURS[number % len(_COLOURS)]
            at = [names.index(bar) + (number - (len(series) - 1) / 2) * thick for bar in bars]
            drawn = axes.barh(at, list(bars.values()), height=thick * 0.9, color=colour, label=name)
            for patch, bar in zip(drawn, bars, strict=True):
                patch.set_gid(chart_id(title, name, bar))
            axes.bar_label(drawn, labels=[f"{value:.3g}" for value in bars.values()], padding=3, fontsize=9)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        if logx:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            axes.set_xlim(right=max((v for bars in series.values() for v in bars.values()), default=1) * _HEADROOM or 1)
        if len(series) > 1:
            _legend(axes)
        return _svg(figure, title, path)


# -- matplotlib ------------------------------------------------------------------------------------------------------


def require() -> None:
    """Raise FeatureMismatchError, which says what to install, unless charts can be drawn."""
    try:
        import matplotlib  # noqa: F401 (whether it is there)
    except ImportError as exc:
        raise FeatureMismatchError(
            "charts need the package matplotlib: pip install 'virtio-ism[perf]'", ["matplotlib"]
        ) from exc


class _figure:
    """A figure of one axes, in this module's style whatever the user's settings are."""

    def __init__(self, title: str, xlabel: str, ylabel: str, height: float = 4.2) -> None:
        require()
        import matplotlib as mpl
        from matplotlib.figure import Figure

        self._labels = (title, xlabel, ylabel)
        default: dict[Any, Any] = {name: value for name, value in mpl.rcParamsDefault.items() if "backend" not in name}
        self._context: Any = mpl.rc_context(default | _STYLE)
        self._make, self._height = Figure, height

    def __enter__(self) -> tuple[Figure, Axes]:
        self._context.__enter__()
        figure = self._make(figsize=(8, self._height), layout="constrained")
        axes = figure.add_subplot()
        title, xlabel, ylabel = self._labels
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        return figure, axes

    def __exit__(self, *args: Any) -> None:
        self._context.__exit__(*args)


def _ticks(axes: Axes, values: Sequence[float], xformat: Callable[[float], str] | None) -> None:
    """Put the ticks where points are, as long as there is room for them."""
    if not values:
        return
    step = math.ceil(len(values) / _MOST_TICKS)
    shown = list(values)[::step]
    axes.set_xticks(shown, [xformat(value) if xformat else f"{value:g}" for value in shown])
    axes.minorticks_off()


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)


def _svg(figure: Figure, title: str, path: Path | str | None) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Title": title, "Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    prefix = chart_id(title)
    for name in set(re.findall(r'\bid="([^"]+)"', text)):
        if not name.startswith(prefix):
            text = re.sub(rf'(\bid="|href="#|url\(#){re.escape(name)}(?=["\)])', rf"\g<1>{prefix}..{name}", text)
    text = text.replace("<svg ", f'<svg id="{prefix}" role="img" aria-label={quoteattr(title)} ', 1)
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text
