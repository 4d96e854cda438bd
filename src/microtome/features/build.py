"""`build_index`: one pass of a model and a dictionary over a token dataset, then the tables.

1. Each batch of sequences runs to the dictionary's hook point; text tokens are encoded (BOS, separators and attention
   sinks are neither encoded nor counted), and the sparse codes go into the `FeatureSummary`.
2. Now and then the summary is saved in the draft folder. A build that was killed goes on from there, on the same
   batches, and ends with the same bytes as one that was not.
3. Logit effects and neighbours are computed from the weights, the tables are written, and the folder appears by one
   rename.
"""

import dataclasses
import math
import zipfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int32
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from microtome.activations import ActivationStore, ModelSource, StoreSource
from microtome.activations.source import side_by_side
from microtome.common.artifacts import Draft, atomic_file, draft, read_head, read_json, write_json
from microtome.common.config import JsonObject, difference, from_dict, to_dict
from microtome.common.errors import ArtifactError, InputError, ModelError
from microtome.common.progress import progress
from microtome.dictionary import DictionaryOrSet
from microtome.dictionary.fit import check_fit
from microtome.dictionary.formats import CFG
from microtome.dictionary.surface import ContextDictionary, latents_by_input
from microtome.features.config import KIND, IndexConfig, IndexRecord, PointLatents, histogram_edges
from microtome.features.index import FeatureIndex, open_index
from microtome.features.summary import FeatureSummary
from microtome.features.weights import check_signs, check_widths, weight_facts
from microtome.features.write import DocumentOf, write_tables
from microtome.model import HookedModel, HookName
from microtome.text import TokenDataset

_CHECKPOINT = "state.npz"
_HEADROOM = 3  # octaves between the strongest activation of the first batch and the end of the histogram
_SINK = 10.0  # times the median length of an activation: those of sinks are a hundred times as long

Codes = tuple[Int32[np.ndarray, "token k"], Float32[np.ndarray, "token k"], Bool[np.ndarray, " text"]]


def build_index(
    model: HookedModel,
    sae: DictionaryOrSet,
    dataset: TokenDataset,
    out: str | Path,
    *,
    config: IndexConfig | None = None,
    store: ActivationStore | None = None,
    metrics: Mapping[str, float] | None = None,
    overwrite: bool = False,
) -> FeatureIndex:
    """Write the feature index of `sae` over `dataset` at `out`, and open it. Of a dictionary that reads several points (a
    crosscoder, a cross-layer transcoder, a set) all latents are in it, under the numbers that they have in its codes.

    With `store` (a harvest of the same model and dataset) the activations are read from it, and the model is not run.
    `metrics` are numbers about the dictionary that the index shows. Goes on with a build that was stopped, and simply
    opens one that is complete and was made with the same settings.

    Raises ConfigError or ModelError when the dictionary does not fit the model, has codes below zero, or is a set with
    outputs of several widths, InputError when the store is of other data, ArtifactError when `out` holds, or was begun
    with, other settings (each difference is named).
    """
    check_signs(sae)
    check_fit(model, sae)
    check_widths(sae)
    tokenizer = _tokenizer(model)
    pass_ = _Pass(model, sae, dataset, config or IndexConfig(), store)
    out = Path(out)
    if out.exists() and not overwrite:
        return _open_same(out, pass_.record)
    made = draft(out, KIND, to_dict(pass_.record), overwrite=overwrite, resume=True)
    summary = pass_.run(made)
    write_tables(made.folder, summary, weight_facts(model, sae, pass_.config), dataset.tokens, _documents(dataset))
    with atomic_file(made.folder / "tokenizer.json") as temporary:
        tokenizer.backend_tokenizer.save(str(temporary))
    counts = {"n_tokens": summary.n_tokens, "n_sinks": pass_.n_text_tokens - summary.n_tokens}
    write_json(made.folder / "summary.json", counts | {"n_sequences": dataset.n_sequences})
    if metrics:
        write_json(made.folder / "metrics.json", metrics)
    (made.folder / _CHECKPOINT).unlink(missing_ok=True)
    made.publish(overwrite=overwrite, dataset=str(dataset.path))
    return open_index(out)


class _Pass:
    """The pass over the tokens, and the record of what determines its result."""

    def __init__(
        self,
        model: HookedModel,
        sae: DictionaryOrSet,
        dataset: TokenDataset,
        config: IndexConfig,
        store: ActivationStore | None,
    ) -> None:
        self.model, self.sae, self.dataset = model, sae, dataset
        if store is not None:
            _check_store(store, model, dataset)
            self.source: StoreSource | ModelSource = StoreSource(
                store, sae.origin.inputs, sequences_per_block=config.batch
            )
        else:
            self.source = ModelSource(model, dataset, sae.origin.inputs, sequences_per_block=config.batch)
        if config.sink_norm is None:
            lengths = self.source.read(0).float().norm(dim=1)
            config = dataclasses.replace(config, sink_norm=_SINK * float(lengths.median()) if len(lengths) else 0.0)
        self.config = config
        if config.histogram_top is None:
            strongest = float(self.codes(0)[1].max(initial=0.0))
            self.config = dataclasses.replace(config, histogram_top=math.frexp(strongest or 1.0)[1] + _HEADROOM)

    @property
    def record(self) -> IndexRecord:
        top = self.config.histogram_top
        assert top is not None
        return IndexRecord(
            model=self.model.name,
            dictionary=str(self.sae.path),
            dictionary_fingerprint=self.sae.fingerprint,
            hook_name=short_name(self.sae.origin.inputs),
            d_in=self.sae.d_in,
            d_sae=self.sae.d_sae,
            k=self.sae.k,
            architecture=self.sae.architecture,
            dataset=str(self.dataset.config["corpus"]),
            dataset_fingerprint=self.dataset.fingerprint,
            n_sequences=self.dataset.n_sequences,
            context=self.dataset.context,
            bos_id=self.dataset.bos_id,
            layers=tuple(
                PointLatents(name=name, layer=HookName.parse(name).layer, n_latents=latents.stop - latents.start)
                for name, latents in latents_by_input(self.sae)
            ),
            neuronpedia=_neuronpedia(self.sae),
            activations=self.source.describe(),
            histogram_edges=histogram_edges(top),
            settings=self.config,
        )

    @torch.inference_mode()
    def codes(self, block: int) -> Codes:
        """The sparse codes of a block's text tokens, on the CPU, and which of these are no attention sinks: those alone
        are encoded."""
        weight, rows = next(self.sae.parameters()), self._rows(block)
        near = rows[:, : self.sae.d_in].float().norm(dim=1) <= (self.config.sink_norm or math.inf)
        codes = self.sae.encode(rows[near].to(weight.device, weight.dtype))
        indices, values = codes.indices.to("cpu", torch.int32), codes.values.to("cpu", torch.float32)
        return indices.numpy(), values.numpy(), near.cpu().numpy()

    def _rows(self, block: int) -> Float[Tensor, "row d_row"]:
        """What the dictionary's `encode` takes, of a block's text tokens."""
        if not isinstance(self.sae, ContextDictionary):
            return self.source.read(block)
        parts, is_text = self.source.sequences(block)
        weight = next(self.sae.parameters())
        rows = self.sae.in_context(side_by_side(parts).to(weight.device, weight.dtype))
        return rows[is_text.to(rows.device)]

    def run(self, made: Draft) -> FeatureSummary:
        """Go over all blocks that the checkpoint in the draft has not seen."""
        summary = self._begin(made.folder / _CHECKPOINT)
        first = summary.covered[0][1] if summary.covered else 0
        saved = first
        with progress(self.dataset.n_tokens, f"index {self.model.name}", "tokens") as bar:
            bar.advance(first * self.dataset.context)
            for block in range(first // self.config.batch, self.source.n_blocks):
                start = block * self.config.batch
                tokens = self.dataset.batch(start, min(start + self.config.batch, self.dataset.n_sequences))
                counted = self._text(tokens)
                indices, values, near = self.codes(block)
                counted[counted] = near
                summary.update(start, tokens, counted, indices, values)
                bar.advance(counted.size)
                seen = start + len(counted)
                if self.config.checkpoint_every and seen - saved >= self.config.checkpoint_every:
                    _save(summary, made.folder / _CHECKPOINT)
                    saved = seen
        return summary

    def _text(self, tokens: Int[np.ndarray, "sequence position"]) -> Bool[np.ndarray, "sequence position"]:
        """Where the tokens are text: neither BOS nor separator."""
        return np.isin(tokens, self.dataset.special_ids, invert=True)

    @property
    def n_text_tokens(self) -> int:
        step = 4096
        blocks = (
            self.dataset.batch(i, min(i + step, self.dataset.n_sequences))
            for i in range(0, self.dataset.n_sequences, step)
        )
        return sum(int(self._text(tokens).sum()) for tokens in blocks)

    def _begin(self, checkpoint: Path) -> FeatureSummary:
        if not checkpoint.exists():
            return FeatureSummary(self.sae.d_sae, self.dataset.context, self.config)
        try:
            with checkpoint.open("rb") as file, np.load(file, allow_pickle=False) as saved:
                return FeatureSummary.from_arrays(dict(saved), self.dataset.context, self.config)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ArtifactError(
                f"The checkpoint {checkpoint} is damaged: {error}", fix=f"Remove {checkpoint.parent} to start anew"
            ) from error


def short_name(names: Sequence[str]) -> str:
    """Several hook points in one line: `blocks.{10,11}.hook_resid_mid` where only the block differs."""
    parsed = [HookName.parse(name) for name in names]
    layers = [str(name.layer) for name in parsed if name.layer is not None]
    points = {name.removeprefix(f"blocks.{at.layer}.") for name, at in zip(names, parsed, strict=True)}
    if len(names) == 1 or len(points) > 1 or len(layers) < len(names):
        return ", ".join(names)
    return f"blocks.{{{','.join(layers)}}}.{points.pop()}"


def _neuronpedia(sae: DictionaryOrSet) -> str | None:
    """The dictionary's id on Neuronpedia, where its release says that it is there."""
    if not (sae.path / CFG).exists():
        return None
    found = (read_json(sae.path / CFG).get("metadata") or {}).get("neuronpedia_id")
    return None if found is None else str(found)


def _save(summary: FeatureSummary, path: Path) -> None:
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **summary.arrays())  # type: ignore[arg-type]


def _open_same(out: Path, record: IndexRecord) -> FeatureIndex:
    """The finished index at `out`, if it is the one asked for."""
    there = to_dict(from_dict(IndexRecord, read_head(out, KIND)))
    rows = difference(there, to_dict(record))
    if rows:
        raise ArtifactError(
            f"{out} holds another feature index",
            got="; ".join(rows),
            fix="Choose another folder, or say overwrite=True (--overwrite) to replace it",
        )
    return open_index(out)


def _check_store(store: ActivationStore, model: HookedModel, dataset: TokenDataset) -> None:
    if store.model_name != model.name:
        raise InputError("The activation store is of another model", got=store.model_name, expected=model.name)
    about: JsonObject = store.config["dataset"]
    if about["fingerprint"] != dataset.fingerprint:
        raise InputError(
            "The activation store is of another token dataset",
            got=f"fingerprint {about['fingerprint']}",
            expected=dataset.fingerprint,
            fix="Harvest this dataset, or build the index without a store",
        )


def _tokenizer(model: HookedModel) -> PreTrainedTokenizerFast:
    if not isinstance(model.tokenizer, PreTrainedTokenizerFast):
        raise ModelError(
            f"{model.name} has no fast tokenizer, and an index needs one to show tokens",
            got=type(model.tokenizer).__name__,
            expected="a tokenizer with a tokenizer.json",
        )
    return model.tokenizer


def _documents(dataset: TokenDataset) -> DocumentOf:
    """Names the document of a token; None for a separator."""
    spans = lru_cache(maxsize=1 << 16)(dataset.document_of)

    def document_of(sequence: int, position: int) -> str | None:
        return next((span.source for span in spans(sequence) if span.start <= position < span.stop), None)

    return document_of
