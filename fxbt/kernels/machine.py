"""What the times of kernels depend on besides their shape: the processor, the number of threads, and torch."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch


def cpu_name() -> str:
    """The processor's name, as it says it itself."""
    return _cpu_facts().get("model name") or platform.processor() or platform.machine()


def cpu_family() -> str:
    """The processor's maker and family, which many names share.

    Example:
        >>> cpu_family()
        'AuthenticAMD family 26'
    """
    facts = _cpu_facts()
    return f"{facts.get('vendor_id', platform.machine())} family {facts.get('cpu family', 'unknown')}"


def capability() -> str:
    """The instructions that torch uses here: "AVX2", "AVX512", "DEFAULT"."""
    return torch.backends.cpu.get_cpu_capability()


@functools.cache
def _cpu_facts() -> dict[str, str]:
    """What Linux says of the first processor; {} elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:  # no Linux
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
