"""The sweep's results as docs/coverage.md: a summary, what is missing by reason, and a row for each type."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from tabulate import tabulate

from . import build

Row = dict[str, Any]
HEADERS = ("architecture", "captured", "attentions", "QKV", "layers", "max difference", "capture", "what is missing")


def write(rows: list[Row], path: Path) -> None:
    """Write the table of these results."""
    path.parent.mkdir(exist_ok=True)
    built = [row for row in rows if row["status"] not in ("unbuilt", "error")]
    text = [
        "# What fxbt makes of every model type",
        "",
        f"Written by `make zoo` (transformers {transformers.__version__}, torch {torch.__version__}): each model type, "
        "its config shrunk, weights random, attention eager, compared with its own original at three shapes and with "
        "right, left and no padding. Sizes, inputs and the count of real attentions come from tests/zoo.",
        "",
        *_summary(rows, built),
        "",
        "## What is missing, by reason",
        "",
        *_reasons(built),
        "",
        "## Model types",
        "",
        "`attentions`: found/computed by the original. `max difference`: relative to an output's magnitude.",
        "",
        tabulate([_line(row) for row in built], HEADERS, tablefmt="github"),
        "",
        "## Types that could not be built or fed",
        "",
        tabulate(
            [(row["type"], _short(row["reason"])) for row in rows if row not in built],
            ("architecture", "reason"),
            tablefmt="github",
        ),
        "",
    ]
    path.write_text("\n".join(text))


def _summary(rows: list[Row], built: list[Row]) -> list[str]:
    judged = [row for row in built if row["status"] in ("optimised", "wrong", "fallback")]
    optimised = [row for row in judged if row["status"] == "optimised"]
    real, found = sum(map(_needed, judged)), sum(min(row["found"], row["real"]) for row in judged)
    captured = sum(map(_needed, optimised))
    unused = sum(row["real"] for row in judged) - real
    others = sum(row["other softmaxes"] for row in judged)
    statuses = Counter(row["status"] for row in rows)
    return [
        f"- judged so far: {len(rows)} of {len(build.model_types())} types, in random order; "
        f"{len(built)} of them built and fed",
        f"- run optimised: {len(optimised)} of {len(built)} built ({_percent(len(optimised), len(built))})",
        f"- wrong: {statuses['wrong']}; original forward instead: {statuses['fallback']}; "
        f"not done in time: {statuses['timeout']}; crashed: {statuses['crash']}",
        f"- attentions found: {found} of {real} real ones ({_percent(found, real)}), "
        f"{_percent(found, captured)} of those in captured models; {unused} more are computed by originals that do not "
        "use them, or twice, and dropped",
        f"- no attentions: {others} softmaxes whose scores are no product of a query and a key (routers, additive "
        "attention, token learners), or whose result meets no value",
    ]


def _needed(row: Row) -> int:
    """The attentions that an output depends on: a graph holds no others."""
    in_graph = row["softmaxes"] - row["other softmaxes"] if "softmaxes" in row else row["real"]
    unused = row["status"] == "optimised" and not row["misses"] and row["found"] <= in_graph < row["real"]
    return in_graph if unused else row["real"]


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _reasons(built: list[Row]) -> list[str]:
    counts = Counter(reason for row in built for reason in {_general(missing) for missing in _missing(row)})
    return [f"- {count} x {reason}" for reason, count in counts.most_common()] or ["- nothing"]


def _missing(row: Row) -> list[str]:
    """Why something is not as it should be; softmaxes that are no attention's are no fault."""
    if row["status"] != "optimised":
        return [row.get("reason") or row["status"]]
    return row["misses"] if row["found"] < _needed(row) else []


def _general(reason: str) -> str:
    """A reason without names and sizes."""
    reason = re.sub(r"^\(.*?\) cannot be captured: ", "cannot be captured: ", reason)
    reason = re.sub(r" ?\[.*", "", reason)
    return _short(re.sub(r" \(.*", "", reason))


def _short(reason: str) -> str:
    reason = re.sub(r"^\(.*?\) cannot be captured: ", "", reason.split("\n")[0])
    return reason.replace("|", "/").replace("<", "&lt;")[:160]


def _line(row: Row) -> tuple[str, ...]:
    if "found" not in row:
        return (row["type"], row["status"], "-", "-", "-", "-", "-", _short(row["reason"]))
    captured = {"optimised": "yes", "fallback": "no", "wrong": "WRONG"}[row["status"]]
    return (
        row["type"],
        captured,
        f"{row['found']}/{_needed(row)}",
        str(row["qkv"]),
        str(row["layers"] or "-"),
        f"{row['difference']:.0e}" if row["difference"] else "0",
        f"{row['capture seconds']:.1f} s",
        "; ".join(_short(reason) for reason in _missing(row)),
    )
