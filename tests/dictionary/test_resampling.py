"""Resampled latents of every architecture fire again, and nothing else moves."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from microtome.dictionary.architectures import make_rule
from microtome.dictionary.config import (
    BatchTopKConfig,
    DictionaryConfig,
    GatedConfig,
    JumpReLUConfig,
    PAnnealConfig,
    ReLUConfig,
    TopKConfig,
)
from microtome.dictionary.dictionary import Origin
from microtome.dictionary.resampling import resample
from microtome.dictionary.stack import DataStatistics, Stack

D, F, N = 24, 24, 512  # as many latents as dimensions: b_dec's moments have the shape of b_enc's
SIZES: dict[str, Any] = {"d_sae": F, "revival": "resample"}
CONFIGS: dict[str, DictionaryConfig] = {
    "relu": ReLUConfig(**SIZES),
    "p-anneal": PAnnealConfig(**SIZES),
    "gated": GatedConfig(**SIZES),
    "jumprelu": JumpReLUConfig(**SIZES),
    "topk": TopKConfig(**SIZES, k=4),
    "batchtopk": BatchTopKConfig(**SIZES, k=4),
}


def rows(n: int = N) -> Float[Tensor, "1 n d"]:
    """Rows with a mean norm of √d, as training gives them to a stack."""
    return torch.randn(1, n, D, generator=torch.Generator().manual_seed(1))


def make(config: DictionaryConfig) -> Stack:
    stack = Stack([config], make_rule([config]), D, D)
    stack.initialise(DataStatistics(torch.zeros(1, D), torch.zeros(1, D), float(D)), [0])
    return stack


@pytest.mark.parametrize("norms", ["unit", "free"])
@pytest.mark.parametrize("name", CONFIGS)
def test_resampled_latents_fire_again(name: str, norms: Any) -> None:
    config, x, dead = replace(CONFIGS[name], norms=norms), rows(), torch.arange(F) % 2 == 0
    stack = make(config)
    optimiser = torch.optim.Adam(stack.parameters(), lr=1e-4)
    with torch.no_grad():
        for p in (stack.b_enc, *(q for part, q in stack.rule.named_parameters() if part == "b_mag")):
            p[0, dead] = -100.0
        for part, p in stack.rule.named_parameters():
            if part == "threshold":
                p[0, dead] = 100.0
    stack.step(x, x, variance=float(D))
    optimiser.step()
    assert not bool(stack.step(x, x, variance=float(D)).fired[0, dead].any())

    before = {part: p.detach().clone() for part, p in stack.named_parameters()}
    moments = {
        part: optimiser.state[p]["exp_avg"].clone() for part, p in stack.named_parameters() if p in optimiser.state
    }
    resample(stack, optimiser, 0, dead, x[0], x[0], generator=torch.Generator().manual_seed(0))

    assert bool(stack.step(x, x, variance=float(D)).fired[0, dead].all())
    for part, p in stack.named_parameters():
        held = torch.ones(p.shape[1], dtype=torch.bool) if part == "b_dec" else ~dead
        assert torch.equal(p[0, held], before[part][0, held])
        if part in moments:
            assert torch.equal(optimiser.state[p]["exp_avg"][0, held], moments[part][0, held])
            assert part == "b_dec" or not bool(optimiser.state[p]["exp_avg"][0, dead].any())


@pytest.mark.parametrize(
    "settings", [{"norms": "unit"}, {"norms": "free"}, {"norms": "unit", "tied": True}], ids=["unit", "free", "tied"]
)
@pytest.mark.parametrize("kind", [GatedConfig, JumpReLUConfig], ids=["gated", "jumprelu"])
def test_resampled_latents_begin_as_rare_as_others_did(kind: type[DictionaryConfig], settings: dict[str, Any]) -> None:
    """Two standard deviations of a normal row's product with theirs are needed, however long they are."""
    stack, x, dead = make(kind(**SIZES, **settings)), rows(8192), torch.arange(F) % 2 == 0
    optimiser = torch.optim.Adam(stack.parameters(), lr=1e-4)
    resample(stack, optimiser, 0, dead, x[0], x[0], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stack.b_enc[0, ~dead] = -100.0
    fresh = torch.randn(1, 8192, D, generator=torch.Generator().manual_seed(2))
    l0 = float(stack.step(fresh, fresh, variance=float(D)).l0[0])
    assert l0 / int(dead.sum()) == pytest.approx(0.0228, rel=0.1)


@pytest.mark.parametrize("settings", [{"center": False}, {"outputs": ("b",)}], ids=["uncentred", "transcoder"])
@pytest.mark.parametrize("kind", [GatedConfig, JumpReLUConfig, ReLUConfig], ids=["gated", "jumprelu", "relu"])
def test_where_the_input_is_not_centred_they_begin_as_rare(
    kind: type[DictionaryConfig], settings: dict[str, Any]
) -> None:
    """However far from the origin the rows are: their middle has pre-activations of zero, less the start."""
    stack, dead = make(kind(**SIZES, inputs=("a",), **settings)), torch.arange(F) % 2 == 0
    mean = 3 * torch.randn(D, generator=torch.Generator().manual_seed(4))
    x = rows(8192) + mean
    optimiser = torch.optim.Adam(stack.parameters(), lr=1e-4)
    resample(stack, optimiser, 0, dead, x[0], x[0], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stack.b_enc[0, ~dead] = -100.0
    fresh = mean + torch.randn(1, 8192, D, generator=torch.Generator().manual_seed(2))
    l0 = float(stack.step(fresh, fresh, variance=float(D)).l0[0])
    assert l0 / int(dead.sum()) == pytest.approx(0.5 if kind is ReLUConfig else 0.0228, rel=0.1)
    if kind is GatedConfig:  # and the magnitudes are what lies along the encoder rows
        origin = Origin(model_name="toy", inputs=("a",), outputs=("b",))
        exported, codes = stack.export(0, origin), stack.export(0, origin).encode(fresh[0]).to_dense()
        along = (fresh[0] - mean) @ exported.encoder.T
        fired = codes > 0
        torch.testing.assert_close(codes[fired], along[fired], rtol=0.1, atol=0.1)
