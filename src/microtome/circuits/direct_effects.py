"""Direct logit attribution: how much each part of the model adds to an answer's logit, or to the difference between two.

With the final norm's denominator held at the run's own value, the logits before any soft-cap are linear in the residual
stream, and the stream is a sum of what the parts wrote. So the difference ℓ(answer) − ℓ(wrong) is a sum over the parts.

1. The direction u = W_U[:, answer] − W_U[:, wrong] is pulled back through the final norm: g, such that a part x of the stream
   adds x · g. It is one vector for each prompt and position.
2. Where a norm stands behind attention or MLP (Gemma-2, OLMo-2), g is pulled back through it too, at its own denominator.
3. Each part's figure is a product with g: a head's z with W_O g, a neuron's activation with W_out g, a latent's with W_dec g.
   Nothing of size parts × d_model is made, so all neurons of a model can be had at once.
4. The parts are summed and compared with the logits that the model gave. Where they do not agree it is an error.

What this leaves out: parts change each other, and the denominator. It is the direct effect alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microtome.circuits.effects import Axis, Effects
from microtome.circuits.lens import Readout
from microtome.circuits.metrics import Answers, answer_ids
from microtome.circuits.pairs import aligned, position_labels
from microtome.common.errors import InputError, ModelError, unknown_name
from microtome.dictionary import Dictionary
from microtome.dictionary.fit import check_fit
from microtome.model.cache import ActivationCache
from microtome.model.folding import Norm
from microtome.model.hooked import HookedModel, Input
from microtome.model.names import HookName
from microtome.model.specs import Experts
from microtome.model.weights import Weights

By = Literal["layer", "head", "mlp", "neuron", "feature"]
_BY: tuple[By, ...] = ("layer", "head", "mlp", "neuron", "feature")
Direction = Float[Tensor, "batch pos d_model"]
Figures = Float[Tensor, "part batch pos"]
Parts = Iterator[tuple[list[str], Figures]]


@dataclass(frozen=True, eq=False)
class LogitAttribution:
    """`effects` is the grid component × position, for each prompt: what each part adds to the logit (difference).

    `target` is that logit (difference) as the model gave it, before a soft-cap; `capped` the same after the cap, in models
    that have one. `residual` is target − the sum of the parts: rounding, checked to be small.
    """

    effects: Effects
    target: Float[Tensor, "pos batch"]
    capped: Float[Tensor, "pos batch"] | None
    residual: Float[Tensor, "pos batch"]

    def __getitem__(self, component: str) -> Float[Tensor, "pos batch"]:
        """What one component adds. Raises InputError for one that is not there."""
        labels = self.effects.axes[0].labels
        if component not in labels:
            raise unknown_name("component", component, labels, InputError)
        return self.effects.values[labels.index(component)]

    def top(self, k: int = 10, *, by_size: bool = True) -> list[tuple[tuple[str, ...], float]]:
        """The k places (component, position) that add or take most, on the mean over prompts."""
        return self.effects.top(k, by_size=by_size)


@torch.no_grad()
def logit_attribution(
    model: HookedModel,
    prompt: Input,
    *,
    answer: Answers,
    wrong: Answers | None = None,
    by: By = "layer",
    positions: Sequence[int] | Literal["all"] = (-1,),
    layers: Sequence[int] | None = None,
    dictionary: Dictionary | None = None,
) -> LogitAttribution:
    """The logit of `answer`, less that of `wrong` if given, as a sum over the parts of the model at each of `positions`.

    `by` says which parts: `"layer"` each attention and MLP; `"head"` each head and MLP; `"mlp"` each MLP, and attention as one;
    `"neuron"` each neuron of the MLPs of `layers` (all), and the rest by layer; `"feature"` each latent of `dictionary` that
    fires, its bias and its error, in place of what it stands for, and the rest by layer. Biases are parts too, so the parts
    add up. Labels are those of nodes: `embed`, `L5.attn`, `L5.H3`, `L5.mlp`, `L5.N117`, `F42`.

    Raises InputError for answers that are no single tokens or are the same, ModelError where the stream is no sum (OPT-350m)
    or has no such parts, and when the sum is off by more than 1e-4 of the parts' total size (0.05 in half precision).
    """
    _check(model, by, dictionary)
    right = answer_ids(model, answer)
    other = None if wrong is None else answer_ids(model, wrong)
    prompts = aligned(model, prompt)
    n, size = prompts.tokens.shape
    kept = list(range(size)) if positions == "all" else [int(p) for p in positions]
    right, other = _for_each(right, n), None if other is None else _for_each(other, n)
    if other is not None and bool((right == other).any()):
        raise InputError("An answer and its wrong answer are the same token", got=int(right[right == other][0]))
    names = _names(model, by, dictionary)
    logits, cache = model.run_with_cache(prompts, names, positions=kept)
    split = _Split(model, cache, _direction(model, right, other), layers, dictionary)
    labels, values = split.parts(by)
    target = _difference(cache["unembed.hook_out"], right, other)
    residual = target - values.sum(0)
    _check_sum(residual, values, _tolerance(model.dtype))
    capped = None
    if Readout(model).softcap is not None:
        capped = _difference(logits[:, kept], right, other).T.cpu()
    columns = position_labels(model, prompts)
    places = Axis(columns.name, tuple(columns.labels[p] for p in kept))
    effects = Effects(
        values=values.transpose(1, 2).cpu(),
        axes=(Axis("component", tuple(labels)), places),
        what="logit difference" if other is not None else "logit of the answer",
        notes=_notes(model),
    )
    return LogitAttribution(effects, target.T.cpu(), capped, residual.T.cpu())


@dataclass(frozen=True, eq=False)
class _Split:
    """The parts of one run and their products with the direction `u` `[batch, d_model]` of the logits."""

    model: HookedModel
    cache: ActivationCache
    direction: "tuple[Float[Tensor, 'batch d_model'], Float[Tensor, ' batch']]"
    layers: Sequence[int] | None
    dictionary: Dictionary | None

    def parts(self, by: By) -> tuple[list[str], Figures]:
        """Labels and figures of all parts."""
        makers = {
            "layer": self._by_layer,
            "head": self._by_head,
            "mlp": self._by_mlp,
            "neuron": self._by_neuron,
            "feature": self._by_feature,
        }
        labels, values = zip(*[*makers[by](), self._outside()], strict=True)
        return [label for group in labels for label in group], torch.cat(values)

    # ---- ways to split ----------------------------------------------------------------------------------------------

    def _by_layer(self) -> Parts:
        yield from self._start()
        for block in range(self.weights.config.n_layers):
            yield from self._attention(block)
            yield from self._mlp(block)

    def _by_mlp(self) -> Parts:
        yield from self._start()
        blocks = range(self.weights.config.n_layers)
        found = [values for block in blocks for _, values in self._attention(block)]
        if found:
            yield ["attention"], torch.stack(found).sum(0)
        for block in blocks:
            yield from self._mlp(block)

    def _by_head(self) -> Parts:
        yield from self._start()
        biases = []
        for block in range(self.weights.config.n_layers):
            back = self._behind(block, "ln1_post")
            z = self.cache["z", block].to(back)
            heads = torch.einsum("bphk,hkd,bpd->hbp", z, self.weights.W_O[block].to(back), back)
            yield [f"L{block}.H{head}" for head in range(len(heads))], heads
            biases.append(back @ self.weights.b_O[block].to(back))
            yield from self._mlp(block)
        yield ["b_O"], torch.stack(biases).sum(0, keepdim=True)

    def _by_neuron(self) -> Parts:
        n = self.weights.config.n_layers
        chosen = range(n) if self.layers is None else self.layers
        if any(not 0 <= block < n for block in chosen):
            raise InputError("There is no such layer", got=list(chosen), expected=f"0 to {n - 1}")
        yield from self._start()
        for block in range(n):
            yield from self._attention(block)
            if block not in chosen:
                yield from self._mlp(block)
                continue
            back = self._behind(block, "ln2_post")
            post = self.cache["post", block].to(back)
            values = post * (back @ self.weights.W_out[block].to(back).T)
            yield [f"L{block}.N{i}" for i in range(values.shape[-1])], values.permute(2, 0, 1)
            yield [f"L{block}.b_out"], (back @ self.weights.b_out[block].to(back))[None]

    def _by_feature(self) -> Parts:
        """The latents stand for the stream at their point, or for the part that is written there."""
        assert self.dictionary is not None
        at = HookName.parse(self.dictionary.hook_name)
        assert at.layer is not None
        whole = at.point in _STREAM
        first = at.layer + (at.point == "hook_resid_post")
        if not whole:
            yield from self._start()
        for block in range(first if whole else 0, self.weights.config.n_layers):
            inside = block == at.layer
            replaced = "mlp" if at.point in ("hook_mlp_out", "mlp.hook_post") else "attn"
            if not (inside and (at.point == "hook_resid_mid" or (not whole and replaced == "attn"))):
                yield from self._attention(block)
            if not (inside and not whole and replaced == "mlp"):
                yield from self._mlp(block)
        yield from self._latents(at, self.dictionary)

    def _latents(self, at: HookName, sae: Dictionary) -> Parts:
        back, bias = self._at_point(at)
        x = self.cache[str(at)].flatten(2)
        codes = sae.encode(x.reshape(-1, sae.d_in))
        dense = codes.to_dense()
        alive = (dense != 0).any(0).nonzero()[:, 0]
        shape = x.shape[:2]
        firing = dense[:, alive].view(*shape, -1).to(back)
        latents = firing * (back @ sae.W_dec[alive].to(back).T)
        b_dec = back @ sae.b_dec.to(back)
        whole = (x.to(back) * back).sum(-1)
        yield [f"F{int(i)}" for i in alive], latents.permute(2, 0, 1)
        yield ["b_dec", "error"], torch.stack([b_dec, whole - latents.sum(-1) - b_dec])
        if bias is not None:
            yield [bias[0]], bias[1][None]

    # ---- parts --------------------------------------------------------------------------------------------------------

    def _start(self) -> Parts:
        """What enters the first block."""
        spec, g = self.weights.spec, self._stream
        if spec.pos_embed and not spec.shortformer:
            parts = [(name, self.cache[f"hook_{name}"]) for name in ("embed", "pos_embed")]
        else:
            parts = [("embed", self.cache["resid_pre", 0])]
        for label, x in parts:
            yield [label], self._along(x, g)

    def _attention(self, block: int) -> Parts:
        if self.weights.spec.has_attn:
            yield [f"L{block}.attn"], self._along(self.cache["attn_out", block], self._stream)

    def _mlp(self, block: int) -> Parts:
        if self.weights.spec.has_mlp:
            yield [f"L{block}.mlp"], self._along(self.cache["mlp_out", block], self._stream)

    def _outside(self) -> tuple[list[str], Figures]:
        """What does not depend on the stream: the final norm's bias and the unembedding's."""
        u, b = self.direction
        norm, g = self.weights.ln_final, self._stream
        shift = torch.zeros_like(b) if norm is None or norm.bias is None else u @ norm.bias.to(u)
        return ["ln_final.bias", "b_U"], torch.stack([shift, b])[..., None].expand(2, *g.shape[:2])

    @staticmethod
    def _along(x: Tensor, g: Direction) -> Figures:
        return (x.to(g).expand_as(g) * g).sum(-1)[None]

    # ---- directions -----------------------------------------------------------------------------------------------------

    @property
    def weights(self) -> Weights:
        return self.model.weights

    @cached_property
    def _stream(self) -> Direction:
        """g: what the stream is multiplied with."""
        u = self.direction[0][:, None]
        norm = self.weights.ln_final
        if norm is None:
            return u.expand(-1, self.cache["unembed.hook_out"].shape[1], -1)
        return pulled_back(norm, u, self.cache["ln_final.hook_scale"])

    def _behind(self, block: int, post: Literal["ln1_post", "ln2_post"]) -> Direction:
        """The direction of what attention or MLP gives before the norm behind it, if there is one."""
        norm = self.weights.block(block).norm(post)
        return self._stream if norm is None else pulled_back(norm, self._stream, self.cache["scale", block, post])

    def _at_point(
        self, at: HookName
    ) -> tuple[Float[Tensor, "batch pos d_in"], tuple[str, Float[Tensor, "batch pos"]] | None]:
        """The direction of the logits at a dictionary's point, and the bias that is added behind it."""
        assert at.layer is not None
        if at.point in _STREAM or at.point in ("hook_attn_out", "hook_mlp_out"):
            return self._stream, None
        if at.point == "attn.hook_z":
            back, W = self._behind(at.layer, "ln1_post"), self.weights.W_O[at.layer].flatten(0, 1)
            return back @ W.to(back).T, (f"L{at.layer}.b_O", back @ self.weights.b_O[at.layer].to(back))
        back, W = self._behind(at.layer, "ln2_post"), self.weights.W_out[at.layer]
        return back @ W.to(back).T, (f"L{at.layer}.b_out", back @ self.weights.b_out[at.layer].to(back))


_STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
_POINTS = (*_STREAM, "hook_attn_out", "hook_mlp_out", "attn.hook_z", "mlp.hook_post")


def pulled_back(norm: Norm, g: Float[Tensor, "*batch d_model"], scale: Float[Tensor, "*rows one"]) -> Direction:
    """The adjoint of `Norm.linear`: x · pulled_back(g) = linear(x) · g for every x, at this denominator."""
    back = g * norm.weight.to(g) / scale.to(g)
    return back - back.mean(-1, keepdim=True) if norm.centres else back


def _direction(
    model: HookedModel, right: Int[Tensor, " batch"], wrong: Int[Tensor, " batch"] | None
) -> tuple[Float[Tensor, "batch d_model"], Float[Tensor, " batch"]]:
    """The answers' unembedding vectors and biases, less those of the wrong ones."""
    W_U, b_U = model.weights.W_U, model.weights.b_U
    precise = torch.float64 if model.dtype == torch.float64 else torch.float32

    def of(tokens: Tensor) -> tuple[Tensor, Tensor]:
        return W_U[:, tokens].T.to(precise), b_U[tokens].to(precise)

    u, b = of(right.to(model.device))
    if wrong is None:
        return u, b
    other, b_other = of(wrong.to(model.device))
    return u - other, b - b_other


def _difference(
    logits: Float[Tensor, "batch pos d_vocab"], right: Tensor, wrong: Tensor | None
) -> Float[Tensor, "batch pos"]:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    rows = torch.arange(len(wide), device=wide.device)
    value = wide[rows, :, right.to(wide.device)]
    return value if wrong is None else value - wide[rows, :, wrong.to(wide.device)]


def _for_each(answers: Int[Tensor, " answers"], n: int) -> Int[Tensor, " batch"]:
    if len(answers) not in (1, n):
        raise InputError("There must be one answer, or one for each prompt", got=len(answers), expected=n)
    return answers.expand(n)


def _names(model: HookedModel, by: By, dictionary: Dictionary | None) -> list[str]:
    """What the parts are made from; the model's own points among them are kept."""
    spec = model.spec
    names = ["blocks.0.hook_resid_pre", "unembed.hook_out"]
    names += ["hook_embed", "hook_pos_embed"] if spec.pos_embed else []
    names += ["ln_final.hook_scale"] if spec.ln_final else []
    names += ["blocks.*.hook_mlp_out"] if spec.has_mlp else []
    if spec.has_attn:
        names.append("blocks.*.attn.hook_z" if by == "head" else "blocks.*.hook_attn_out")
    names += [f"blocks.*.{post}.hook_scale" for post in ("ln1_post", "ln2_post") if getattr(spec, post)]
    if by == "neuron":
        names.append("blocks.*.mlp.hook_post")
    return names if dictionary is None else [*names, dictionary.hook_name]


def _check(model: HookedModel, by: By, dictionary: Dictionary | None) -> None:
    spec = model.spec
    if by not in _BY:
        raise unknown_name("way to split", by, _BY, InputError)
    Readout(model)
    if not spec.additive:
        raise ModelError(f"The residual stream of {spec.name} is no sum: each block norms it after adding to it")
    if by == "head" and not spec.has_attn:
        raise ModelError("The blocks of this model have no attention, and so no heads")
    if by in ("mlp", "neuron") and not spec.has_mlp:
        raise ModelError("The blocks of this model have no MLP")
    if by == "neuron" and isinstance(spec.mlp, Experts):
        raise ModelError("The MLP is a mixture of experts: its neurons have no single weight matrix", fix='by="mlp"')
    if (by == "feature") != (dictionary is not None):
        raise InputError('A dictionary is needed for by="feature", and for nothing else')
    if dictionary is not None:
        check_fit(model, dictionary)
        at = HookName.parse(dictionary.hook_name)
        if at.point not in _POINTS or at.head is not None:
            raise ModelError(
                "What a dictionary at this point stands for is not written into the stream",
                got=dictionary.hook_name,
                expected=f"a point such as {', '.join(_POINTS)}",
            )


def _check_sum(residual: Float[Tensor, "batch pos"], values: Figures, tolerance: float) -> None:
    size = values.abs().sum(0) + 1e-6
    off = (residual.abs() / size).max()
    if not float(off) <= tolerance:
        raise ModelError(
            "The parts do not add up to the model's own logits",
            got=f"off by {float(off):.2g} of their total size",
            expected=f"at most {tolerance:.2g}",
            fix="Was the model edited, or does it run in half precision? float32 is exact enough",
        )


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-4 if dtype in (torch.float32, torch.float64) else 0.05


def _notes(model: HookedModel) -> tuple[str, ...]:
    notes = ["the final norm's denominator is held at the run's own value"] if model.spec.ln_final else []
    if model.spec.ln1_post or model.spec.ln2_post:
        notes.append("so are those of the norms behind attention and MLP")
    cap = Readout(model).softcap
    if cap is not None:
        notes.append(f"logits before the soft-cap of {cap:g}; `capped` has the difference after it")
    return tuple(notes)
