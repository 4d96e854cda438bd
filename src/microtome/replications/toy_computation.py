"""The fourth part of `toy_models_of_superposition`: neurons. A ReLU in the hidden layer makes its axes special, so features are
neurons or mixtures of them; and a hidden layer can compute (the absolute value) on features that it holds in superposition.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from microtome.replications.frame import Found, claim
from microtome.replications.toy_basics import ELHAGE, OWN
from microtome.replications.toy_config import ToyModelsConfig
from microtome.toy import Features, ToyConfig
from microtome.toy.trials import trials
from microtome.views import Heatmap, Lines, Series, Table, at_least, at_most, between
from microtome.views.report import Cell

_NEURONS = (0.75, 0.35, 0.15, 0.1, 0.06, 0.02, 0.01)
_ABSOLUTE = (1.0, 0.5, 0.3, 0.1, 0.03, 0.01, 0.003)
_LIVE = 0.1


def shares(W: Float[Tensor, "neuron feature"]) -> Float[Tensor, " neuron"]:
    """How much of each neuron's squared weight is on one feature: 1 is a monosemantic neuron."""
    squares = W.square()
    return squares.amax(dim=1) / squares.sum(dim=1).clamp_min(1e-12)


# ---- privileged basis ---------------------------------------------------------------------------------------------------


def neurons(config: ToyModelsConfig) -> Found:
    """n = 10, m = 5, importance .75^i, h = ReLU(Wx)."""
    shape = ToyConfig(n_features=10, n_hidden=5, hidden="relu", seed=config.seed)
    features = Features(10, _NEURONS, len(_NEURONS))
    importance = [0.75**i for i in range(10)]
    done = trials(shape, features, config.privileged_best_of, config.computation, importance=importance)
    W = done.best.W_in.detach()
    clear = torch.stack([(shares(one) > 0.9).float().mean() for one in W])
    claims = [
        claim(
            "monosemantic",
            f"A hidden ReLU and dense features (p = {_NEURONS[0]}): every neuron stands for one feature (share of neurons with "
            "> .9 of their squared weight on one)",
            at_least(1.0),
            float(clear[0]),
            source=ELHAGE,
        ),
        claim(
            "mixed",
            f"Between (p = {_NEURONS[1]}) some neurons are monosemantic and some are not (share that is)",
            between(0.2, 0.8),
            float(clear[1]),
            source=ELHAGE,
        ),
        claim(
            "polysemantic",
            f"Sparse features (p = {_NEURONS[-1]}): no neuron is monosemantic (share that is)",
            at_most(0.0),
            float(clear[-1]),
            source=ELHAGE,
            note=f"the best of {config.privileged_best_of}; the paper kept the best of 1,000",
        ),
    ]
    lines = Lines(
        [Series("monosemantic neurons", clear, x=[1 / p for p in _NEURONS])],
        x_scale="log",
        x_label="1 / density",
        y_label="share of neurons",
        title="Neurons that stand for one feature",
    )
    maps = [
        Heatmap(
            W[i],
            row_label="neuron",
            column_label="feature",
            value_label="weight",
            diverging=True,
            title=f"Weights of the neurons, p = {_NEURONS[i]}",
        )
        for i in (0, 1, 3, 6)
    ]
    return Found("A privileged basis", claims, [lines, *maps])


# ---- computation in superposition ---------------------------------------------------------------------------------------


def absolute_value(config: ToyModelsConfig) -> Found:
    """n = 100, m = 40, importance .8^i, x in [−1, 1], target |x|, untied W_in and W_out."""
    shape = ToyConfig(n_features=100, n_hidden=40, hidden="relu", tied=False, target="absolute", seed=config.seed)
    features = Features(100, _ABSOLUTE, len(_ABSOLUTE), magnitude="signed")
    importance = [0.8**i for i in range(100)]
    done = trials(shape, features, config.computation_best_of, config.computation, importance=importance, n_test=5000)
    rows = [Neurons(w_in, w_out) for w_in, w_out in zip(done.best.W_in.detach(), done.best.W_out.detach(), strict=True)]
    claims = []
    for p, row in zip(_ABSOLUTE[:2], rows, strict=False):
        claims += [
            claim(
                f"absolute_mass_{p}",
                f"Computing |x| with dense features (p = {p}): each live neuron reads one feature (least share of its squared "
                "weight on one feature)",
                at_least(0.8),
                row.least,
                source=OWN,
                note=f"{row.live} live neurons; {row.clear:.3f} of them have .8 or more",
            ),
            claim(
                f"absolute_pairs_{p}",
                f"Each feature that is read has a neuron for x and one for −x, both with W_out > 0 (share of features, p = {p})",
                at_least(0.9),
                row.paired,
                source=ELHAGE,
                note=f"{row.features} features; {row.positive:.3f} of the live neurons have W_out > 0",
            ),
        ]
    figure = Lines(
        [Series("neurons with ≥ .8 on one feature", [row.clear for row in rows], x=[1 / p for p in _ABSOLUTE])],
        x_scale="log",
        x_label="1 / density",
        y_label="share of live neurons",
        title="Neurons that compute the absolute value of one feature",
    )
    cells: list[list[Cell]] = [
        [str(p), row.live, row.clear, row.features, row.paired, float(done.losses[i].min())]
        for i, (p, row) in enumerate(zip(_ABSOLUTE, rows, strict=True))
    ]
    columns = ["density", "live neurons", "of them ≥ .8 on one feature", "features read", "with both signs", "loss"]
    return Found("Computation in superposition", claims, [figure, _input_map(done.best.W_in[0]), Table(columns, cells)])


class Neurons:
    """What the hidden neurons of one absolute-value model do. A neuron is live if ‖W_in‖ ‖W_out‖ exceeds .1."""

    def __init__(self, w_in: Float[Tensor, "neuron feature"], w_out: Float[Tensor, "feature neuron"]) -> None:
        live = w_in.norm(dim=1) * w_out.norm(dim=0) > _LIVE
        share, top = shares(w_in)[live], w_in.abs().argmax(dim=1)[live]
        signs = w_in[live].gather(1, top[:, None])[:, 0].sign()
        out = w_out[:, live].gather(0, top[None])[0]
        self.live = int(live.sum())
        self.least = float(share.min()) if self.live else 0.0
        self.clear = float((share >= 0.8).float().mean()) if self.live else 0.0
        self.positive = float((out > 0).float().mean()) if self.live else 0.0
        read = set(top.tolist())
        both = [f for f in read if all(bool(((top == f) & (signs == sign) & (out > 0)).any()) for sign in (1.0, -1.0))]
        self.features, self.paired = len(read), len(both) / max(len(read), 1)


def _input_map(W_in: Float[Tensor, "neuron feature"]) -> Heatmap:
    """The neurons in the order of the features that they read."""
    W = W_in.detach()
    top = W.abs().argmax(dim=1)
    order = sorted(range(len(W)), key=lambda i: (int(top[i]), float(W[i, top[i]])))
    return Heatmap(
        W[order][:, :24],
        row_label="neuron",
        column_label="feature",
        value_label="W_in",
        diverging=True,
        title="|x|, p = 1: what each neuron reads (24 most important features)",
    )
