"""Texts with yes-or-no labels, and what a dictionary makes of them: the ground on which probes are trained.

`LabelledTexts` holds texts and one or several attributes, each true or false of every text. `encode_texts` runs the
model over them and keeps, for each text, the mean over its tokens or its last token (`readout`) of x, y and the codes;
special tokens count as none of its tokens. Codes are in units of W_dec, so that ŷ changes by −f_i W_dec,i when latent i is
taken out, also where the dictionary normalises its input.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from microtome.common.config import require
from microtome.common.errors import InputError
from microtome.common.progress import progress
from microtome.dictionary.fit import check_fit
from microtome.dictionary.surface import Read, SparseDictionary, decoder_rows
from microtome.dictionary.tables import Row, columns_missing, read_rows
from microtome.model import HookedModel

Readout = Literal["mean", "last"]


@dataclass(frozen=True, kw_only=True)
class LabelledTexts:
    """Texts and their attributes; `attributes[name][i]` says whether text i has it. Raises InputError where they do not fit
    or an attribute has one class only."""

    name: str
    texts: tuple[str, ...]
    attributes: Mapping[str, tuple[bool, ...]]
    readout: Readout = "mean"

    def __post_init__(self) -> None:
        require(self.readout in ("mean", "last"), "Unknown readout", got=self.readout, expected="mean or last")
        for name, labels in self.attributes.items():
            if len(labels) != len(self.texts):
                raise InputError(
                    f"{self.name}: {name} needs a label for each text", got=len(labels), expected=len(self.texts)
                )
            if len(set(labels)) < 2:
                raise InputError(
                    f"{self.name}: all texts have one label, so there is nothing to tell apart",
                    got=f"{sum(labels)} of {len(labels)} texts with {name}",
                    fix="Give texts of both kinds",
                )

    @classmethod
    def of_classes(
        cls, name: str, texts: Sequence[str], labels: Sequence[str], readout: Readout = "mean"
    ) -> "LabelledTexts":
        """Texts of two classes as one attribute (the second class in alphabetical order), of more as one for each."""
        classes = sorted(set(labels))
        if len(classes) < 2:
            raise InputError(f"{name}: a task needs two classes", got=f"only {', '.join(classes) or 'no texts'}")
        named = classes[1:] if len(classes) == 2 else classes
        attributes = {one: tuple(label == one for label in labels) for one in named}
        return cls(name=name, texts=tuple(texts), attributes=attributes, readout=readout)


_EXPECTED = "a text and a label in each row"


def read_labelled(path: str | Path) -> list[LabelledTexts]:
    """Tasks from a table with the columns `text` and `label`, as JSONL, CSV or Parquet. Two labels make one attribute, more
    make one for each. `task` (else the file's name) and `readout` may be there, and `spurious`, a second label, which makes
    a pair for SCR and TPP.

    Raises InputError for a file that is not there or cannot be read, a row without text or label, or a task of one class.
    """
    path = Path(path)
    tasks: dict[str, list[Row]] = {}
    for where, row in read_rows(path, _EXPECTED):
        columns_missing(row, ("text", "label"), where, _EXPECTED)
        if not isinstance(row["text"], str):
            raise InputError(f"{where} has no text in 'text'", got=repr(row["text"])[:80], expected="a string")
        tasks.setdefault(str(row.get("task") or path.stem), []).append(row)
    return [_task(name, rows) for name, rows in tasks.items()]


def _task(name: str, rows: list[Row]) -> LabelledTexts:
    texts, readout = [row["text"] for row in rows], rows[0].get("readout") or "mean"
    require(readout in ("mean", "last"), f"{name}: unknown readout", got=readout, expected="mean or last")
    wanted = LabelledTexts.of_classes(name, texts, [str(row["label"]) for row in rows], readout)  # type: ignore[arg-type]
    if not any(row.get("spurious") not in (None, "") for row in rows):
        return wanted
    for row in rows:
        columns_missing(row, ("spurious",), f"{name}: {row['text'][:40]!r}", "a second label in each row, or in none")
    spurious = LabelledTexts.of_classes(f"{name}, spurious", texts, [str(row["spurious"]) for row in rows])
    both = {f"label {key}": value for key, value in wanted.attributes.items()}
    both |= {f"spurious {key}": value for key, value in spurious.attributes.items()}
    return LabelledTexts(name=name, texts=tuple(texts), attributes=both, readout=wanted.readout)


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedTexts:
    """One vector of each kind for every text, and the decoder. `labels[:, a]` is attribute `attributes[a]`."""

    name: str
    attributes: tuple[str, ...]
    labels: Bool[Tensor, "text attribute"]
    x: Float[Tensor, "text d_in"]
    y: Float[Tensor, "text d_out"]
    codes: Float[Tensor, "text d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]

    def without(self, latents: Int[Tensor, " n"]) -> Float[Tensor, "text d_out"]:
        """y with these latents taken out; what the dictionary does not explain of y stays."""
        return self.y - self.codes[:, latents] @ self.W_dec[latents]


@torch.no_grad()
def encode_texts(
    model: HookedModel, dictionary: SparseDictionary, labelled: LabelledTexts, *, batch_tokens: int = 2048
) -> EncodedTexts:
    """Run the model and the dictionary over the texts, on batches of about `batch_tokens`.

    Raises ConfigError for a dictionary that does not fit the model, InputError for a text without a text token.
    """
    check_fit(model, dictionary)
    texts = labelled.texts
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    longest = max(len(model.to_tokens(texts[order[-1]])[0]), 1)
    per_batch = max(1, batch_tokens // longest)
    with progress(len(texts), f"encode {labelled.name}", "texts") as bar:
        for start in range(0, len(order), per_batch):
            chosen = order[start : start + per_batch]
            found |= dict(zip(chosen, _encoded(model, dictionary, [texts[i] for i in chosen], labelled), strict=True))
            bar.advance(len(chosen))
    x, y, codes = (torch.stack([found[i][part] for i in range(len(texts))]) for part in range(3))
    return EncodedTexts(
        name=labelled.name,
        attributes=tuple(labelled.attributes),
        labels=torch.tensor(list(labelled.attributes.values())).T,
        x=x,
        y=y,
        codes=codes,
        W_dec=decoder_rows(dictionary).cpu(),
    )


def _encoded(
    model: HookedModel, dictionary: SparseDictionary, texts: list[str], labelled: LabelledTexts
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """x, y and codes of each text, on the CPU."""
    prompts = model.prompts(texts)
    if prompts.tokens.shape[1] > model.config.n_ctx:
        raise InputError(f"{labelled.name}: a text is longer than the model's context", got=max(texts, key=len)[:80])
    read = Read(
        model.activations(prompts, list(dict.fromkeys((*dictionary.origin.inputs, *dictionary.origin.outputs))))
    )
    x, y, coded = read.x(dictionary), read.y(dictionary), read.rows(dictionary)
    where = text_positions(model, prompts.tokens, prompts.mask).to(x.device)
    rows = []
    for i, text in enumerate(texts):
        here = where[i].nonzero()[:, 0]
        if len(here) == 0:
            raise InputError(f"{labelled.name}: a text has no text tokens", got=repr(text))
        here = here[-1:] if labelled.readout == "last" else here
        codes = in_decoder_units(dictionary, coded[i, here])
        rows.append((x[i, here].mean(0).cpu(), y[i, here].mean(0).cpu(), codes.mean(0)))
    return rows


def text_positions(
    model: HookedModel, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"] | None
) -> Bool[Tensor, "batch pos"]:
    """Where there is text: no padding, and no special token of the tokenizer."""
    special = [] if model.tokenizer is None else model.tokenizer.all_special_ids
    is_text = torch.isin(tokens, torch.tensor(special, dtype=tokens.dtype, device=tokens.device), invert=True)
    return is_text if mask is None else is_text & mask


def in_decoder_units(dictionary: SparseDictionary, rows: Float[Tensor, "n d_row"]) -> Float[Tensor, "n d_sae"]:
    """Dense codes of `Read.rows` on the CPU, scaled so that each row's part of the output is codes · W_dec."""
    codes = dictionary.encode(rows)
    dense = codes.to_dense().float()
    if getattr(dictionary, "input_norm", "none") == "none":
        return dense.cpu()
    # One latent shows the scale: the decoder is linear in the codes of a row.
    nothing = codes.__class__(codes.indices, torch.zeros_like(codes.values), codes.d_sae)
    part = (dictionary.decode(codes, rows) - dictionary.decode(nothing, rows)).norm(dim=1)
    plain = (dense @ decoder_rows(dictionary)).norm(dim=1)
    scale = torch.where(plain > 0, part / plain.clamp_min(1e-30), torch.ones_like(plain))
    return (dense * scale[:, None]).cpu()
