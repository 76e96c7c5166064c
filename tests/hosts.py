"""Simulated machines: a clock and what calls take on them, quiet, noisy, shared. No time passes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from fxbt.runtime.race import Clock


class Host(Clock):
    """A simulated machine: its time, and what a call of so many quiet seconds takes on it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.time = 0.0
        self.switches = 0
        self.calls = 0

    def now(self) -> float:
        return self.time

    def taken(self) -> int:
        return self.switches

    def wait(self) -> None:
        pass

    def call(self, seconds: float, threads: int = 1) -> Callable[[], None]:
        def called() -> None:
            self.calls += 1
            self.time += self.slowed(seconds, threads)

        return called

    def slowed(self, seconds: float, threads: int) -> float:
        """A quiet host: a few percent up and down."""
        return seconds * self.random.uniform(1.0, 1.06)


class Restless(Host):
    """Times move by 30 %, as on a virtual machine."""

    def slowed(self, seconds, threads):
        return seconds * self.random.uniform(1.0, 1.3)


class Bursts(Host):
    """Other work comes and goes: while it is there, everything takes 2 to 20 times as long; nothing is counted."""

    def __init__(self, seed):
        super().__init__(seed)
        self.until, self.factor = 0.0, 1.0

    def slowed(self, seconds, threads):
        total = 0.0
        while seconds > 0:
            if self.time + total >= self.until:
                self.factor = 1.0 if self.factor > 1 else self.random.uniform(2, 20)
                self.until = self.time + total + self.random.expovariate(1 / 0.03)
            done = min(seconds, (self.until - self.time - total) / self.factor)
            total += done * self.factor
            seconds -= max(done, 1e-9)
        return total * self.random.uniform(1.0, 1.05)


class Half(Host):
    """Half of the calls take ten times as long."""

    def slowed(self, seconds, threads):
        return seconds * self.random.choice((1.0, 10.0)) * self.random.uniform(1.0, 1.05)


class HeavyTail(Host):
    """Now and then a call takes very long."""

    def slowed(self, seconds, threads):
        return seconds * (1 + 0.2 * math.exp(self.random.gauss(0, 2)))


class Slowing(Host):
    """Ever slower: twice the time after half a second."""

    def slowed(self, seconds, threads):
        return seconds * (1 + 2 * self.time) * self.random.uniform(1.0, 1.05)


class Shared(Host):
    """Each processor has other work all of the time: who takes two of them waits for the later one; it is counted."""

    def slowed(self, seconds, threads):
        waits = max(self.random.expovariate(1 / 0.02) for _ in range(threads))
        self.switches += self.random.randint(2, 6) * threads
        return seconds + waits


class Uncounted(Shared):
    """As `Shared`, of which the system tells nothing: the other work is another virtual machine's."""

    def taken(self):
        return 0


NOISY = (Host, Restless, Bursts, Half, HeavyTail, Slowing, Shared, Uncounted)
