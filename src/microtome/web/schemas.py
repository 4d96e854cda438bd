"""The API's vocabulary: what each endpoint answers. `scripts/client_types.py` turns these classes into the client's TypeScript.

Token texts are display strings: they come from the index's tokenizer and may hold any character. The client shows them as text.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Wire(BaseModel):
    """Base of everything on the wire: closed, so that a misspelt field is an error on both sides."""

    model_config = ConfigDict(extra="forbid")


class Histogram(Wire):
    """`counts[i]` things lie between `edges[i]` and `edges[i + 1]`; one edge more than counts."""

    edges: list[float]
    counts: list[int]


class Summary(Wire):
    """What was indexed: the model, the dictionary on it, the text, and how good the dictionary is. `layers`: the blocks that
    its features read, where these are several."""

    model: str
    dictionary: str
    hook_name: str
    layers: list[int]
    architecture: str
    d_in: int
    d_sae: int
    k: int | None
    dataset: str
    n_tokens: int
    n_sequences: int
    context: int
    n_alive: int
    n_dead: int
    metrics: dict[str, float]
    density_histogram: Histogram
    fingerprint: str
    neuronpedia: str | None
    provenance: dict[str, Any]


class FeatureRow(Wire):
    """One line of the feature list. `density` is firings per token; `promotes` are the tokens it pushes up most; `layer` is
    the block that it reads, where features read different ones."""

    feature: int
    layer: int | None
    count: int
    n_sequences: int
    density: float
    mean: float
    std: float
    max: float
    top_token: str | None
    promotes: list[str]


class FeaturePage(Wire):
    """Rows `offset` to `offset + len(rows)` of the `total` that fit the filters."""

    total: int
    offset: int
    rows: list[FeatureRow]


class Logit(Wire):
    """A token and the feature's direct effect on its logit, per unit of activation."""

    token: str
    value: float


class Neighbour(Wire):
    """A feature whose decoder row points the same way."""

    feature: int
    cosine: float
    top_token: str | None


class Band(Wire):
    """One set of examples: the strongest (`band` −1), or a uniform sample of one stratum, where 0 is the weakest.

    `sampled` examples are kept, of `of` sequences whose peak lies in [low, high).
    """

    kind: Literal["top", "sample"]
    band: int
    sampled: int
    of: int
    low: float
    high: float


class Feature(Wire):
    """Everything on a feature's page but its examples. `neuronpedia` is the address of its page there, if it has one."""

    row: FeatureRow
    histogram: Histogram
    top_logits: list[Logit]
    bottom_logits: list[Logit]
    neighbours: list[Neighbour]
    encoder_norm: float
    decoder_norm: float
    bias: float
    bands: list[Band]
    neuronpedia: str | None


class Example(Wire):
    """A window of text. `activations[i]` belongs to `tokens[i]`; `peak` is the place of the strongest."""

    value: float
    band: int
    sequence: int
    position: int
    start: int
    peak: int
    tokens: list[str]
    token_ids: list[int]
    activations: list[float]
    document: str | None


class ExamplePage(Wire):
    """Examples `offset` to `offset + len(examples)` of the `total` stored ones of this kind and band."""

    total: int
    offset: int
    examples: list[Example]


class Firing(Wire):
    """A feature and how strongly it fires on one token."""

    feature: int
    value: float


class FiredFeature(Wire):
    """A feature that fires somewhere in the text, with enough to recognise it."""

    feature: int
    layer: int | None
    peak: float
    at: int
    n_tokens: int
    max: float
    density: float
    top_token: str | None
    promotes: list[str]


class Encoded(Wire):
    """The text's tokens, what fires on each (strongest first), and those features, the strongest in the text first.

    `skipped` tells how many leading tokens (the beginning-of-sequence token) are never counted.
    """

    tokens: list[str]
    firings: list[list[Firing]]
    features: list[FiredFeature]
    skipped: int
    seconds: float = Field(description="what the model and the encoder took")


class EncodeRequest(Wire):
    """A text to look at, and how many features to list for each token."""

    text: str = Field(min_length=1)
    k: int = Field(default=32, ge=1, le=128)


class EncoderState(Wire):
    """Whether texts can be encoded here. `reason` says why not, and what to do."""

    status: Literal["ready", "not loaded", "loading", "unavailable"]
    reason: str | None
    max_characters: int
    max_tokens: int
    waiting: int


class Health(Wire):
    """That the server is up, which index it serves, and whether it can encode."""

    version: str
    fingerprint: str
    encoder: EncoderState


class Problem(Wire):
    """An error. `message` is complete by itself; the other fields are its parts."""

    kind: str
    message: str
    what: str
    got: str | None
    expected: str | None
    fix: str | None
