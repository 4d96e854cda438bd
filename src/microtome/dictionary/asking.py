"""What a model is asked about entities: for each attribute a prompt with the entity in it, and which value it names.

All prompts of an attribute begin alike; that is read once (`beginning.py`), which leaves a third of the work.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from microtome.common.errors import InputError
from microtome.dictionary.beginning import Beginning
from microtome.dictionary.entities import Entities
from microtome.dictionary.labelled import in_decoder_units
from microtome.dictionary.surface import Read, SparseDictionary, points
from microtome.model import HookedModel
from microtome.model.hook_point import HookFn, HookPoint
from microtome.model.prompts import Prompts


@dataclass(frozen=True, eq=False)
class Asked:
    """One attribute's prompts for all entities: ids, padded on the right; the place of each entity's last token; the ids of
    the values' first tokens, and the number of each entity's own value."""

    prompts: Prompts
    place: Int[Tensor, " entity"]
    answers: Int[Tensor, " value"]
    value: Int[Tensor, " entity"]
    begun: Beginning

    def logits(
        self, which: Int[Tensor, " row"], put: Mapping[str, Float[Tensor, "row _"]] | None = None
    ) -> Float[Tensor, "row value"]:
        """The logits of the values behind the prompts of these entities, with at each hook point that `put` names the
        row's vector at the entity's place."""
        tokens, there = self.prompts.tokens[which], self._there()[which]
        n, rows = there.sum(1), torch.arange(len(which))
        end, begun = int(n.max()), self.begun
        hooks = [(name, _putting(value, rows, self.place[which] - begun.n)) for name, value in (put or {}).items()]
        with begun.model.hooks(hooks):
            logits = begun.logits(tokens[:, :end], None if bool((n == end).all()) else there[:, :end])
        found: Tensor = logits[:, self.answers.to(logits.device)].float().cpu()
        return found

    def _there(self) -> Bool[Tensor, "entity pos"]:
        mask = self.prompts.mask
        return torch.ones_like(self.prompts.tokens, dtype=torch.bool) if mask is None else mask


@dataclass(frozen=True, eq=False)
class States:
    """What flows at the entities' places in one attribute's prompts, and which value the model names."""

    codes: Float[Tensor, "entity d_sae"]
    y: Float[Tensor, "entity d_out"]
    says: Int[Tensor, " entity"]


def ask(model: HookedModel, entities: Entities, attribute: str, *, share: bool = True) -> Asked:
    """The prompts of an attribute; without `share` each run reads them whole.

    Raises InputError for an entity whose last token melts into what follows, and for values that begin with one token.
    """
    names = list(entities.values)
    before, _, after = entities.prompts[attribute].partition("{entity}")
    texts = [f"{before}{name}{after}" for name in names]
    prompts = model.prompts(texts)
    place = torch.tensor([len(model.to_tokens(f"{before}{name}")[0]) - 1 for name in names])
    for text, name, row, last in zip(texts, names, prompts.tokens, place.tolist(), strict=True):
        if model.to_tokens(f"{before}{name}")[0].tolist() != row[: last + 1].tolist():
            raise InputError(f"The last token of {name} is not its own", got=text, fix="Put a space behind {entity}")
    values = sorted({entities.values[name][attribute] for name in names})
    answers = [int(model.to_tokens(f" {value}", prepend_bos=False)[0, 0]) for value in values]
    if len(set(answers)) < len(answers):
        raise InputError(f"Two values of {attribute} begin with the same token", got=", ".join(values))
    value = torch.tensor([values.index(entities.values[name][attribute]) for name in names])
    alike = (prompts.tokens == prompts.tokens[0]).all(0)[: int(place.min())].long().cumprod(0)
    begun = Beginning.of(model, prompts.tokens[0, : int(alike.sum())] if share else prompts.tokens[0, :0])
    return Asked(prompts, place, torch.tensor(answers), value, begun)


@torch.no_grad()
def states_of(dictionary: SparseDictionary, asked: Asked, rows: int) -> States:
    """Codes, y and answers of all entities, `rows` at a time."""
    model, names = asked.begun.model, points([dictionary])
    codes, y, says = [], [], []
    for part in torch.arange(len(asked.place)).split(rows):
        mask = None if asked.prompts.mask is None else asked.prompts.mask[part]
        read = Read(model.activations(Prompts(asked.prompts.tokens[part], mask), names))
        at = torch.arange(len(part)), asked.place[part]
        codes.append(in_decoder_units(dictionary, read.rows(dictionary)[at]))
        y.append(read.y(dictionary)[at].cpu())
        says.append(asked.logits(part).argmax(1))
    return States(torch.cat(codes), torch.cat(y), torch.cat(says))


def _putting(value: Float[Tensor, "row d"], rows: Tensor, place: Tensor) -> HookFn:
    def hook(activation: Tensor, _: HookPoint) -> Tensor:
        new = activation.clone()
        at = rows.to(new.device), place.to(new.device)
        new[at] = value.to(new).view_as(new[at])
        return new

    return hook
