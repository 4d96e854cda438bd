"""The claims and sections of `towards_monosemanticity`."""

from dataclasses import dataclass

import numpy as np
import torch

from microtome.common.device import generator
from microtome.replications.frame import Found, claim
from microtome.replications.monosemanticity_measures import Clusters, Kind, density_clusters
from microtome.replications.monosemanticity_tables import (
    TOP,
    Contexts,
    Specificity,
    chance_greater,
    direct_logits,
    specificity,
    strings_of,
)
from microtome.replications.monosemanticity_training import MonosemanticityConfig, Subject
from microtome.views import Claim, Lines, Series, Table, at_least, at_most, near
from microtome.views.report import Cell, Part

_BRICKEN, _HOME, _OWN = "Bricken et al. 2023", "home reproduction: 74.0 % at L0 21", "proposed here"
_PROXIES = ("top_share", "entropy", "explained")


@dataclass(frozen=True)
class Study:
    """Everything measured. `specific` is of the features, then of the neurons."""

    config: MonosemanticityConfig
    subject: Subject
    features: Kind
    neurons: Kind
    specific: tuple[Specificity, ...]

    @property
    def kinds(self) -> tuple[Kind, Kind]:
        return self.features, self.neurons

    def drawn(self, n: int) -> list[int]:
        """`n` random features with enough firings, in their order."""
        enough = np.flatnonzero(self.features.firings.counts >= TOP)
        order = torch.randperm(len(enough), generator=generator(self.config.seed, "shown")).numpy()
        return [int(i) for i in np.sort(enough[order[:n]])]


def model_section(study: Study) -> Found:
    """The model: that it learned, and that its MLP matters."""
    lost, unigram = study.neurons.losses, unigram_loss(study.subject)
    claims = [
        claim(
            "learned",
            "The model knows more than how frequent tokens are (the loss of who knows only that, less the model's)",
            at_least(0.5),
            unigram - lost.clean,
            source=_OWN,
            note=f"{unigram:.3f} and {lost.clean:.3f} nats on held-out text",
        ),
        claim(
            "mlp_matters",
            "The MLP matters: what its activations at zero cost, in nats. A share recovered of less says nothing",
            at_least(0.05),
            lost.zero - lost.clean,
            source=_OWN,
        ),
        claim(
            "neurons_exact",
            "The neurons as a dictionary give back the model itself (difference of losses)",
            near(0, 1e-4),
            lost.spliced - lost.clean,
            source="by definition",
        ),
    ]
    rows: list[list[Cell]] = [
        ["as it is", lost.clean],
        ["MLP activations at their mean", lost.mean],
        ["MLP activations at zero", lost.zero],
        ["token frequencies alone", unigram],
    ]
    c = study.subject.model.config
    text = (
        f"{c.n_layers} layer{'s' if c.n_layers > 1 else ''}, d_model {c.d_model}, {c.n_heads} heads, "
        f"{study.features.dictionary.d_in} neurons, {c.d_vocab:,} tokens. Attention has an output matrix "
        f"and divides its scores by √d_head = {c.d_head**0.5:.2f}. Losses are means over {lost.n_tokens:,} "
        f"held-out tokens of {study.config.corpus}."
    )
    return Found("The model", claims, [text, Table(["", "loss in nats"], rows)])


def dictionary_section(study: Study) -> Found:
    """The dictionary against the neurons, and the densities of its latents."""
    features, lost, unigram = study.features, study.features.losses, unigram_loss(study.subject)
    norms = features.dictionary.W_dec.norm(dim=1)
    claims = [
        claim(
            "recovered",
            "The share of the loss recovered by the reconstruction, against activations at zero",
            at_least(study.config.recovered),
            lost.recovered_zero,
            source=f"{_BRICKEN} (79 %); {_HOME}",
            note=f"{lost.clean:.3f} as it is, {lost.spliced:.3f} reconstructed, {lost.zero:.3f} at zero",
        ),
        claim("l0", "Features that fire on a token", at_most(25), features.firings.l0, source=f"{_BRICKEN} (10 to 20)"),
        claim(
            "kept",
            "Of what the model knows beyond token frequencies, the share that is kept (zeros can cost more than that)",
            at_least(study.config.recovered),
            (unigram - lost.spliced) / (unigram - lost.clean),
            source=_OWN,
        ),
        claim(
            "norms",
            "Every decoder row (a feature's direction) has norm 1 (largest difference)",
            at_most(1e-5),
            float((norms - 1).abs().max()),
            source=_BRICKEN,
        ),
        claim(
            "dead",
            "Features that fire nowhere in the text looked at (share)",
            at_most(0.25),
            features.dead / features.dictionary.d_sae,
            source=f"{_BRICKEN} (168 of 4,096 in 10 million tokens)",
            note=f"{features.dead} of {features.dictionary.d_sae} in {features.firings.n_tokens:,} tokens",
        ),
    ]
    rows: list[list[Cell]] = [
        [
            f"{kind.name}s",
            kind.dictionary.d_sae,
            kind.firings.l0,
            kind.losses.spliced - kind.losses.clean,
            kind.losses.recovered_zero,
            kind.losses.recovered_mean,
            kind.dead,
            float(np.median(kind.firings.density)),
        ]
        for kind in study.kinds
    ]
    columns = ["", "latents", "L0", "added loss", "recovered (zero)", "recovered (mean)", "dead", "median density"]
    clusters = {kind.name: density_clusters(kind.firings.density) for kind in study.kinds}
    parts: list[Part] = [Table(columns, rows), _density_lines(study), _clusters_table(clusters), _CLUSTERS]
    return Found("The dictionary", claims, parts)


_CLUSTERS = (
    "Two Gaussians are fitted to log₁₀ of the densities of the latents that fire. They count as two clusters where the Bayesian "
    "information criterion prefers two by more than 10 and they stand apart (Ashman's D above 2). Bricken et al. describe a "
    "cluster of ultralow density beside the interpretable one; a text of n tokens cannot show densities below 1/n."
)


def _density_lines(study: Study) -> Lines:
    edges = np.linspace(-6, 0, 49)
    series = []
    for kind in study.kinds:
        alive = kind.firings.density[kind.firings.density > 0]
        counts, _ = np.histogram(np.log10(alive), edges)
        series.append(Series(f"{kind.name}s", counts / kind.dictionary.d_sae, x=(edges[:-1] + edges[1:]) / 2))
    return Lines(
        series,
        title="How often latents fire",
        x_label="log₁₀ of the share of tokens",
        y_label="share of latents",
    )


def _clusters_table(clusters: dict[str, Clusters | None]) -> Table:
    rows: list[list[Cell]] = []
    for name, found in clusters.items():
        if found is None:
            rows.append([f"{name}s", "too few", *[None] * 5])
            continue
        parts = zip(found.shares, found.means, found.spreads, strict=True)
        texts = [f"{share:.0%} at {mean:.2f} ± {spread:.2f}" for share, mean, spread in parts]
        rows.append([f"{name}s", "yes" if found.two else "no", *texts, found.separation, found.gain, None])
    columns = ["", "two clusters", "sparser", "denser", "Ashman's D", "gain in BIC", ""]
    return Table(columns[:-1], [row[:-1] for row in rows], caption="log₁₀ of densities")


# ---- specificity ----------------------------------------------------------------------------------------------------------


def specificity_section(study: Study) -> Found:
    """The proxies of features and of neurons; and of neurons cut to the features' density, since rare things are specific."""
    firings = study.neurons.firings
    counts = study.features.firings.counts[study.specific[0].latents]
    n = max(TOP, int(np.median(counts))) if len(counts) else TOP
    cut = specificity(firings.strongest(n))
    kinds = {"features": study.specific[0], "neurons": study.specific[1], f"neurons, strongest {n} firings": cut}
    claims = [
        _more_specific(study.specific[0], other, name, words, study.config.specific)
        for name, other, words in (
            ("specific", study.specific[1], "A feature's activation is on fewer tokens than a neuron's"),
            ("specific_cut", cut, f"… also than that of a neuron whose {n} strongest firings alone are kept"),
        )
    ]
    rows: list[list[Cell]] = [
        [name, len(one.latents), *(float(np.median(getattr(one, proxy))) for proxy in _PROXIES)]
        for name, one in kinds.items()
        if len(one.latents)
    ]
    chances: list[list[Cell]] = [
        [proxy.replace("_", " "), *(_better(kinds["features"], one, proxy) for one in list(kinds.values())[1:])]
        for proxy in _PROXIES
    ]
    text = (
        f"Latents with at least {TOP} firings. “top share”: of the {TOP} strongest firings, the share on their most frequent "
        "token. “entropy”: bits of the tokens on which a latent fires, weighted by activation. “explained”: the share of its "
        "variance that one token explains. These are proxies: a latent for one token does well on all of them, one "
        "for a wider idea on none. The blind comparison (the setting `sheets`) is for a reader's judgement."
    )
    parts: list[Part] = [
        text,
        Table(["", "latents", "median top share", "median entropy", "median explained"], rows),
        Table(
            ["proxy", *list(kinds)[1:]],
            chances,
            caption="The chance that a random feature is more specific than a random one of these",
        ),
    ]
    return Found("Specificity", claims, parts)


def _better(one: Specificity, other: Specificity, proxy: str) -> float:
    """The chance that one of the first is more specific (less entropy is more specific); NaN where there are none."""
    sign = -1 if proxy == "entropy" else 1
    first, second = getattr(one, proxy), getattr(other, proxy)
    return chance_greater(sign * first, sign * second) if len(first) and len(second) else float("nan")


def _more_specific(features: Specificity, other: Specificity, name: str, words: str, least: float) -> Claim:
    none = not len(features.latents) or not len(other.latents)
    chance = None if none else _better(features, other, "entropy")
    return claim(
        name,
        f"{words} (chance that a random one has less entropy)",
        at_least(least),
        chance,
        unless=f"no latent fires {TOP} times in this text" if none else "",
        source=_OWN,
    )


def feature_section(study: Study) -> Found:
    """Some features, drawn at random: no claim."""
    latents = study.drawn(min(study.config.shown, 12))
    contexts = Contexts(study.features.firings, strings_of(study.subject.model))
    effects = direct_logits(study.subject.model, study.subject.dictionary, latents, 5) if latents else []
    rows: list[list[Cell]] = []
    for latent, (raised, _) in zip(latents, effects, strict=True):
        best = contexts.top(latent, 1)[0]
        rows.append(
            [
                latent,
                float(study.features.firings.density[latent]),
                " ".join(f"{token} {share:.0%}" for token, share in contexts.tokens(latent, 3)),
                f"{best.before}«{best.token}»{best.behind}",
                " ".join(contexts.strings.one(token) for token in raised),
            ]
        )
    columns = ["feature", "density", "activation is on", "strongest context", "raises the logits of"]
    return Found("Features, drawn at random", [], [Table(columns, rows)])


def unigram_loss(subject: Subject) -> float:
    """The loss on held-out text, in nats, of a model that knows how frequent each token was in training (each counted once
    more than it came)."""
    counts = np.bincount(subject.data.tokens.reshape(-1), minlength=subject.model.config.d_vocab) + 1
    held_out = subject.held_out.tokens
    text = held_out[~np.isin(held_out, subject.held_out.special_ids)]
    return -float(np.log(counts[text] / counts.sum()).mean())
