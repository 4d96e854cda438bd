"""`DictionarySet`: dictionaries at different points of one model, used together as one.

A transcoder for each MLP is the common case (circuit-tracer's TranscoderSet, Dunefsky et al. 2024, arXiv 2406.11944);
autoencoders at several points do as well. x and y are what the members read and write, one behind the other; the latents
of the first member come first. So a set is measured as a cross-layer transcoder of the same layers is.
"""

import hashlib
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from microtome.common.config import require
from microtome.common.errors import InputError
from microtome.dictionary.codes import SparseCodes
from microtome.dictionary.dictionary import Dictionary, Origin


class DictionarySet(nn.Module):
    """The `members` in their order. Raises ConfigError where there is none, one reads or writes several points, two read
    or write the same point, they are of several models, or one was trained with a BOS and another without. Context and data
    set are None where they differ."""

    by_layer = True

    def __init__(self, members: Sequence[Dictionary]) -> None:
        super().__init__()
        require(len(members) > 0, "A set has at least one dictionary", got="none")
        # Others would be left out of the codes in silence, and not every caller has a type checker.
        others = [type(each).__name__ for each in members if not isinstance(each, Dictionary)]  # type: ignore[redundant-expr]
        require(
            not others,
            "The dictionaries of a set have one point each, and codes of single activations",
            got=", ".join(others),
        )
        origins = [member.origin for member in members]
        several = next((o for o in origins if len(o.inputs) > 1 or len(o.outputs) > 1), None)
        if several is not None:
            require(
                False,
                "The dictionaries of a set have one point each",
                got=f"a crosscoder of {', '.join(several.inputs)}",
            )
        inputs, outputs = (tuple(o.inputs[0] for o in origins), tuple(o.outputs[0] for o in origins))
        for names, verb in ((inputs, "read"), (outputs, "write")):
            twice = sorted({name for name in names if names.count(name) > 1})
            require(
                not twice,
                f"The dictionaries of a set {verb} different points",
                got=f"{len(names)} dictionaries, several of which {verb} {', '.join(twice)}",
                fix="Compare them side by side (microtome compare), or take one for each point",
            )
        models = sorted({o.model_name for o in origins})
        require(len(models) == 1, "The dictionaries of a set are of one model", got=", ".join(models))
        require(
            len({o.prepend_bos for o in origins}) == 1,
            "The dictionaries of a set read the same text, all with a BOS or all without",
            got=f"prepend_bos {', '.join(str(o.prepend_bos) for o in origins)}",
        )
        self.members = nn.ModuleList(members)
        widths = tuple(member.d_out for member in members)
        first = origins[0]
        self.origin = Origin(
            model_name=first.model_name,
            inputs=inputs,
            outputs=outputs,
            context=first.context if len({o.context for o in origins}) == 1 else None,
            prepend_bos=first.prepend_bos,
            dataset=first.dataset if len({o.dataset for o in origins}) == 1 else None,
            widths=widths if len(widths) > 1 else (),
        )
        self.path = Path()  # whoever opens it from a folder says which
        self.in_widths, self.out_widths = [member.d_in for member in members], list(widths)
        self.d_in, self.d_out, self.d_sae = sum(self.in_widths), sum(widths), sum(each.d_sae for each in members)

    # ---- what it is ---------------------------------------------------------------------------------------------------

    @property
    def dictionaries(self) -> list[Dictionary]:
        """The members."""
        return [member for member in self.members if isinstance(member, Dictionary)]

    @property
    def is_transcoder(self) -> bool:
        return self.origin.inputs != self.origin.outputs

    @property
    def architecture(self) -> str:
        """That of the members where they have one, and "_set"."""
        found = {member.architecture for member in self.dictionaries}
        return f"{found.pop()}_set" if len(found) == 1 else "dictionary_set"

    @property
    def k(self) -> int | None:
        """How many latents are kept on each row by all members, where the activations fix that."""
        ks = [member.k for member in self.dictionaries]
        return sum(k for k in ks if k is not None) if None not in ks else None

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that name the members' weights, in their order."""
        return hashlib.sha256("".join(member.fingerprint for member in self.dictionaries).encode()).hexdigest()[:16]

    # ---- use ----------------------------------------------------------------------------------------------------------

    def encode(self, x: Float[Tensor, "n d_in"]) -> SparseCodes:
        """The codes of all members, side by side."""
        parts = [self.encode_layer(i, rows) for i, rows in enumerate(x.split(self.in_widths, 1))]
        indices = [part.indices + latents.start for part, latents in zip(parts, self.layer_latents(), strict=True)]
        return SparseCodes(torch.cat(indices, 1), torch.cat([part.values for part in parts], 1), self.d_sae)

    def decode(self, codes: SparseCodes, x: Float[Tensor, "n d_in"] | None = None) -> Float[Tensor, "n d_out"]:
        """The members' outputs side by side. Raises InputError for codes of another dictionary, and where a member needs
        its input and none is given."""
        if codes.d_sae != self.d_sae:
            raise InputError("These codes are of another dictionary", got=f"{codes.d_sae} latents", expected=self.d_sae)
        rows = [None] * len(self.members) if x is None else x.split(self.in_widths, 1)
        parts = [codes.within(latents.start, latents.stop) for latents in self.layer_latents()]
        return torch.cat([self.decode_layer(i, [part], rows[i]) for i, part in enumerate(parts)], 1)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The outputs for activations of any leading shape, in their own dtype."""
        rows = x.reshape(-1, self.d_in)
        return self.decode(self.encode(rows), rows).to(x.dtype).view(*x.shape[:-1], self.d_out)

    # ---- member by member ---------------------------------------------------------------------------------------------

    def layer_latents(self) -> list[slice]:
        """The latents of each member."""
        ends = accumulate((member.d_sae for member in self.dictionaries), initial=0)
        return [slice(first, stop) for first, stop in pairwise(ends)]

    def sources(self, layer: int) -> range:
        """The member that writes this output: the one with its number."""
        return range(layer, layer + 1)

    def encode_layer(self, layer: int, x: Float[Tensor, "n d"]) -> SparseCodes:
        """The codes of one member over its own latents."""
        return self.dictionaries[layer].encode(x)

    def decode_layer(
        self, layer: int, codes: Sequence[SparseCodes], x: Float[Tensor, "n d"] | None = None
    ) -> Float[Tensor, "n d_out"]:
        """One member's output from its codes."""
        [own] = codes
        return self.dictionaries[layer].decode(own, x)
