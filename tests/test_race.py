"""Graph against original on simulated hosts: no graph is lost to noise, those that are clearly slower are found.

The clock is simulated: a call takes what its host says, and no time passes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hosts import NOISY, Bursts, Half, Host, Restless, Shared, Slowing, Uncounted

from fxbt.runtime import race
from fxbt.runtime.race import CAPTURE_SECONDS, LOOK_AGAIN, PAIRS, Evidence, Race, Races

SEEDS = range(300)


def looked(host: Host, graph: float, original: float, calls: int = 1, threads: int = 1) -> Race:
    """A race after a capture, and looks at so many calls later."""
    contest = Race(host)
    mine, its = host.call(graph, threads), host.call(original)
    contest.look(mine, its, CAPTURE_SECONDS)
    for _ in range(calls - 1):
        if contest.is_due():
            contest.look(mine, its)
    return contest


def disturbed(host: Host, seconds: float, switches: int) -> Callable[[], None]:
    """A call that loses its processor so many times."""
    run = host.call(seconds)

    def called() -> None:
        host.switches += switches
        run()

    return called


def lost(kind: type[Host], graph: float, original: float, **how: int) -> int:
    return sum(looked(kind(seed), graph, original, **how).evidence is not None for seed in SEEDS)


@pytest.mark.parametrize("kind", NOISY)
@pytest.mark.parametrize("scale", [0.0005, 0.01, 0.2])
@pytest.mark.parametrize("ratio", [0.5, 0.9])
def test_no_faster_graph_is_lost_on_any_host(kind, scale, ratio):
    assert lost(kind, ratio * scale, scale, calls=LOOK_AGAIN * 5) == 0


@pytest.mark.parametrize("kind", [Host, Restless, Bursts, Half, Slowing, Shared])
def test_a_graph_that_is_as_fast_is_lost_to_one_look_in_a_thousand_at_most(kind):
    """So many looks: at the capture, and three later ones of 300 graphs."""
    assert lost(kind, 0.01, 0.01, calls=LOOK_AGAIN * 8) <= 1


@pytest.mark.parametrize("kind", [Shared, Uncounted])
def test_a_graph_of_two_threads_is_not_lost_where_each_processor_has_other_work(kind):
    """It waits for the later one and looks slower in two of three pairs; on a quiet host it takes a quarter as long."""
    assert lost(kind, 0.001, 0.004, threads=2, calls=LOOK_AGAIN * 5) == 0


@pytest.mark.parametrize("scale", [0.0005, 0.01])
@pytest.mark.parametrize(("ratio", "kinds"), [(1.2, (Host, Slowing)), (2.0, (Host, Restless, Slowing))])
def test_slower_graphs_are_found_at_the_capture_on_a_quiet_host(scale, ratio, kinds):
    for kind in kinds:
        assert lost(kind, ratio * scale, scale) == len(SEEDS), kind


def test_on_a_restless_host_most_graphs_that_are_a_fifth_slower_are_found():
    assert lost(Restless, 0.012, 0.010) > 0.6 * len(SEEDS)


def test_slow_calls_are_looked_at_one_pair_a_call_until_it_is_decided():
    host = Host(0)
    contest = Race(host)
    mine, its = host.call(0.8), host.call(0.4)
    contest.look(mine, its, CAPTURE_SECONDS)
    assert host.calls == 2 and contest.evidence is None  # one pair takes longer than it may
    taken = 1
    while contest.evidence is None and taken < 100:
        assert contest.is_due()
        contest.look(mine, its)
        taken += 1
    assert taken == PAIRS and host.calls == 2 * PAIRS


def test_a_look_at_a_faster_graph_costs_two_pairs_and_the_next_one_is_twice_as_far():
    host = Host(0)
    contest = Race(host)
    mine, its = host.call(0.0015), host.call(0.002)
    contest.look(mine, its, CAPTURE_SECONDS)
    at = []
    for call in range(1, 10 * LOOK_AGAIN):
        if contest.is_due():
            before = host.calls
            contest.look(mine, its)
            at.append((call, host.calls - before))
    assert at == [(LOOK_AGAIN + 1, 4), (3 * LOOK_AGAIN + 2, 4), (7 * LOOK_AGAIN + 3, 4)]


def test_a_graph_that_wins_by_far_costs_one_pair_on_a_disturbed_host_too():
    """Pairs of a large batch take half a second, so that each is disturbed: two dozen calls were timed, one by one."""
    host = Host(0)
    contest = Race(host)
    contest.look(disturbed(host, 0.07, 1000), disturbed(host, 0.35, 1000), CAPTURE_SECONDS)
    assert contest.evidence is None and host.calls == 2
    assert not contest.is_due()


def test_the_order_of_a_pair_alternates():
    order: list[str] = []
    host = Host(0)
    contest = Race(host)

    def called(name: str, seconds: float) -> Callable[[], None]:
        run = host.call(seconds)
        return lambda: (order.append(name), run())[1]

    contest.look(called("graph", 0.002), called("original", 0.001), CAPTURE_SECONDS)
    pairs = list(zip(order[::2], order[1::2], strict=True))
    assert len(pairs) == PAIRS and pairs[0] == pairs[2] == ("original", "graph") and pairs[1] == ("graph", "original")


def test_a_wrong_verdict_heals():
    for seed in SEEDS:
        host = Host(seed)
        contest = looked(host, 0.002, 0.001)
        assert contest.evidence is not None
        mine, its = host.call(0.001), host.call(0.002)  # the machine is another one now
        for _ in range(LOOK_AGAIN + 1):
            if contest.is_due():
                contest.look(mine, its)
        assert contest.evidence is None


def test_a_right_verdict_is_confirmed_by_fewer_pairs_and_keeps_its_evidence():
    host = Host(0)
    contest = looked(host, 0.002, 0.001)
    evidence, before = contest.evidence, host.calls
    for _ in range(LOOK_AGAIN + 1):
        if contest.is_due():
            contest.look(host.call(0.002), host.call(0.001))
    assert contest.evidence is evidence and host.calls - before == 2 * race.PAIRS_AGAIN


@pytest.mark.parametrize("verdict", [True, False])
def test_a_disturbed_look_decides_nothing(verdict):
    """Every pair says the opposite of what was found before, and every one lost a processor."""
    host = Host(0)
    contest = looked(host, *((0.002, 0.001) if verdict else (0.001, 0.002)))
    assert (contest.evidence is not None) == verdict
    mine, its = (disturbed(host, seconds, 10) for seconds in ((0.001, 0.002) if verdict else (0.002, 0.001)))
    looks = 0
    for _ in range(10 * LOOK_AGAIN):
        if contest.is_due():
            looks += 1
            contest.look(mine, its)
    assert looks >= 3 and (contest.evidence is not None) == verdict


def test_what_fails_in_a_look_decides_nothing_and_is_tried_again_later():
    contest = Race(Host(0))

    def fails() -> None:
        raise RuntimeError("the call goes another way")

    contest.look(fails, fails, CAPTURE_SECONDS)
    assert contest.evidence is None and not contest.is_due()
    for _ in range(LOOK_AGAIN - 1):
        assert not contest.is_due()
    assert contest.is_due()


def test_a_verdict_holds_for_its_size_alone_and_is_told_with_its_evidence():
    host = Host(0)
    races = Races(host)
    for elements, graph in ((5, 0.001), (70, 0.004), (127, 0.004), (128, 0.001)):
        races.of(elements).look(host.call(graph), host.call(0.002), CAPTURE_SECONDS)
    assert races.of(64) is races.of(127) and races.of(128) is not races.of(127)
    assert list(races.lost()) == ["64 to 127 elements"]
    assert races.lost()["64 to 127 elements"].startswith("12 of 12 pairs, 4.")


def test_evidence_reads_as_pairs_and_times():
    assert str(Evidence(11, 12, graph=0.0031, original=0.0022)) == "11 of 12 pairs, 3.1 ms against 2.2 ms"


def test_two_threads_do_not_look_at_once():
    host = Host(0)
    contest = Race(host)
    inner: list[int] = []

    def nested() -> None:
        before = host.calls
        contest.look(host.call(1.0), host.call(1.0))  # as another thread would, meanwhile
        inner.append(host.calls - before)
        host.time += 1e-3

    contest.look(nested, host.call(1e-3), CAPTURE_SECONDS)
    assert inner and not any(inner)


def test_an_accelerator_is_waited_for_after_each_call():
    host = Host(0)
    waited: list[int] = []
    host.wait = lambda: waited.append(host.calls)  # type: ignore[method-assign]
    Race(host).look(host.call(0.0015), host.call(0.002), CAPTURE_SECONDS)
    assert waited == [1, 2, 3, 4]
