"""`HookedModel`: an untouched Hugging Face causal language model whose hook points can be read and edited by name.

Every run is the module's own forward pass. Reading and editing are taps (`taps.py`) at the sites of the family's spec
(`specs.py`); a run that needs no logits stops at the deepest point asked for.
"""

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from microtome.common.errors import InputError, ModelError, unknown_name
from microtome.model.cache import ActivationCache
from microtome.model.names import AFTER_BLOCKS, BEFORE_BLOCKS, HookName
from microtome.model.specs import FamilySpec, ModelConfig, Site
from microtome.model.taps import StopForward, Tap, run_until, tapped
from microtome.text import bos

Names = str | HookName | Sequence[str | HookName] | Callable[[str], bool]
Tokens = Int[Tensor, "batch pos"]
Logits = Float[Tensor, "batch pos d_vocab"]


class HookPoint:
    """What a hook function gets beside the activation: where it is. As in TransformerLens: `hook.name`,
    `hook.layer()`."""

    def __init__(self, name: HookName) -> None:
        self.hook_name, self.name = name, str(name)

    def layer(self) -> int:
        if self.hook_name.layer is None:
            raise ModelError(f"{self.name} belongs to no layer")
        return self.hook_name.layer

    def __repr__(self) -> str:
        return f"HookPoint({self.name})"


HookFn = Callable[[Tensor, HookPoint], Tensor | None]
Hooks = Sequence[tuple[Names, HookFn]]


class HookedModel:
    """A language model with named hook points. Made by `load_model`, or from any Hugging Face model of a known family.

    Attributes: `hf` (the module itself), `tokenizer` (or None), `name`, `config` (sizes under the field's names),
    `spec`, `revision` (of the weights, if known).
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        name: str,
        spec: FamilySpec,
        revision: str | None = None,
    ) -> None:
        self.hf, self.tokenizer, self.name, self.spec, self.revision = hf, tokenizer, name, spec, revision
        self.config: ModelConfig = spec.model_config(hf.config)
        self._sites = _all_sites(spec, self.config)
        hf.eval().requires_grad_(False)

    def __repr__(self) -> str:
        c = self.config
        return f"HookedModel({self.name!r}, {c.family}, {c.n_layers} layers, d_model {c.d_model}, {self.dtype}, {self.device})"

    @property
    def device(self) -> torch.device:
        return self.hf.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    # ---- names ------------------------------------------------------------------------------------------------------

    @property
    def hook_points(self) -> list[str]:
        """The names of all hook points of this model, in the order of the forward pass."""
        return [str(name) for name in self._sites]

    def resolve(self, names: Names) -> list[HookName]:
        """Hook names from an exact name, a glob (`"blocks.*.hook_resid_pre"`), a predicate, or a list of names and
        globs.

        Sorted by depth, each once. Raises ModelError for one that this model does not have, listing the nearest.
        """
        if callable(names):
            return [name for name in self._sites if names(str(name))]
        wanted = [names] if isinstance(names, str | HookName) else names
        found: set[HookName] = set()
        for name in wanted:
            found.update(self._matches(str(name)))
        return sorted(found)

    def _matches(self, text: str) -> list[HookName]:
        if any(c in text for c in "*?["):
            matched = [name for name in self._sites if fnmatch.fnmatchcase(str(name), text)]
            if not matched:
                raise ModelError(f"No hook point of {self.name} matches {text!r}", fix="model.hook_points lists them")
            return matched
        for name in self._sites:
            if str(name) == text:
                return [name]
        if (
            text.startswith("blocks.")
            and text.split(".")[1].isdigit()
            and int(text.split(".")[1]) >= self.config.n_layers
        ):
            raise ModelError(
                f"There is no hook point {text!r}",
                got=f"layer {text.split('.')[1]}",
                expected=f"a layer from 0 to {self.config.n_layers - 1} of {self.name}",
            )
        raise unknown_name(f"hook point of {self.name}", text, self.hook_points, ModelError)

    # ---- tokens -----------------------------------------------------------------------------------------------------

    def to_tokens(self, text: str | Sequence[str], *, prepend_bos: bool = True) -> Tokens:
        """Token ids `[batch, pos]` of one or several texts, with the tokenizer's BOS in front if it defines one.

        Texts of unequal length are padded on the right, which cannot change what comes before under causal attention.
        Raises InputError for an empty text.
        """
        texts = [text] if isinstance(text, str) else list(text)
        tokenizer = self._need_tokenizer()
        if not texts or not all(texts):
            raise InputError("There is nothing to run: a text is empty", got=texts)
        rows = bos.encode(tokenizer, texts, bos=bos.AUTO if prepend_bos else bos.NONE)
        ids, _ = bos.pad(rows, bos.pad_id(tokenizer))
        return torch.from_numpy(ids).to(self.device)

    def to_string(self, tokens: Int[Tensor, "*batch pos"]) -> str | list[str]:
        """The text of one sequence `[pos]`, or the texts of several `[batch, pos]`."""
        tokenizer = self._need_tokenizer()
        if tokens.ndim == 1:
            return str(tokenizer.decode(tokens.tolist()))
        return [str(t) for t in tokenizer.batch_decode(tokens.tolist())]

    def to_str_tokens(self, text: str, *, prepend_bos: bool = True) -> list[str]:
        """The text cut into its tokens, as strings."""
        return [
            str(self._need_tokenizer().decode([t])) for t in self.to_tokens(text, prepend_bos=prepend_bos)[0].tolist()
        ]

    def _need_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ModelError(f"{self.name} came without a tokenizer", fix="Pass token ids [batch, pos] instead of text")
        return self.tokenizer

    def _check(self, tokens: str | Sequence[str] | Tensor) -> Tensor:
        if not isinstance(tokens, Tensor):
            return self._check(self.to_tokens(tokens))
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        if tokens.ndim != 2 or tokens.is_floating_point() or 0 in tokens.shape:
            raise InputError("Tokens must be integers [batch, pos]", got=f"{tokens.dtype} {list(tokens.shape)}")
        if tokens.shape[1] > self.config.n_ctx:
            raise InputError(
                "The context is longer than the model's",
                got=f"{tokens.shape[1]} tokens",
                expected=f"at most {self.config.n_ctx}",
            )
        low, high = tokens.aminmax()
        if low < 0 or high >= self.config.d_vocab:
            raise InputError(
                f"Tokens outside the vocabulary of {self.name}",
                got=f"ids from {int(low)} to {int(high)}",
                expected=f"0 to {self.config.d_vocab - 1}",
            )
        return tokens.to(self.device)

    # ---- runs -------------------------------------------------------------------------------------------------------

    def __call__(self, tokens: str | Sequence[str] | Tensor) -> Logits:
        """Logits `[batch, pos, d_vocab]`, bit-identical to the Hugging Face module's."""
        logits: Tensor = self.hf(input_ids=self._check(tokens), use_cache=False).logits
        return logits

    def run_with_cache(
        self,
        tokens: str | Sequence[str] | Tensor,
        names: Names = "*",
        *,
        positions: slice | Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[Logits, ActivationCache]:
        """Logits, and the activations at the points `names` (all, unless said otherwise).

        `positions` keeps only some positions, `dtype` and `device` convert each activation inside the hook. Raises
        ModelError for a name that is not there or does not fire.
        """
        kept, taps = self._capture(names, positions, dtype, device)
        with tapped(self.hf, self.config, self._sites, taps):
            logits = self(tokens)
        return logits, self._cache(kept, taps)

    def activations(
        self,
        tokens: str | Sequence[str] | Tensor,
        names: Names,
        *,
        positions: slice | Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> ActivationCache:
        """Like `run_with_cache` without the logits: the forward pass stops at the deepest point asked for."""
        checked = self._check(tokens)
        kept, taps = self._capture(names, positions, dtype, device, stop=True)
        with tapped(self.hf, self.config, self._sites, taps):
            run_until(lambda: self.hf(input_ids=checked, use_cache=False))
        return self._cache(kept, taps)

    def run_with_hooks(self, tokens: str | Sequence[str] | Tensor, hooks: Hooks) -> Logits:
        """Logits of a run in which each function `fn(act, hook)` sees, and may replace, the activation at its points.

        Raises ModelError for a name that is not there, or a hook that never fired.
        """
        with self.hooks(hooks):
            return self(tokens)

    @contextmanager
    def hooks(self, hooks: Hooks) -> Iterator[None]:
        """Within the block, every run of the model has these hooks. A hook that never fires in it is a ModelError."""
        fired: set[HookName] = set()
        taps: list[Tap] = []
        for names, fn in hooks:
            taps += [(name, _user_tap(name, fn, fired)) for name in self.resolve(names)]
        with tapped(self.hf, self.config, self._sites, taps):
            yield
        self._all_fired(fired, taps)

    def _capture(
        self,
        names: Names,
        positions: slice | Sequence[int] | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        *,
        stop: bool = False,
    ) -> tuple[dict[HookName, Tensor], list[Tap]]:
        wanted = self.resolve(names)
        if not wanted:
            raise ModelError(
                "No hook point was asked for", expected="at least one name", fix="model.hook_points lists them"
            )
        kept: dict[HookName, Tensor] = {}

        def tap(name: HookName) -> Callable[[Tensor], None]:
            def keep(activation: Tensor) -> None:
                index = positions if positions is None or isinstance(positions, slice) else list(positions)
                seen = activation if index is None else activation[:, index]
                # An in-place site may still be edited by a later hook of this run: keep what was there.
                seen = seen.clone() if self._sites[name].in_place else seen
                kept[name] = seen.to(device=device, dtype=dtype)
                if stop and len(kept) == len(wanted):
                    raise StopForward

            return keep

        return kept, [(name, tap(name)) for name in wanted]

    def _cache(self, kept: dict[HookName, Tensor], taps: Sequence[Tap]) -> ActivationCache:
        self._all_fired(set(kept), taps)
        return ActivationCache(kept)

    def _all_fired(self, fired: set[HookName], taps: Sequence[Tap]) -> None:
        silent = [str(name) for name, _ in taps if name not in fired]
        if silent:
            raise ModelError("A hook point was set and never reached in the run", got=", ".join(silent))

    # ---- weights ----------------------------------------------------------------------------------------------------

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:  # noqa: N802 - the field's name
        """The token embedding, a view of the model's own weight."""
        return self._weight(self.spec.embedding)

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:  # noqa: N802 - the field's name
        """The unembedding, a view of the model's own weight."""
        return self._weight(self.spec.unembedding).T

    @property
    def ln_final_weight(self) -> Float[Tensor, " d_model"]:
        """The learned scale of the final norm."""
        return self._weight(self.spec.final_norm)

    def _weight(self, module: str) -> Tensor:
        return self.hf.get_submodule(module).get_parameter("weight")


def _all_sites(spec: FamilySpec, config: ModelConfig) -> dict[HookName, Site]:
    """The site of every hook point of a model, in the order of the forward pass."""
    sites: dict[HookName, Site] = {}
    for point, site in spec.sites.items():
        if point in BEFORE_BLOCKS or point in AFTER_BLOCKS:
            sites[HookName(point)] = site
            continue
        for i in range(config.n_layers):
            sites[HookName(point, i)] = Site(site.module.format(i=i), site.side, site.in_place)
    return dict(sorted(sites.items()))


def _user_tap(name: HookName, fn: HookFn, fired: set[HookName]) -> Callable[[Tensor], Tensor | None]:
    point = HookPoint(name)

    def tap(activation: Tensor) -> Tensor | None:
        fired.add(name)
        return fn(activation, point)

    return tap
