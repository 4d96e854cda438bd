"""From what the index answers to what goes over the wire."""

from microtome.common.artifacts import PROVENANCE, read_json
from microtome.features import FeatureIndex
from microtome.features.results import Example, Feature, FeatureRow, IndexSummary, PromptFeatures, TokenEffect
from microtome.web import schemas
from microtome.web.glance import Glances

NEURONPEDIA = "https://www.neuronpedia.org"


def summary(index: FeatureIndex) -> schemas.Summary:
    """The index's summary with its provenance."""
    s: IndexSummary = index.summary
    edges, counts = s.density_histogram
    provenance = read_json(index.path / PROVENANCE) if (index.path / PROVENANCE).exists() else {}
    return schemas.Summary(
        model=s.model,
        dictionary=s.dictionary,
        hook_name=s.hook_name,
        layers=list(s.layers),
        architecture=s.architecture,
        d_in=s.d_in,
        d_sae=s.d_sae,
        k=s.k,
        dataset=s.dataset,
        n_tokens=s.n_tokens,
        n_sequences=s.n_sequences,
        context=s.context,
        n_alive=s.n_alive,
        n_dead=s.n_dead,
        metrics=s.metrics,
        density_histogram=schemas.Histogram(edges=edges, counts=counts),
        fingerprint=s.fingerprint,
        neuronpedia=neuronpedia_address(s.neuronpedia),
        provenance=provenance,
    )


def neuronpedia_address(release: str | None, feature: int | None = None) -> str | None:
    """The page of a release (`model/source`, or its full address) or of one of its features."""
    if not release:
        return None
    page = release if release.startswith(f"{NEURONPEDIA}/") else f"{NEURONPEDIA}/{release.strip('/')}"
    return page if feature is None else f"{page.rstrip('/')}/{feature}"


def row(r: FeatureRow, glances: Glances) -> schemas.FeatureRow:
    """One line of the list."""
    return schemas.FeatureRow(
        feature=r.feature,
        layer=r.layer,
        count=r.count,
        n_sequences=r.n_sequences,
        density=r.density,
        mean=r.mean,
        std=r.std,
        max=r.max,
        top_token=r.top_token_string if r.top_token >= 0 else None,
        promotes=glances[r.feature].promotes,
    )


def feature(found: Feature, index: FeatureIndex, glances: Glances) -> schemas.Feature:
    """A feature's page. Its neighbours carry their own top token, so that a link says where it leads."""
    top = schemas.Band(kind="top", band=-1, sampled=found.n_top, of=found.row.n_sequences, low=0.0, high=found.row.max)
    lower = [
        schemas.Band(kind="sample", band=b.band, sampled=b.sampled, of=b.of, low=b.low, high=b.high)
        for b in reversed(found.bands)
    ]
    return schemas.Feature(
        row=row(found.row, glances),
        histogram=schemas.Histogram(edges=found.histogram.edges, counts=found.histogram.counts),
        top_logits=effects(found.top_logits),
        bottom_logits=effects(found.bottom_logits),
        neighbours=[
            schemas.Neighbour(feature=n.feature, cosine=n.cosine, top_token=glances[n.feature].top_token)
            for n in found.neighbours
        ],
        encoder_norm=found.row.encoder_norm,
        decoder_norm=found.row.decoder_norm,
        bias=found.row.bias,
        bands=[top, *lower] if found.row.alive else [],
        neuronpedia=neuronpedia_address(index.summary.neuronpedia, found.row.feature),
    )


def effects(logits: list[TokenEffect]) -> list[schemas.Logit]:
    """Tokens with the feature's effect on them."""
    return [schemas.Logit(token=e.string, value=e.value) for e in logits]


def example(e: Example) -> schemas.Example:
    """One window of text."""
    return schemas.Example(
        value=e.value,
        band=e.band,
        sequence=e.sequence,
        position=e.position,
        start=e.start,
        peak=e.peak,
        tokens=e.tokens,
        token_ids=e.token_ids,
        activations=e.activations,
        document=e.document,
    )


def encoded(found: PromptFeatures, bos_id: int | None, k: int, seconds: float, glances: Glances) -> schemas.Encoded:
    """What fires on a text, at most `k` features a token; and those features, the highest peak first."""
    firings = [features[:k] for features in found.features]
    best: dict[int, tuple[float, int, int]] = {}
    for at, features in enumerate(firings):
        for i, value in features:
            peak, place, n = best.get(i, (0.0, at, 0))
            best[i] = (value, at, n + 1) if value > peak else (peak, place, n + 1)
    order = sorted(best, key=lambda i: (-best[i][0], i))
    return schemas.Encoded(
        tokens=found.tokens,
        firings=[[schemas.Firing(feature=i, value=v) for i, v in features] for features in firings],
        features=[fired(i, *best[i], glances) for i in order],
        skipped=int(bool(found.token_ids) and found.token_ids[0] == bos_id),
        seconds=seconds,
    )


def fired(feature: int, peak: float, at: int, n_tokens: int, glances: Glances) -> schemas.FiredFeature:
    """A feature that fires on `n_tokens` tokens of a text, most on token `at`."""
    glance = glances[feature]
    return schemas.FiredFeature(
        feature=feature,
        layer=glance.layer,
        peak=peak,
        at=at,
        n_tokens=n_tokens,
        max=glance.max,
        density=glance.density,
        top_token=glance.top_token,
        promotes=glance.promotes,
    )
