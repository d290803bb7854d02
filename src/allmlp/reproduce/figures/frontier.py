"""The Pareto frontier."""

from collections.abc import Sequence


def pareto_frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the (cost, quality) points that no other point dominates, from the cheapest to the best.

    A point dominates another that it is not worse than in either, and better than in one; of equal points, the first
    counts.
    """
    frontier: list[int] = []
    for position in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if not frontier or points[position][1] > points[frontier[-1]][1]:
            frontier.append(position)
    return frontier
