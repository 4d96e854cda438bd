"""`microtome harvest`: run a model over text and keep what flows at some hook points."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microtome.cli.data import TextOptions
from microtome.cli.options import lines
from microtome.common.device import DTypeName


@dataclass(frozen=True, kw_only=True)
class Options(TextOptions):
    """Write a model's activations at some hook points, over a corpus, as a store on disk."""

    hooks: tuple[str, ...]
    """Hook points, by name or glob: blocks.15.hook_resid_pre, 'blocks.*.hook_mlp_out'; spaces or commas between."""
    out: Path
    """The folder of the store."""
    store_dtype: DTypeName = "bf16"
    """The dtype on disk."""
    batch_tokens: int = 4096
    """Tokens in one forward pass."""
    shard_tokens: int = 131_072
    """Tokens in one file (fewer, where a GiB holds fewer); a stopped harvest loses at most the one in hand."""
    overwrite: bool = False
    """Replace the folder if it is there."""


def run(options: Options) -> dict[str, Any]:
    """Tokenize if need be, then harvest."""
    from microtome.activations import HarvestConfig, harvest
    from microtome.common.progress import Timer

    config = HarvestConfig(
        dtype=options.store_dtype, batch_tokens=options.batch_tokens, shard_tokens=options.shard_tokens
    )
    model = options.load_model()
    dataset = options.load_tokens(model, options.out)
    with Timer() as timer:
        store = harvest(model, dataset, options.hooks, options.out, config=config, overwrite=options.overwrite)
    return {
        "out": str(store.path),
        "hook_points": list(store.hook_names),
        "tokens": store.n_tokens,
        "shards": len(store.shards),
        "bytes": sum(shard.bytes for shard in store.shards),
        "seconds": round(timer.seconds, 2),
    }


def show(result: dict[str, Any]) -> str:
    """Where the store is and what is in it."""
    return lines(result)
