"""`HookedModel`: an untouched Hugging Face causal language model whose hook points can be read and edited by name.

Every run is the module's own forward pass. Reading and editing are taps (`taps.py`) at the stations that the family's
spec gives the model (`anatomy.py`); a run that needs no logits stops at the deepest point asked for.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from microtome.common.errors import ModelError
from microtome.model import prompts, reading
from microtome.model.anatomy import anatomy
from microtome.model.cache import ActivationCache
from microtome.model.capture import Capture, gradients_at, in_graph
from microtome.model.editing import Edit, Editing
from microtome.model.factored import FactoredMatrix
from microtome.model.generation import Generation, Generator, Stream
from microtome.model.generation_config import GenerateConfig
from microtome.model.hook_point import HookFn, HookPoint
from microtome.model.names import HookName
from microtome.model.parameters import input_device
from microtome.model.places import Decoding
from microtome.model.points import Names, Points
from microtome.model.prompts import Prompts, Side
from microtome.model.reading import ScoredToken
from microtome.model.specs import FamilySpec, ModelConfig
from microtome.model.switchboard import Switchboard
from microtome.model.taps import Run, StopForward, Tap
from microtome.model.weights import Layered, Table, Weights
from microtome.text.strings import TokenStrings

Tokens = Int[Tensor, "batch pos"]
Input = str | Sequence[str] | Tensor | Prompts
Logits = Float[Tensor, "batch pos d_vocab"]
Positions = slice | Sequence[int] | None
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
        self._stations = anatomy(spec, self.config)
        self._points = Points({str(name): name for name in self._stations}, name, self.config, spec.mlp)
        self._run = Run(dtype=hf.dtype)
        self._decoding = Decoding()
        self._switchboard = Switchboard(hf, self._stations, self._run)
        hf.eval().requires_grad_(False)

    def __repr__(self) -> str:
        c = self.config
        return f"HookedModel({self.name!r}, {c.family}, {c.n_layers} layers, d_model {c.d_model}, {self.dtype}, {self.device})"

    @property
    def device(self) -> torch.device:
        """Where tokens go in; with `device_map` blocks may be elsewhere."""
        return input_device(self.hf.get_submodule(self.spec.embed))

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    # ---- names ------------------------------------------------------------------------------------------------------

    @property
    def hook_points(self) -> list[str]:
        """The names of all hook points of this model, in the order of the forward pass."""
        return list(self._points.by_text)

    def resolve(self, names: Names) -> list[HookName]:
        """Hook names from an exact name, an alias, a glob (`"blocks.*.hook_resid_pre"`), a predicate, or a list of
        names and globs. A number behind a point with heads is one of them, also in globs (`"blocks.*.attn.hook_z.5"`).

        Sorted by depth, each once. Raises ModelError for one that this model does not have, listing the nearest.
        """
        return self._points.resolve(names)

    # ---- tokens -----------------------------------------------------------------------------------------------------

    def to_tokens(self, text: str | Sequence[str], *, prepend_bos: bool = True) -> Tokens:
        """Token ids `[batch, pos]` of one or several texts, with the tokenizer's BOS in front if it defines one.

        Texts of unequal length are padded on the right, which cannot change what comes before under causal attention.
        Raises InputError for an empty text.
        """
        return self.prompts(text, prepend_bos=prepend_bos).tokens

    def prompts(self, text: str | Sequence[str], *, prepend_bos: bool = True, side: Side = "right") -> Prompts:
        """Texts as token ids with a mask of what is padding, on the `side` asked for. Runs take it in place of
        tokens."""
        texts = [text] if isinstance(text, str) else text
        encoded = prompts.encode(self._need_tokenizer(), texts, prepend_bos=prepend_bos, side=side)
        mask = None if encoded.mask is None else encoded.mask.to(self.device)
        return Prompts(encoded.tokens.to(self.device), mask)

    def to_string(self, tokens: Int[Tensor, "*batch pos"]) -> str | list[str]:
        """The text of one sequence `[pos]`, or the texts of several `[batch, pos]`."""
        tokenizer = self._need_tokenizer()
        if tokens.ndim == 1:
            return str(tokenizer.decode(tokens.tolist()))
        return [str(t) for t in tokenizer.batch_decode(tokens.tolist())]

    def to_str_tokens(self, text: str | Int[Tensor, " pos"], *, prepend_bos: bool = True) -> list[str]:
        """The text of each token; joined, it is the whole text. A character of several tokens stands with its last."""
        ids = self.to_tokens(text, prepend_bos=prepend_bos)[0] if isinstance(text, str) else text
        return self._strings(ids.tolist())

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token, such as `" Mary"`. Raises InputError for one that is not."""
        return reading.single_token(self.to_tokens(text, prepend_bos=False)[0].tolist(), text, self._strings)

    @cached_property
    def _strings(self) -> Callable[[list[int]], list[str]]:
        tokenizer = self._need_tokenizer()
        backend = getattr(tokenizer, "backend_tokenizer", None)
        return TokenStrings(backend).pieces if backend else lambda ids: [str(tokenizer.decode([i])) for i in ids]

    def top_next_tokens(self, prompt: Input, k: int = 10) -> list[ScoredToken]:
        """The k likeliest tokens after a prompt (one sequence), with their probabilities."""
        return reading.likeliest(self(prompt)[0, -1], k, self._strings)

    def nearest_tokens(
        self,
        direction: Float[Tensor, " width"],
        k: int = 10,
        *,
        to: Literal["W_U", "W_E"] = "W_U",
        by: Literal["cosine", "dot"] = "cosine",
    ) -> list[ScoredToken]:
        """The tokens whose unembedding (or embedding) vectors are nearest to a direction of the residual stream."""
        vectors = self.weights.W_U.T if to == "W_U" else self.weights.W_E
        return reading.nearest(direction, vectors, k, self._strings, by)

    def token_losses(self, tokens: Input) -> Float[Tensor, "batch later"]:
        """The cross-entropy in nats of each token but the first `[batch, pos − 1]`; 0 where it is padding."""
        batch = self._batch(tokens)
        return reading.token_losses(self(batch), batch.tokens.to(self.device), batch.mask)

    def _need_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ModelError(f"{self.name} came without a tokenizer", fix="Pass token ids [batch, pos] instead of text")
        return self.tokenizer

    def _batch(self, tokens: Input, side: Side = "right") -> Prompts:
        """Text or ids as prompts, padded on that side."""
        if isinstance(tokens, Tensor):
            return Prompts(prompts.checked(tokens, self.config, self.name))
        return tokens if isinstance(tokens, Prompts) else self.prompts(tokens, side=side)

    def _inputs(self, tokens: Input) -> dict[str, Any]:
        """What the module is called with: checked ids, and for padded rows the mask and each token's own position."""
        batch = self._batch(tokens)
        ids = prompts.checked(batch.tokens, self.config, self.name).to(self.device)
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if batch.mask is not None and batch.positions is not None:
            inputs["attention_mask"] = batch.mask.long().to(self.device)
            if self._takes_positions:
                inputs["position_ids"] = batch.positions.to(self.device)
        return inputs

    @cached_property
    def _takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(type(self.hf).forward).parameters

    # ---- runs -------------------------------------------------------------------------------------------------------

    def __call__(self, tokens: Input) -> Logits:
        """Logits `[batch, pos, d_vocab]`, bit-identical to the Hugging Face module's."""
        logits: Tensor = self.hf(**self._inputs(tokens)).logits
        return logits

    def run_with_cache(
        self,
        tokens: Input,
        names: Names = "*",
        *,
        positions: Positions = None,
        heads: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[Logits, ActivationCache]:
        """Logits, and the activations at the points `names` (all but the costly ones, unless said otherwise).

        `positions` and `heads` keep only some, `dtype` and `device` convert each activation inside the hook. Raises
        ModelError for a name that is not there or does not fire.
        """
        capture = Capture(self._wanted(names), positions, heads, dtype, device)
        with self._switchboard.connected(capture.taps()):
            logits = self(tokens)
        return logits, ActivationCache(capture.result(), self.weights)

    def activations(
        self,
        tokens: Input,
        names: Names,
        *,
        positions: Positions = None,
        heads: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> ActivationCache:
        """Like `run_with_cache` without the logits: the forward pass stops at the deepest point asked for."""
        inputs = self._inputs(tokens)
        capture = Capture(self._wanted(names), positions, heads, dtype, device, stop=True)
        with self._switchboard.connected(capture.taps()), suppress(StopForward):
            self.hf(**inputs)
        return ActivationCache(capture.result(), self.weights)

    def gradients(
        self, tokens: Input, names: Names, metric: Callable[[Logits], Float[Tensor, ""]]
    ) -> tuple[Float[Tensor, ""], ActivationCache, ActivationCache]:
        """The metric of the logits, the activations at `names`, and the metric's gradient at each of them.

        Zeros where the metric does not depend on a point. Raises ModelError for a metric that is no single number, or
        that depends on none of the points.
        """
        capture = Capture(self._wanted(names), gradients=True)
        with torch.enable_grad(), self._switchboard.connected(capture.taps()):
            value = metric(self(tokens))
        kept = capture.result()
        if value.numel() != 1 or not value.requires_grad:
            raise ModelError(
                "The metric must be one number made from the logits",
                got=f"shape {list(value.shape)}, {'with' if value.requires_grad else 'without'} gradient",
            )
        gradients = gradients_at(value.sum(), kept)
        activations = {name: activation.detach() for name, activation in kept.items()}
        return value.detach(), ActivationCache(activations, self.weights), ActivationCache(gradients)

    def run_with_hooks(self, tokens: Input, hooks: Hooks = (), *, backward: Hooks = ()) -> Logits:
        """Logits of a run in which each function `fn(act, hook)` sees, and may replace, the activation at its points.

        `backward` functions `fn(gradient, hook)` are called when `.backward()` reaches the point. Raises ModelError for
        a name that is not there, or a hook that never fired.
        """
        with self.hooks(hooks, backward=backward):
            return self(tokens)

    @contextmanager
    def hooks(self, hooks: Hooks = (), *, backward: Hooks = ()) -> Iterator[None]:
        """Within the block, every run of the model has these hooks. A hook that never fires in it is a ModelError."""
        fired: set[HookName] = set()
        taps = [self._forward_tap(name, fn, fired) for names, fn in hooks for name in self.resolve(names)]
        taps += [self._backward_tap(name, fn, fired) for names, fn in backward for name in self.resolve(names)]
        with self._switchboard.connected(taps):
            yield
        silent = [str(tap.name) for tap in taps if tap.name not in fired]
        if silent:
            raise ModelError("A hook point was set and never reached in the run", got=", ".join(silent))

    @contextmanager
    def edited(self, edits: Edit | Sequence[Edit]) -> Iterator[list[Edit]]:
        """Within the block, every run, capture, gradient and generation has these edits (`microtome.edits`), in their
        order. Raises a MicrotomeError for one that cannot be made, or that never took effect."""
        listed = [edits] if isinstance(edits, Edit) else list(edits)
        at_work = Editing([(edit, self.resolve(edit.name)) for edit in listed], self.config, self._decoding)
        with at_work.around(self.hf), self._switchboard.connected(at_work.taps()):
            yield listed

    def generate(
        self, prompt: Input, config: GenerateConfig | None = None, *, stream: Stream | None = None, **settings: Any
    ) -> str | list[str]:
        """The text that the model puts behind a prompt, or a list of them for several prompts (which run as one batch).

        Greedy unless told otherwise; `settings` are those of `GenerateConfig`. `stream` gets the text piece by piece.
        Raises ConfigError for settings that cannot be, InputError for a prompt that is empty or too long.
        """
        self._need_tokenizer()
        texts = [str(made.text) for made in self.generate_details(prompt, config, stream=stream, **settings)]
        single = isinstance(prompt, str) or (isinstance(prompt, Tensor) and prompt.ndim == 1)
        return texts[0] if single else texts

    def generate_details(
        self, prompt: Input, config: GenerateConfig | None = None, *, stream: Stream | None = None, **settings: Any
    ) -> list[Generation]:
        """Like `generate`, for each prompt its tokens, the new tokens, their log-probabilities and why they end."""
        return self._generator.run(self._batch(prompt, "left"), GenerateConfig.of(config, settings), stream)

    def stream(self, prompt: Input, config: GenerateConfig | None = None, **settings: Any) -> Iterator[str]:
        """The text that `generate` would give for one prompt, in pieces that are made as the loop asks for them, with the
        hooks and edits of that moment. Between two of them, and after a loop that is left, the model is as it was.

        Raises as `generate` does, at the call, and ConfigError for several prompts or beams.
        """
        return self._generator.pieces(self._batch(prompt, "left"), GenerateConfig.of(config, settings))

    @property
    def _generator(self) -> Generator:
        return Generator(
            hf=self.hf,
            device=self.device,
            tokenizer=self.tokenizer,
            sizes=self.config,
            name=self.name,
            decoding=self._decoding,
        )

    def _forward_tap(self, name: HookName, fn: HookFn, fired: set[HookName]) -> Tap:
        def tap(activation: Tensor) -> Tensor | None:
            fired.add(name)
            return fn(activation, HookPoint.of(name, activation, self._run))

        return Tap(name, tap)

    def _backward_tap(self, name: HookName, fn: HookFn, fired: set[HookName]) -> Tap:
        def tap(activation: Tensor) -> Tensor:
            fired.add(name)
            point = HookPoint.of(name, activation, self._run)
            if not torch.is_grad_enabled():
                raise ModelError(f"A backward hook at {name} needs gradients", fix="Do not run under torch.no_grad()")
            activation = in_graph(activation, name)
            activation.register_hook(lambda gradient: fn(gradient, point))
            return activation

        return Tap(name, tap, through=True)

    def _wanted(self, names: Names) -> list[HookName]:
        wanted = self.resolve(names)
        if not wanted:
            raise ModelError(
                "No hook point was asked for", expected="at least one name", fix="model.hook_points lists them"
            )
        return wanted

    # ---- weights ----------------------------------------------------------------------------------------------------

    @cached_property
    def weights(self) -> Weights:
        """All weights in the field's layout, as views of the model's own: see `weights.py`."""
        return Weights(self.hf, self.spec, self.config)

    W_E, W_pos, W_U, b_U = Table(), Table(), Table(), Table()  # noqa: N815 - the field's names
    W_Q, W_K, W_V, W_O = Layered(), Layered(), Layered(), Layered()
    b_Q, b_K, b_V, b_O = Layered(), Layered(), Layered(), Layered()  # noqa: N815
    W_in, W_gate, W_out = Layered(), Layered(), Layered()
    b_in, b_gate, b_out = Layered(), Layered(), Layered()

    def folded(
        self,
        *,
        fold_norms: bool | Collection[str] = True,
        centre_writing: bool = False,
        centre_unembed: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Weights:
        """The weights for analysis, with norms folded in and means taken off; the model stays as it is. See
        `Weights.folded`."""
        return self.weights.folded(
            fold_norms=fold_norms, centre_writing=centre_writing, centre_unembed=centre_unembed, dtype=dtype
        )

    def QK(self, layer: int, head: int | None = None, *, full: bool = False) -> FactoredMatrix:  # noqa: N802
        """W_Q W_Kᵀ of a head, factored; `full`: between tokens. See `Weights.QK`."""
        return self.weights.QK(layer, head, full=full)

    def OV(self, layer: int, head: int | None = None, *, full: bool = False) -> FactoredMatrix:  # noqa: N802
        """W_V W_O of a head, factored; `full`: from tokens to logits. See `Weights.OV`."""
        return self.weights.OV(layer, head, full=full)
