"""What an index answers with. Token strings are for display: ↵ for a line end, ⟨F0 9F⟩ for a piece of a character."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class FeatureRow:
    """The statistics of one latent. `mean` and `std` are those of its firings; `density` = firings / tokens counted."""

    feature: int
    layer: int | None = None
    """The block that the latent reads, where the latents of the index read different ones."""
    count: int
    n_sequences: int
    density: float
    mean: float
    std: float
    max: float
    top_token: int
    """The token with the most activation in the windows of the top examples; −1 for a latent that never fired."""
    top_token_string: str
    encoder_norm: float
    decoder_norm: float
    bias: float

    @property
    def alive(self) -> bool:
        return self.count > 0


@dataclass(frozen=True)
class TokenEffect:
    """How much a latent of activation 1 moves a token's logit directly, relative to the mean over the vocabulary."""

    token: int
    string: str
    value: float


@dataclass(frozen=True)
class Neighbour:
    feature: int
    cosine: float


@dataclass(frozen=True)
class Band:
    """A stratum of the sequences in which a latent fires: those that peak in [low, high), `of` in all."""

    band: int
    low: float
    high: float
    sampled: int
    """How many are among the samples; others of the band may be among the top examples."""
    of: int


@dataclass(frozen=True)
class Histogram:
    """`counts[i]` firings lie between `edges[i]` and `edges[i + 1]`."""

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True, kw_only=True)
class Feature:
    """All that the index holds of one latent, but its examples (`FeatureIndex.examples`)."""

    row: FeatureRow
    histogram: Histogram
    top_logits: list[TokenEffect]
    bottom_logits: list[TokenEffect]
    neighbours: list[Neighbour]
    bands: list[Band]
    n_top: int
    """Top examples kept, of `row.n_sequences`."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A window of text around the position where a latent peaks in one sequence.

    `activations` has one value a token of the window, 0 where the latent is silent; `peak` is the strongest one's place
    in the window, `position` the same in the sequence. `band` is −1 for a top example.
    """

    feature: int
    kind: str
    band: int
    rank: int
    value: float
    sequence: int
    position: int
    start: int
    peak: int
    token_ids: list[int]
    tokens: list[str]
    activations: list[float]
    document: str | None


@dataclass(frozen=True)
class FeaturePage:
    """Some rows of a list of `total`."""

    total: int
    rows: list[FeatureRow]


@dataclass(frozen=True, kw_only=True)
class IndexSummary:
    """What an index is of, and its totals. `density_histogram` is (edges, counts) over the latents alive."""

    model: str
    dictionary: str
    hook_name: str
    d_in: int
    d_sae: int
    k: int | None
    architecture: str
    dataset: str
    n_tokens: int
    n_sequences: int
    context: int
    n_alive: int
    n_dead: int
    density_histogram: tuple[list[float], list[int]]
    fingerprint: str
    neuronpedia: str | None
    layers: tuple[int, ...] = ()
    """The blocks that latents read, where these are several: what lists can be filtered by."""
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptFeatures:
    """`features[i]` are the (latent, value) pairs that fire on token i, strongest first; none on a BOS token."""

    tokens: list[str]
    token_ids: list[int]
    features: list[list[tuple[int, float]]]
