"""What the benchmark found, as text, as JSON and as a plot."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from tabulate import tabulate

OURS, BASELINE = "fxbt", "HF sdpa"
COARSE = ("fxbt bf16", "fxbt int8")  # linears in less than float32: compared with no one
BEFORE = "fxbt before"  # another build of fxbt: no peer
QUIET = 0.05  # the part of the machine that other programs may take
LEGEND = f"""\
ms: median (min-max) over all turns of the median pass over the column. Each round has new processes.
times as fast as {BASELINE}: median over all turns of {BASELINE}'s time divided by the engine's in the same turn.
{OURS} / best peer: the same of {OURS}'s time divided by the best other engine's; below 1 is faster.
% of GEMM peak: time that the matrix products of the tokens alone (no padding) would take at the best float32 rate
measured here, as a part of the engine's time. At 1x16 weights are read for few rows: no engine gets near 100 %.
difference: largest from HF eager at a token, as a part of the output's magnitude. All engines compute in float32 but
those that say otherwise, whose linears are narrower.
import: seconds for the engine's libraries, torch and transformers being there. ready: from there to the end of the
first fast call (of the first column's shape), nothing compiled or measured before.
MiB: largest resident set while preparing, and while running; both with Python, torch and transformers."""


def write(found: dict[str, Any], out: Path, plot_path: Path) -> None:
    """Writes out.txt, out.json and, where matplotlib is installed, the plot."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".txt").write_text(text(found) + "\n")
    out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    plot(found, plot_path)


def text(found: dict[str, Any]) -> str:
    head = [f"{key}: {value}" for key, value in found["machine"].items()]
    return "\n".join([*head, "", *[_model_text(name, data) for name, data in found["models"].items()], LEGEND])


def _model_text(name: str, data: dict[str, Any]) -> str:
    columns = data["columns"]
    engines = list(data["prepared"])
    quiet = "" if data["others"] < QUIET else f" (over {QUIET:.0%}: these times are not to be trusted)"
    filled = ", ".join(f"{column} {about['fill']:.2f}" for column, about in columns.items() if about["fill"] < 1)
    lines = [
        f"{name}" + (f" (fill: {filled})" if filled else ""),
        f"peak {max(data['peaks_gflops']):.0f} GFLOP/s; stopped engines took {data['idle_seconds']:.2f} s of processor "
        f"time, other programs {data['others']:.0%} of the machine{quiet}",
        _table("ms", columns, [[engine, *[_span(data, column, engine) for column in columns]] for engine in engines]),
        _table(f"times as fast as {BASELINE}", columns, [_ratio_row(data, engine) for engine in engines]),
    ]
    best = best_peers(data)
    if OURS in engines and best:
        lines.append(_table(f"{OURS} / best peer", columns, [_best_row(data, best)]))
    lines.append(_table("% of GEMM peak", columns, [_peak_row(data, engine) for engine in engines]))
    lines.append(_preparation(data, engines))
    lines += [f"{engine}: skipped: {reason}" for engine, reason in data["skipped"].items()]
    return "\n\n".join(lines) + "\n"


def _table(title: str, columns: Any, rows: list[list[str]]) -> str:
    return tabulate(rows, headers=[title, *columns], disable_numparse=True, stralign="right", colalign=("left",))


def _span(data: dict[str, Any], column: str, engine: str) -> str:
    times = data["times_ms"][column][engine]
    return f"{statistics.median(times):.4g} ({min(times):.4g}-{max(times):.4g})"


def ratio(data: dict[str, Any], column: str, engine: str, other: str) -> float:
    """How many times as long `engine` takes as `other`: the median of the turns, each compared within itself."""
    times = data["times_ms"][column]
    return statistics.median(a / b for a, b in zip(times[engine], times[other], strict=True))


def _ratio_row(data: dict[str, Any], engine: str) -> list[str]:
    return [engine, *[f"{ratio(data, column, BASELINE, engine):.2f}" for column in data["columns"]]]


def best_peers(data: dict[str, Any]) -> dict[str, str]:
    """The fastest engine that is not fxbt, for each column."""
    others = (OURS, BEFORE, *COARSE)
    return {
        column: min((e for e in times if e not in others), key=lambda engine: statistics.median(times[engine]))
        for column, times in data["times_ms"].items()
    }


def _best_row(data: dict[str, Any], best: dict[str, str]) -> list[str]:
    return ["", *[f"{ratio(data, column, OURS, peer):.2f} ({peer})" for column, peer in best.items()]]


def peak_part(data: dict[str, Any], column: str, engine: str) -> float:
    """The time the tokens' matrix products would take at the measured peak, as a part of the engine's time."""
    at_peak = data["columns"][column]["gflop"] / max(data["peaks_gflops"]) * 1e3
    return at_peak / statistics.median(data["times_ms"][column][engine])


def _peak_row(data: dict[str, Any], engine: str) -> list[str]:
    return [engine, *[f"{peak_part(data, column, engine):.0%}" for column in data["columns"]]]


def _preparation(data: dict[str, Any], engines: list[str]) -> str:
    rows = []
    for engine in engines:
        about = data["prepared"][engine]
        worst = max(data["differences"][engine].values())
        memory = [f"{about[key]:.0f}" for key in ("prepare_mib", "running_mib")]
        seconds = [f"{about[key]:.2f}" for key in ("import_s", "ready_s")]
        rows.append([engine, *seconds, *memory, f"{worst:.0e}"])
    return _table("", ["import s", "ready s", "MiB preparing", "MiB running", "difference"], rows)


def plot(found: dict[str, Any], path: Path) -> None:
    """A panel for each model: how many times as fast as HF sdpa each engine is, at each column."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    models = found["models"]
    wide = min(2, len(models))
    rows = -(-len(models) // wide)
    figure, axes = pyplot.subplots(rows, wide, figsize=(7.5 * wide, 3.2 * rows + 1), squeeze=False)
    engines = list(dict.fromkeys(e for data in models.values() for e in data["prepared"]))
    styles = {engine: _style(engine, place) for place, engine in enumerate(engines)}
    for axis, (name, data) in zip(axes.flat, models.items(), strict=False):
        _panel(axis, name, data, styles)
    for axis in axes.flat[len(models) :]:
        axis.axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=5, frameon=False)
    figure.suptitle(f"times as fast as {BASELINE}  ({found['machine']['cpu']}, float32)", fontsize=10)
    figure.tight_layout(rect=(0, 0.6 / figure.get_figheight(), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _style(engine: str, place: int) -> dict[str, Any]:
    if engine == OURS:
        return {"color": "black", "marker": "*", "markersize": 13, "zorder": 9}
    return {"color": f"C{place}", "marker": "osD^vP<>"[place % 8], "markersize": 6}


def _panel(axis: Any, name: str, data: dict[str, Any], styles: dict[str, Any]) -> None:
    columns = list(data["columns"])
    for engine in data["prepared"]:
        values = [ratio(data, column, BASELINE, engine) for column in columns]
        axis.plot(range(len(columns)), values, label=engine, linestyle="none", **styles[engine])
    axis.axhline(1.0, color="grey", linewidth=0.6)
    axis.set_title(name, fontsize=10)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_xlim(-0.5, len(columns) - 0.5)
    axis.set_ylim(bottom=0)
    axis.grid(axis="y", alpha=0.3)
