"""`Points`: the hook points of one model, found by name, alias or glob."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from microtome.common.errors import ModelError, unknown_name
from microtome.model.names import (
    HEAD_AXIS,
    WITH_HEADS,
    HookName,
    canonical,
    is_below,
    is_glob,
    matches,
    no_match,
    one_head,
)
from microtome.model.specs import Gated, ModelConfig

Names = str | HookName | Sequence[str | HookName] | Callable[[str], bool]


@dataclass(frozen=True)
class Points:
    """Those of the model called `model`, by their texts, in the order of the forward pass."""

    by_text: Mapping[str, HookName]
    model: str
    config: ModelConfig
    mlp: object
    """The spec's, which one alias depends on."""

    def resolve(self, names: Names) -> list[HookName]:
        """See `HookedModel.resolve`."""
        if callable(names):
            return [name for text, name in self.by_text.items() if names(text)]
        wanted = [names] if isinstance(names, str | HookName) else names
        found: set[HookName] = set()
        for name in wanted:
            text = str(name)
            found.update(self._matched(text) if is_glob(text) else [self._named(text)])
        return sorted(found)

    def _matched(self, glob: str) -> list[HookName]:
        """What a glob matches: points, or where there are none, single heads (`blocks.*.attn.hook_z.5`)."""
        found = [name for name in self.by_text.values() if matches(glob, name)] or self._matched_heads(glob)
        if not found:
            raise no_match(glob, self.by_text, self.model)
        return found

    def _matched_heads(self, glob: str) -> list[HookName]:
        of_points, _, of_heads = glob.rpartition(".")
        points = [name for name in self.by_text.values() if self._heads(name) and matches(of_points, name)]
        return [
            HookName(name.point, name.layer, head=head)
            for name in points
            for head in range(self._heads(name))
            if fnmatch.fnmatchcase(str(head), of_heads)
        ]

    def _named(self, text: str) -> HookName:
        full = canonical(text, gated=isinstance(self.mlp, Gated))
        name = self.by_text.get(full)
        if name is not None:
            return name
        whole = self.by_text.get(full.rpartition(".")[0])
        if whole is not None and self._heads(whole):
            return one_head(full, self._heads(whole))
        layer = text.split(".")[1] if text.startswith("blocks.") and text.count(".") > 1 else ""
        if layer.isdecimal() and not is_below(layer, self.config.n_layers):
            raise ModelError(
                f"There is no hook point {text!r}",
                got=f"layer {layer}",
                expected=f"a layer from 0 to {self.config.n_layers - 1} of {self.model}",
            )
        raise unknown_name(f"hook point of {self.model}", text, list(self.by_text), ModelError)

    def _heads(self, name: HookName) -> int:
        """How many heads there are at a point of which one is a point too; 0 at others."""
        return int(getattr(self.config, name.axes[HEAD_AXIS])) if name.axes in WITH_HEADS else 0
