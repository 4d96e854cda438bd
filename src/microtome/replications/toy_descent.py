"""The fifth part of `toy_models_of_superposition`: data-set double descent (Henighan et al. 2023)."""

from collections.abc import Sequence

from microtome.common.progress import Progress
from microtome.replications.frame import Found, claim
from microtome.replications.toy_config import ToyModelsConfig
from microtome.toy import DataSetSize, double_descent
from microtome.toy.descent import interior_maximum
from microtome.views import Claim, Directions, Lines, Series, at_least, at_most, equal

_HENIGHAN = "Henighan et al. 2023"


def descent(config: ToyModelsConfig, progress: Progress) -> Found:
    """Fixed data sets of T points of length 1 in two dimensions."""
    rows = double_descent(config.descent, progress)
    sizes = [row.n_points for row in rows]
    title = f"Data-set double descent: {config.descent_features} features in 2 dimensions"
    losses = Lines(
        [
            Series("test", [row.test_loss for row in rows], x=sizes),
            Series("training", [row.train_loss for row in rows], x=sizes),
        ],
        x_scale="log",
        x_label="points in the data set",
        y_label="squared error",
        title=title,
    )
    stored = Lines(
        [
            Series("features", [row.feature_dimensionality for row in rows], x=sizes),
            Series("points", [row.data_dimensionality for row in rows], x=sizes),
        ],
        x_scale="log",
        x_label="points in the data set",
        y_label="mean dimensionality (weighted by ‖·‖²)",
        title="What is stored: points first, then features",
    )
    return Found("Data-set double descent", _claims(rows), [losses, stored, *_planes(rows)])


def _claims(rows: Sequence[DataSetSize]) -> list[Claim]:
    few = [row for row in rows if row.n_points < 10]
    gaps = [row.data_dimensionality - row.feature_dimensionality for row in few]
    test = [row.test_loss for row in rows]
    highest = rows[max(range(len(rows)), key=lambda i: test[i])]
    return [
        claim(
            "few_points",
            "Fewer than 10 points: the points have more of a dimension each than the features (least difference of mean D)",
            at_least(0.0),
            min(gaps, default=None),
            unless="" if gaps else "no data set has fewer than 10 points",
            source=_HENIGHAN,
        ),
        claim(
            "many_points",
            f"{rows[-1].n_points} points: the features have more than the points (difference of mean D, points less features)",
            at_most(0.0),
            rows[-1].data_dimensionality - rows[-1].feature_dimensionality,
            source=_HENIGHAN,
        ),
        claim(
            "bump",
            "The test loss is highest between the smallest and the largest data set",
            equal(True),
            interior_maximum(test),
            source=_HENIGHAN,
            note=f"highest at {highest.n_points} points: {highest.test_loss:.3f}; ends {test[0]:.3f} and {test[-1]:.3f}",
        ),
    ]


def _planes(rows: Sequence[DataSetSize]) -> list[Directions]:
    """Directions of the features and of the points, each scaled to its longest, for a few sizes."""
    chosen = [rows[i] for i in sorted({1 % len(rows), len(rows) // 2, len(rows) - 1})]
    names = [f"{row.n_points} points" for row in chosen]
    # A hundred points show the shape as well as a thousand do.
    points = [row.hidden[:, :100] for row in chosen]
    features = [row.W[:, :100] for row in chosen]
    return [
        Directions([(x / x.norm(dim=0).max()).T for x in vectors], names=names, limit=1.1, title=title, per_row=3)
        for vectors, title in ((features, "Where the features lie"), (points, "Where the training points lie"))
    ]
