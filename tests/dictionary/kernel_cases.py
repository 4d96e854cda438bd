"""The kernels' products against dense twins in double precision, and training steps through them against those without.

`test_kernels.py` calls this on a GPU; and without one runs this file in a process of its own, where Triton interprets the
kernels: whether it does is decided when they are defined.
"""

import json
import re
import sys
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from microtome.dictionary import products
from microtome.dictionary.architectures import make_rule
from microtome.dictionary.config import (
    BatchTopKConfig,
    DictionaryConfig,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaConfig,
    TopKConfig,
)
from microtome.dictionary.kept import SparseKept
from microtome.dictionary.stack import DataStatistics, Stack

D, F, N = 9, 40, 32


@dataclass(frozen=True)
class Case:
    """Entries where `mask` is true, `d` numbers in a row of the weight, and the dtypes of weight and indices."""

    mask: Bool[Tensor, "n f"]
    d: int = 7
    weight: torch.dtype = torch.float32
    index: torch.dtype = torch.int64

    def errors(self, device: torch.device | str) -> dict[str, float]:
        """The largest error of each product, as a share of the largest value."""
        from microtome.dictionary import kernels

        n, f = self.mask.shape
        x, weight, g = (
            _normal(n, self.d, seed=1),
            _normal(f, self.d, seed=2).to(self.weight),
            _normal(n, self.d, seed=3),
        )
        entries = SparseKept.of_mask(self.mask[None].to(device))
        columns, starts = entries.latents.to(self.index), entries.starts.to(self.index)
        values = _normal(len(columns), seed=4)
        codes = torch.zeros(n, f, dtype=torch.float64)
        codes[self.mask] = values.double()
        x, weight, g, values = (each.to(device) for each in (x, weight, g, values))
        twin = products.Transpose(columns, entries.rows, f)
        turned = kernels.weighted_sums(twin.rows.to(self.index), twin.starts.to(self.index), values[twin.order], g)
        exact = {
            "decode": codes @ weight.double().cpu(),
            "at_entries": (x.double() @ weight.double().T).cpu()[self.mask],
            "scatter": codes.T @ g.double().cpu(),
        }
        found = {
            "decode": kernels.weighted_sums(columns, starts, values, weight),
            "at_entries": kernels.sampled_products(columns, starts, x, weight),
            "scatter": turned,
        }
        return {name: _error(found[name], exact[name]) for name in exact}


def _mask(share: float = 0.2, n: int = N, f: int = F) -> Bool[Tensor, "n f"]:
    """Random, with empty rows and columns; a row and a column that are full and longer than a tile."""
    chosen = torch.rand(n, f, generator=torch.Generator().manual_seed(0)) < share
    chosen[4], chosen[:, 6] = share > 0, share > 0
    chosen[[0, 3, n - 1]], chosen[:, [0, 5, f - 1]] = False, False
    return chosen


CASES = {
    "a few numbers": Case(_mask()),
    "one number": Case(_mask(), d=1),
    "more than a block": Case(_mask(), d=150),
    "weights in bf16": Case(_mask(), d=20, weight=torch.bfloat16),
    "short indices": Case(_mask(), index=torch.int32),
    "no entries": Case(_mask(0.0)),
    "one entry": Case(_mask(0.0).index_put((torch.tensor(2), torch.tensor(9)), torch.tensor(True))),
}
ARCHITECTURES: dict[str, DictionaryConfig] = {
    "topk": TopKConfig(d_sae=F, k=4, dead_after=2 * N, aux_k=3),
    "transcoder": TopKConfig(d_sae=F, k=4, inputs=("a",), outputs=("b",)),
    "batchtopk": BatchTopKConfig(d_sae=F, k=4),
    "matryoshka": MatryoshkaConfig(d_sae=F, k=4, prefixes=(0.25, 1.0)),
    "jumprelu": JumpReLUConfig(d_sae=F, tied=True),
    "gated": GatedConfig(d_sae=F),
}


def weights(config: DictionaryConfig, device: torch.device | str, steps: int = 2) -> dict[str, Float[Tensor, "..."]]:
    """The parameters and gradients of two stacked dictionaries after a few steps, by sparse products."""
    rule = make_rule([config, config])
    rule.products = "sparse"
    stack = Stack([config, config], rule, D, D)
    stack.initialise(DataStatistics(torch.zeros(2, D), torch.zeros(2, D), float(D)), [0, 1])
    stack.to(device)
    optimiser = torch.optim.SGD(stack.parameters(), lr=0.1)
    dead = (torch.arange(2 * F) % 4 == 0).view(2, F).to(device)
    for step in range(steps):
        x, y = (3 * _normal(1, N, D, seed=10 + step + other).to(device) for other in (0, 5 * config.is_transcoder))
        stack.step(x, y, variance=9.0 * D, fraction=step / steps, dead=dead)
        stack.before_update()
        optimiser.step()
        stack.after_update()
    made = {name: p.detach().cpu() for name, p in stack.named_parameters()}
    gradients = {f"{name}.grad": p.grad.cpu() for name, p in stack.named_parameters() if p.grad is not None}
    return {**made, **gradients}


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest, as a share of the largest value of each tensor."""
    assert a.keys() == b.keys()
    return max(_error(a[name], b[name].double()) for name in a)


def _error(found: Tensor, exact: Float[Tensor, "..."]) -> float:
    assert found.shape == exact.shape
    assert found.dtype == torch.float32
    if not exact.numel():
        return 0.0
    return float((found.cpu().double() - exact).abs().max() / exact.abs().max().clamp_min(1e-3))


def _normal(*shape: int, seed: int) -> Float[Tensor, "..."]:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def interpreted() -> dict[str, dict[str, float]]:
    """Every error, of the interpreted kernels on the CPU."""
    found = {name: case.errors("cpu") for name, case in CASES.items()}
    without = {name: weights(config, "cpu") for name, config in ARCHITECTURES.items()}
    products._by_kernels = lambda weight: True
    steps = {name: difference(weights(config, "cpu"), without[name]) for name, config in ARCHITECTURES.items()}
    return {**found, "steps": steps}


def compiled() -> dict[str, dict[str, int]]:
    """For each kernel and GPU architecture how many stores and atomic operations the machine's program has. No GPU is needed."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from microtome.dictionary import kernels

    found = {}
    for name, types in (
        ("_weighted_sums", "*i64 *i64 *fp32 *bf16 *fp32 i32"),
        ("_sampled_products", "*i32 *i64 *fp32 *fp32 *fp32 i32 i32"),
    ):
        kernel = getattr(kernels, name)
        signature = dict(zip(kernel.arg_names, [*types.split(), "constexpr", "constexpr"], strict=True))
        source = ASTSource(fn=kernel, signature=signature, constexprs={"TILE": 16, "BLOCK": 128})
        for capability in (80, 90):
            program = compile_kernel(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
            counts = {"stores": program.count("st.global"), "atomics": len(re.findall(r"\b(atom|red)\.", program))}
            found[f"{name} sm_{capability}"] = counts
    return found


if __name__ == "__main__":
    print(json.dumps({"interpreted": interpreted, "compiled": compiled}[sys.argv[1]]()))
