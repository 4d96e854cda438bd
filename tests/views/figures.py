"""One figure of each kind with values that are easy to recognise, for the tests of floor 6."""

import math

import torch

from microtome.views import Bars, Directions, Figure, Heatmap, Lines, Patterns, Scatter, Series

TOKENS = ["<s>", " Mary", " and", " </script><b>"]


def examples() -> dict[str, Figure]:
    """Each kind once, the heatmap also diverging; hostile words where words are shown."""
    causal = torch.tensor([[1.0, 0, 0, 0], [0.25, 0.75, 0, 0], [0.5, 0.25, 0.25, 0], [0.1, 0.2, 0.3, 0.4]])
    return {
        "heatmap": Heatmap(
            [[0.0, 0.5, 1.25, 2.0], [1.0, math.nan, 0.25, 0.125]],
            columns=TOKENS,
            row_label="layer",
            column_label="token",
            value_label="score",
            marks=[(1, 0)],
            title="<i>Heads</i> & tokens",
            caption="What is shown.",
        ),
        "diverging": Heatmap([[-1.0, 3.0], [0.0, 1.5]], value_label="change", diverging=True),
        "patterns": Patterns(torch.stack([causal, causal.flip(1)]), names=["5.1", "6.9"], tokens=TOKENS),
        "lines": Lines(
            [
                Series("loss", [3.0, 2.0, math.nan, 0.5], low=[2.5, 1.5, 1, 0.25], high=[3.5, 2.5, 2, 0.75]),
                Series("control", [3.0, 3.0, 2.75], x=[0, 2, 3]),
            ],
            x_label="step",
            y_label="nats",
            at=[(1.5, "induction")],
        ),
        "bordered": Heatmap([[0.0, 1.0, 2.0], [1.0, 2.0, 3.0]], border=[(-0.5, 0.0), (0.25, 1.0), (5.0, 2.5)]),
        "directions": Directions(
            [[[1.0, 0.0], [0.0, -0.5], [-0.25, 0.25]], [[0.5, 0.5]]],
            names=["p = 1", " </script><b>"],
            groups=[["own", "pair", "pair"], ["own"]],
            labels=[["x0", "x1", "x2"], ["x0"]],
            title="Features in the plane",
        ),
        "bars": Bars(
            ["5.1", "6.9", "all"], [0.5, -1.0, 2.0], low=[0.25, -1.5, 1], high=[1, -0.5, 3], groups=["a", "a", "b"]
        ),
        "horizontal": Bars(["one long label", "another"], [0.75, 0.25], value_label="share", horizontal=True),
        "scatter": Scatter(
            [0.0, 1.0, 2.0],
            [0.5, 1.0, 1.5],
            labels=["5.1", "6.9", "7.2"],
            named=[2],
            groups=["a", "b", "a"],
            joined=True,
            diagonal=True,
        ),
    }
