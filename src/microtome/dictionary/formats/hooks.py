"""Hook points and models from the names that other libraries use: modules of Hugging Face models, submodules, folders,
TransformerLens's short names of models."""

import re

from microtome.dictionary.formats.reading import UNKNOWN
from microtome.model.names import canonical

_MODULE = re.compile(r"(?:^|.*\.)(?:layers|h|blocks)[._](\d+)(?:[._](.+))?$")
_PARTS = {
    None: "hook_resid_post",
    "mlp": "hook_mlp_out",
    "self_attn": "hook_attn_out",
    "attn": "hook_attn_out",
    "attention": "hook_attn_out",
}
_SUBMODULE = re.compile(r"(resid_pre|resid_mid|resid_post|mlp_out|attn_out)")

_OWNERS = {"pythia-": "EleutherAI", "gemma-": "google"}
# Points where the model's writing weights decide the mean over d_model.
_STREAM = (
    "hook_embed",
    "hook_pos_embed",
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
)


def hub_model(name: str) -> str:
    """The Hugging Face id of a model that TransformerLens calls by a short name: gpt2-small → gpt2, pythia-70m →
    EleutherAI/pythia-70m; every other name as it is."""
    if name == "gpt2-small":
        return "gpt2"
    owner = next((owner for start, owner in _OWNERS.items() if name.startswith(start)), None)
    return f"{owner}/{name}" if owner else name


def on_the_stream(point: str) -> bool:
    """Whether an activation is (a sum of) what blocks write, as wide as the residual stream."""
    return point.rpartition(".")[2] in _STREAM


def of_module(name: str) -> str:
    """The point where a Hugging Face module's output is: `layers.5` → `blocks.5.hook_resid_post`, `h.3.mlp` →
    `blocks.3.hook_mlp_out`; `unknown` for a name of another form."""
    if name in ("embed_tokens", "wte"):
        return "hook_embed"
    match = _MODULE.match(name)
    if not match or match[2] not in _PARTS:
        return UNKNOWN
    return f"blocks.{match[1]}.{_PARTS[match[2]]}"


def into_module(name: str) -> str:
    """The same for a module's input: `layers.5.mlp` → `blocks.5.mlp.hook_in`, `h.3` → `blocks.3.hook_resid_pre`."""
    match = _MODULE.match(name)
    if not match or match[2] not in _PARTS:
        return UNKNOWN
    part = {"hook_mlp_out": "mlp.hook_in", "hook_attn_out": "attn.hook_in"}
    return f"blocks.{match[1]}.{part.get(_PARTS[match[2]], 'hook_resid_pre')}"


def in_block(layer: int | str, point: str) -> str:
    """A point of a block as circuit-tracer's configs call it: `mlp.hook_out` is what the MLP adds to the stream."""
    return canonical(f"blocks.{layer}.{point}", gated=True)


def of_submodule(name: object, layer: object) -> str:
    """From dictionary_learning's `submodule_name` ("resid_post_layer_3") and `layer`; `unknown` when it says neither."""
    match = _SUBMODULE.search(str(name or ""))
    return f"blocks.{layer}.hook_{match[1]}" if match and type(layer) is int else UNKNOWN
