"""The assignment problem: which row goes with which column, each used once, so that the sum of scores is largest.

The shortest augmenting path method (Kuhn 1955 with dual prices; Jonker & Volgenant 1987), one row after another, its
inner loop over columns in numpy. Exact; about n³ steps at worst, far fewer where most rows have a clear partner.
"""

import numpy as np
from jaxtyping import Float, Int


def best_matching(score: Float[np.ndarray, "n m"]) -> Int[np.ndarray, " n"]:
    """The column of each row, all different, with the largest sum of scores; n must not exceed m."""
    n, m = score.shape
    assert n <= m, "each row needs a column of its own"
    cost = -score.astype(np.float64)
    column_price = cost.min(0) if n == m else np.zeros(m)
    row_price = (cost - column_price).min(1)
    row_of = np.full(m, -1)
    waiting = _greedy(cost, row_price, column_price, row_of)
    for row in waiting:
        _augment(int(row), cost, row_price, column_price, row_of)
    column_of = np.full(n, -1)
    column_of[row_of[row_of >= 0]] = np.flatnonzero(row_of >= 0)
    return column_of


def _greedy(cost: np.ndarray, row_price: np.ndarray, column_price: np.ndarray, row_of: np.ndarray) -> list[int]:
    """Give each row a free column that costs it nothing at these prices; the rows that found none."""
    waiting = []
    for row in range(len(cost)):
        column = int((cost[row] - column_price).argmin())
        if row_of[column] < 0 and cost[row, column] - column_price[column] <= row_price[row]:
            row_of[column] = row
        else:
            waiting.append(row)
    return waiting


def _augment(row: int, cost: np.ndarray, row_price: np.ndarray, column_price: np.ndarray, row_of: np.ndarray) -> None:
    """Find the cheapest path from `row` to a free column, change the prices, and shift the partners along it."""
    m = cost.shape[1]
    distance, came_from, done = np.full(m, np.inf), np.full(m, -1), np.zeros(m, dtype=bool)
    here, reached, last = row, 0.0, -1
    while True:
        step = reached + cost[here] - row_price[here] - column_price
        better = (step < distance) & ~done
        distance[better] = step[better]
        came_from[better] = last
        column = int(np.where(done, np.inf, distance).argmin())
        reached = distance[column]
        done[column] = True
        last = column
        if row_of[column] < 0:
            break
        here = int(row_of[column])
    paid = done.copy()
    paid[last] = False
    row_price[row_of[paid]] += reached - distance[paid]
    row_price[row] += reached
    column_price[paid] -= reached - distance[paid]
    while last >= 0:
        before = int(came_from[last])
        row_of[last] = row_of[before] if before >= 0 else row
        last = before
