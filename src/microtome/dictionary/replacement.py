"""The *replacement model*: the model with a dictionary in place of what it stands for, at all layers in one forward pass.

Each layer's latents read the stream of the edited run itself, so what an early layer gets wrong is read, and made worse or
mended, by the later ones; attention is computed anew on it (Ameisen et al. 2025, "Circuit Tracing", "Replacement model",
transformer-circuits.pub/2025/attribution-graphs/methods.html). BOS and separators keep the model's own outputs.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from microtome.dictionary.codes import SparseCodes
from microtome.dictionary.surface import LayeredDictionary, SparseDictionary, device_of
from microtome.model import HookedModel
from microtome.model.hook_point import HookFn, HookPoint


def as_replacement(model: HookedModel, dictionary: SparseDictionary) -> LayeredDictionary | None:
    """The dictionary, if it can stand in the model while it runs; else None: where its latents read several points at once
    (a crosscoder), one choice is made among the latents of all layers, or an output lies before a point that its latents
    read."""
    if not isinstance(dictionary, LayeredDictionary) or not dictionary.by_layer:
        return None
    reads, writes = (
        [model.resolve(name)[0] for name in names] for names in (dictionary.origin.inputs, dictionary.origin.outputs)
    )
    in_order = all(reads[source] <= writes[i] for i in range(len(writes)) for source in dictionary.sources(i))
    return dictionary if in_order else None


def replacement_logits(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    dictionary: LayeredDictionary,
    where: Bool[Tensor, "batch pos"],
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits of the run in which `dictionary` writes all its outputs wherever `where` holds, from what it reads in that
    same run."""
    running = _Running(dictionary, where)
    inputs, outputs = dictionary.origin.inputs, dictionary.origin.outputs
    depth = [model.resolve(name)[0] for name in inputs]
    last = [max(dictionary.sources(i), key=depth.__getitem__) for i in range(len(outputs))]
    hooks: list[tuple[str, HookFn]] = []
    # Hooks of one point are called in this order. An output is written as soon as all that it is made of is read: an
    # autoencoder reads its point before it writes it, and who reads what another has written finds that there.
    for layer in sorted(range(len(inputs)), key=depth.__getitem__):
        hooks.append((inputs[layer], running.reading(layer)))
        hooks += [(name, running.writing(i)) for i, name in enumerate(outputs) if last[i] == layer]
    return model.run_with_hooks(tokens, hooks)


class _Running:
    """What the dictionary has read so far in a run, at the positions `where`, and the codes of it."""

    def __init__(self, dictionary: LayeredDictionary, where: Bool[Tensor, "batch pos"]) -> None:
        self.dictionary, self.where, self.device = dictionary, where, device_of(dictionary)
        self.x: dict[int, Float[Tensor, "n d"]] = {}
        self.codes: dict[int, SparseCodes] = {}

    def reading(self, layer: int) -> HookFn:
        """Takes note of what the latents of a layer read."""

        def hook(activation: Tensor, _: HookPoint) -> Tensor:
            rows = activation.flatten(2)[self.where.to(activation.device)]
            self.x[layer] = rows.to(self.device, torch.float32)
            self.codes[layer] = self.dictionary.encode_layer(layer, self.x[layer])
            return activation

        return hook

    def writing(self, layer: int) -> HookFn:
        """Puts the dictionary's output in the place of the model's."""

        def hook(activation: Tensor, _: HookPoint) -> Tensor:
            codes = [self.codes[source] for source in self.dictionary.sources(layer)]
            y = self.dictionary.decode_layer(layer, codes, self.x[layer])
            here = self.where.to(activation.device)
            edited = activation.clone()
            edited[here] = y.to(activation).view_as(activation[here])
            return edited

        return hook
