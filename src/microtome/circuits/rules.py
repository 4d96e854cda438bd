"""Rules of propagation: what a backward pass takes as constant, where plain gradients mislead.

A gradient says what an infinitely small change does; patching makes a large one. The rules replace the slope of a
nonlinearity by a number that is true for the whole of its input. Forward values stay as they are (to a rounding error).

    frozen_norms         a norm's denominator is a constant ("LN-rule", Ali et al. 2022)
    frozen_patterns      attention weights are constants, so queries and keys get nothing ("AH-rule", Ali et al. 2022)
    identity_activations act(x) counts as (act(x) / x) · x, the quotient a constant ("identity rule")
    half_gates           of a product act(gate) · up each factor gets half ("half rule", Arras et al. 2019)

`RELP` is the choice of relevance patching (Rezaei Jafari et al. 2025, arXiv 2508.21258): all but frozen patterns.
"""

import torch
from torch import Tensor

from microtome.circuits.attribution_config import Rules
from microtome.common.errors import ModelError
from microtome.model.hooked import HookedModel
from microtome.model.names import HookName
from microtome.model.specs import Dense, Experts
from microtome.model.taps import Tap

_SMALL = 1e-6  # below it an activation function's quotient act(x) / x is noise


def rule_taps(rules: Rules, model: HookedModel) -> list[Tap]:
    """What makes a model's backward pass follow the rules. Raises ModelError for MLP rules on experts."""
    taps: list[Tap] = []
    if rules.frozen_norms:
        taps += [Tap(name, Tensor.detach, through=True) for name in model.resolve(_is_scale)]
    if rules.frozen_patterns and model.spec.has_attn:
        taps += [Tap(name, Tensor.detach, through=True) for name in model.resolve("blocks.*.attn.hook_pattern")]
    if (rules.identity_activations or rules.half_gates) and model.spec.has_mlp:
        for layer in range(model.config.n_layers):
            taps += _mlp_taps(model, layer, rules)
    return taps


def _is_scale(name: str) -> bool:
    return name.endswith("hook_scale")


def _mlp_taps(model: HookedModel, layer: int, rules: Rules) -> list[Tap]:
    mlp = model.spec.mlp
    if isinstance(mlp, Experts):
        raise ModelError(
            "The rules identity_activations and half_gates need one activation function for all tokens, and in a mixture of "
            "experts each token has those of its own experts",
            got=f"the rules {rules} for {model.name}",
            expected="no rules, frozen_norms or frozen_patterns",
            fix="Say rules=Rules(frozen_norms=True, frozen_patterns=True), or --rule frozen_norms",
        )
    seen: dict[str, Tensor] = {}

    def keep(point: str) -> Tap:
        def tap(activation: Tensor) -> None:
            seen[point] = activation

        return Tap(HookName(f"mlp.hook_{point}", layer), tap, reads=True)

    if isinstance(mlp, Dense):
        if not rules.identity_activations:
            return []

        def pointwise(post: Tensor) -> Tensor:
            return _valued(post, _share(seen.pop("pre"), post))

        # SoLU models norm between activation function and output: the function's own result is hook_mid.
        return [
            keep("pre"),
            Tap(HookName("mlp.hook_mid" if mlp.norm else "mlp.hook_post", layer), pointwise, through=True),
        ]

    def gated(post: Tensor) -> Tensor:
        gate, up = seen.pop("pre"), seen.pop("pre_linear")
        if not rules.identity_activations:
            return _valued(post, post / 2)
        shares = _share(gate, post) + _share(up, post)
        return _valued(post, shares / 2 if rules.half_gates else shares)

    return [keep("pre"), keep("pre_linear"), Tap(HookName("mlp.hook_post", layer), gated, through=True)]


def _share(x: Tensor, y: Tensor) -> Tensor:
    """y as a multiple of x, the factor a constant; no share where x is 0."""
    factor = torch.where(x.abs() < _SMALL, 0.0, y / torch.where(x.abs() < _SMALL, 1.0, x))
    return x * factor.detach()


def _valued(value: Tensor, gradient: Tensor) -> Tensor:
    """The value of one tensor with the gradient of another."""
    return value.detach() + (gradient - gradient.detach())
