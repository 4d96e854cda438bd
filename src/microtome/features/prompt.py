"""Which latents fire on a text: the model up to the dictionary's deepest hook point, then the encoder."""

from dataclasses import dataclass
from pathlib import Path

import torch

from microtome.common.errors import ArtifactError
from microtome.dictionary import DictionaryOrSet, load_dictionary_or_set
from microtome.dictionary.fit import check_fit
from microtome.dictionary.formats import CFG
from microtome.dictionary.surface import Read
from microtome.features.config import IndexRecord
from microtome.features.results import PromptFeatures
from microtome.model import HookedModel, load_model
from microtome.text.strings import TokenStrings


@dataclass(frozen=True)
class Reader:
    """A model and the dictionary that reads it."""

    model: HookedModel
    dictionary: DictionaryOrSet
    bos_id: int | None

    @classmethod
    def of(
        cls,
        record: IndexRecord,
        folder: Path,
        model: HookedModel | None = None,
        dictionary: DictionaryOrSet | None = None,
    ) -> "Reader":
        """The two that the `record` of the index in `folder` names, but for those given.

        Raises ArtifactError when the dictionary is another than the one that was indexed.
        """
        dictionary = dictionary if dictionary is not None else load_dictionary_or_set(dictionary_of(record, folder))
        if dictionary.fingerprint != record.dictionary_fingerprint:
            raise ArtifactError(
                "This is not the dictionary that the index describes",
                got=f"fingerprint {dictionary.fingerprint}",
                expected=f"{record.dictionary_fingerprint} ({record.dictionary})",
                fix="Pass the dictionary that was indexed, or build the index again with this one",
            )
        model = model if model is not None else load_model(record.model)
        check_fit(model, dictionary)
        return cls(model, dictionary, record.bos_id)

    def read(self, text: str, strings: TokenStrings, k: int | None = None) -> PromptFeatures:
        """The latents that fire on each token of `text`, strongest first (of equal ones the smaller), at most `k`."""
        tokens = self.model.to_tokens(text)
        ids = [int(i) for i in tokens[0]]
        with torch.inference_mode():
            read = Read(self.model.activations(tokens, list(self.dictionary.origin.inputs)))
            codes = self.dictionary.encode(read.rows(self.dictionary)[0])
        features: list[list[tuple[int, float]]] = []
        for token, latents, values in zip(ids, codes.indices.tolist(), codes.values.tolist(), strict=True):
            fired = sorted(((f, v) for f, v in zip(latents, values, strict=True) if v > 0), key=lambda p: (-p[1], p[0]))
            features.append([] if token == self.bos_id else fired[:k])
        return PromptFeatures(tokens=strings.show(ids), token_ids=ids, features=features)


def dictionary_of(record: IndexRecord, folder: Path) -> Path:
    """Where the dictionary of the index at `folder` is: where the index was told, or, if that is not there, beside it
    (artifacts are moved together) under its old name, or as the only dictionary there. That it is the right one is
    checked when it is used."""
    told = Path(record.dictionary)
    if told.exists():
        return told
    same = folder.parent / told.name
    if told.name and same.exists() and same != folder:
        return same
    beside = [path.parent for path in folder.parent.glob(f"*/{CFG}")]
    return beside[0] if len(beside) == 1 else told
