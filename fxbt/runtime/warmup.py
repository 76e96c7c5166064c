"""`Warmup`: what a call of `fast.warmup(...)` did."""

from __future__ import annotations

from dataclasses import dataclass

_SHOWN = 0.05  # seconds; shorter parts are only in `seconds`


@dataclass(frozen=True)
class Warmup:
    """What `fast.warmup(...)` did, and how long each part took.

    Attributes:
        captured: the signatures of new graphs, as in `report.graphs`; () if a graph served the call already, or none
            can.
        fallbacks: newly found reasons why such calls run the original forward.
        seconds: the seconds of each part, in the order in which they began; they add up to `total`.

    Example:
        >>> done = fast.warmup(**inputs)
        >>> done.captured, done.total, done.seconds["capture"]
    """

    captured: tuple[str, ...]
    fallbacks: tuple[str, ...]
    seconds: dict[str, float]

    @property
    def total(self) -> float:
        """The seconds of all parts together."""
        return sum(self.seconds.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{what} {seconds:.1f}" for what, seconds in self.seconds.items() if seconds >= _SHOWN)
        did = [f"captured {signature}" for signature in self.captured]
        did += [f"runs the original: {reason}" for reason in self.fallbacks]
        return f"{'; '.join(did) or 'captured nothing new'} in {self.total:.1f} s{f': {parts}' if parts else ''}"
