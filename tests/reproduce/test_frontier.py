"""The Pareto frontier."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from allmlp.reproduce.figures.frontier import pareto_frontier

POINTS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12)


def dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] >= other[1] and one != other


@given(POINTS)
def test_no_point_dominates_one_of_the_frontier_and_each_other_point_is_dominated_or_equal(points) -> None:
    frontier = pareto_frontier(points)
    for i, point in enumerate(points):
        if i in frontier:
            assert not any(dominates(other, point) for other in points)
        else:
            assert any(dominates(points[j], point) or points[j] == point for j in frontier)


@given(POINTS)
def test_the_frontier_rises(points) -> None:
    chosen = [points[i] for i in pareto_frontier(points)]
    assert all(first[0] < second[0] and first[1] < second[1] for first, second in itertools.pairwise(chosen))
