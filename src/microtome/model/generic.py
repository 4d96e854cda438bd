"""A spec for a family that has none: what can be found in any decoder, which is its residual stream.

The blocks are the longest list of like modules; their inputs and outputs are the stream. Attention, MLP and norms stay
closed, and a warning says so.
"""

import warnings

from torch import nn
from transformers import PreTrainedModel

from microtome.common.errors import ModelError
from microtome.model.specs import Dense, FamilySpec, Separate


class UnknownFamilyWarning(UserWarning):
    """A model of a family without a spec: only its residual stream has hook points."""


def generic_spec(hf: PreTrainedModel) -> FamilySpec:
    """A spec with the embedding, the residual stream and the logits. Raises ModelError if no blocks are found."""
    n_layers = hf.config.num_hidden_layers
    lists = {name: m for name, m in hf.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers}
    embedding, unembedding = _path_of(hf, hf.get_input_embeddings()), _path_of(hf, hf.get_output_embeddings())
    if not lists or embedding is None or unembedding is None:
        raise ModelError(
            "This model's family has no spec, and its blocks were not found either",
            got=f"model_type {hf.config.model_type!r}",
            expected=f"a list of {n_layers} blocks, an embedding and an unembedding",
        )
    blocks = min(lists, key=len)
    warnings.warn(
        f"The family {hf.config.model_type!r} has no spec: there are hook points for the embedding, the residual stream "
        f"({blocks}) and the logits, and none inside attention, MLP and norms",
        UnknownFamilyWarning,
        stacklevel=3,
    )
    return FamilySpec(
        name=str(hf.config.model_type),
        model_types=(str(hf.config.model_type),),
        blocks=blocks,
        embed=embedding,
        ln_final=None,
        unembed=unembedding,
        attn="",
        qkv=Separate(q="", k="", v=""),
        o="",
        mlp=Dense(up="", down=""),
        ln1=None,
        ln2=None,
        has_attn=False,
        has_mlp=False,
        additive=False,
    )


def _path_of(hf: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((name for name, module in hf.named_modules() if module is wanted), None)
