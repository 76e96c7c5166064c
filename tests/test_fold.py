"""Folding finds the longest repeats, and only where each segment is wired like the one before it."""

from fxbt.explain.fold import Line, Repeat, repeats


def lines(keys: str, *reads: tuple[int, ...]) -> list[Line]:
    given = dict(enumerate(reads))
    return [Line(key, given.get(i, (i - 1,) if i else ())) for i, key in enumerate(keys)]


def test_a_chain() -> None:
    assert repeats(lines("i" + "abc" * 4 + "z")) == [Repeat(1, 3, 4)]


def test_two_short_lines_are_not_worth_it() -> None:
    assert repeats(lines("iaabbz")) == []
    assert repeats([]) == []


def test_the_larger_repeat_wins_over_the_small_one_in_it() -> None:
    assert repeats(lines("i" + "aaaab" * 3)) == [Repeat(1, 5, 3)]


def test_stages_of_a_hierarchical_model() -> None:
    assert repeats(lines("i" + "ab" * 4 + "d" + "xy" * 3)) == [Repeat(1, 2, 4), Repeat(10, 2, 3)]


def test_shared_values_are_read_by_all() -> None:
    chain = [Line("mask", ()), Line("x", ())]
    for _ in range(3):
        chain += [Line("a", (len(chain) - 1, 0)), Line("b", (len(chain),))]
    assert repeats(chain) == [Repeat(2, 2, 3)]


def test_one_segment_reading_past_the_last_ends_the_repeat() -> None:
    chain = lines("i" + "ab" * 6)
    chain[9] = Line("a", (6,))  # not 8, the end of the segment before
    assert repeats(chain) == [Repeat(1, 2, 4)]


def test_the_first_may_read_anything_but_always_the_same() -> None:
    chain = [Line("p", ()), Line("q", ()), Line("a", (0, 1)), *(Line("a", (i, i)) for i in range(2, 6))]
    assert repeats(chain) == [Repeat(3, 1, 4)]  # in line 2, one carried value would stand for both p and q


def test_a_crossed_wire_inside() -> None:
    chain = lines("i" + "abc" * 4)
    chain[6] = Line("c", (4, 5))
    assert repeats(chain) == [Repeat(7, 3, 2)]
