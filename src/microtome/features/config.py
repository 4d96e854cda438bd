"""What an index is asked to hold (`IndexConfig`) and what is written about one (`IndexRecord`, saved as its config)."""

from dataclasses import dataclass, field
from typing import Any

from microtome.common.config import require

KIND = "feature_index"
BINS = 64
BINS_PER_OCTAVE = 4
OCTAVES = BINS // BINS_PER_OCTAVE


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """How much to keep of each latent, and how the pass over the tokens goes.

    An example is a window of `window` tokens around the position where a latent peaks in a sequence. `top` counts the
    examples with the highest peaks; beside them, the sequences in which the latent fires are split into `bands` by
    their peak (each a factor of two, the lowest takes all that is weaker), and `per_band` of each are drawn uniformly.
    """

    top: int = 20
    bands: int = 5
    per_band: int = 5
    window: int = 32
    before: int | None = None
    """Window tokens before the peak; None: three quarters, since what a latent answers to stands before it."""
    logits: int = 10
    neighbours: int = 10
    histogram_top: int | None = None
    """The histogram ends at 2**histogram_top and covers 16 octaves; None: chosen from the first batch."""
    sink_norm: float | None = None
    """Text tokens whose activation is longer than this are attention sinks: like the BOS they are neither encoded nor
    counted. None: ten times the median length in the first batch; 0: none is left out."""
    seed: int = 0
    batch: int = 16
    """Sequences for one forward pass."""
    checkpoint_every: int = 1024
    """Sequences between two checkpoints of the pass; a killed build goes on from the last one. 0: none."""

    def __post_init__(self) -> None:
        for name in ("top", "bands", "window", "logits", "batch"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", got=getattr(self, name))
        for name in ("per_band", "neighbours", "checkpoint_every"):
            require(getattr(self, name) >= 0, f"{name} cannot be negative", got=getattr(self, name))
        require(self.bands <= OCTAVES, "There are too many bands", got=self.bands, expected=f"at most {OCTAVES}")
        require(self.top <= 10_000 and self.per_band <= 10_000, "top and per_band are at most 10,000")
        before = self.lead
        require(0 <= before < self.window, "before must lie in the window", got=before, expected=f"0…{self.window - 1}")
        require(self.sink_norm is None or self.sink_norm >= 0, "sink_norm cannot be negative", got=self.sink_norm)
        if self.histogram_top is not None:
            require(abs(self.histogram_top) <= 100, "histogram_top is an exponent of two", got=self.histogram_top)

    @property
    def lead(self) -> int:
        """Window tokens before the peak."""
        return self.window * 3 // 4 if self.before is None else self.before


@dataclass(frozen=True, kw_only=True)
class PointLatents:
    """So many latents read the point `name`, which lies in this block (None: in no block)."""

    name: str
    layer: int | None
    n_latents: int


@dataclass(frozen=True, kw_only=True)
class IndexRecord:
    """What an index is of: with the token dataset and the weights, this determines every byte of its Parquet files."""

    model: str
    dictionary: str
    """Where the dictionary came from: what `load_dictionary_or_set` takes."""
    dictionary_fingerprint: str
    hook_name: str
    """The point that the latents read; of several a short form of all: `blocks.{10,11}.hook_resid_mid`."""
    d_in: int
    d_sae: int
    k: int | None
    architecture: str
    dataset: str
    dataset_fingerprint: str
    n_sequences: int
    context: int
    bos_id: int | None
    layers: tuple[PointLatents, ...] = ()
    """Of a dictionary whose latents read one of several points each (a cross-layer transcoder, a set): the points in the
    order of their latents. Empty where all latents read the same."""
    neuronpedia: str | None = None
    activations: dict[str, Any] = field(default_factory=dict)
    """Where the activations were from: the model's revision and dtype, or the store."""
    histogram_edges: tuple[float, ...] = field(default=())
    """Edges of the histogram's bins, weakest first; the first and last bin also take what lies beyond them."""
    settings: IndexConfig = field(default_factory=IndexConfig)


def histogram_edges(top: int) -> tuple[float, ...]:
    """The 65 edges of the histogram that ends at 2**top: four bins an octave."""
    return tuple(float(2.0 ** (top - OCTAVES + i / BINS_PER_OCTAVE)) for i in range(BINS + 1))
