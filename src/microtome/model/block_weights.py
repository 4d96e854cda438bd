"""The weights of one block in TransformerLens's layout, as views of the model's own parameters."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from microtome.common.errors import ModelError
from microtome.model.specs import Dense, Experts, FamilySpec, ModelConfig, Part, projection


@dataclass(frozen=True)
class BlockWeights:
    """Weights of the block `module`. A bias that the family has not is zeros; a weight that it has not is a
    ModelError."""

    module: nn.Module
    spec: FamilySpec
    config: ModelConfig

    # ---- attention --------------------------------------------------------------------------------------------------

    @property
    def W_Q(self) -> Float[Tensor, "n_heads d_model d_head"]:  # noqa: N802
        return self._heads("q")

    @property
    def W_K(self) -> Float[Tensor, "n_kv_heads d_model d_head"]:  # noqa: N802
        return self._heads("k")

    @property
    def W_V(self) -> Float[Tensor, "n_kv_heads d_model d_head"]:  # noqa: N802
        return self._heads("v")

    @property
    def W_O(self) -> Float[Tensor, "n_heads d_head d_model"]:  # noqa: N802
        return self._matrix(self.spec.o).unflatten(0, (self.config.n_heads, self.config.d_head))

    @property
    def b_Q(self) -> Float[Tensor, "n_heads d_head"]:  # noqa: N802
        return self._part_bias("q")

    @property
    def b_K(self) -> Float[Tensor, "n_kv_heads d_head"]:  # noqa: N802
        return self._part_bias("k")

    @property
    def b_V(self) -> Float[Tensor, "n_kv_heads d_head"]:  # noqa: N802
        return self._part_bias("v")

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:  # noqa: N802
        return self._bias(self.spec.o)

    def of(self, part: Part) -> tuple[Tensor, Tensor]:
        """Weight and bias of one projection of q, k or v: `[head, d_model, d_head]` and `[head, d_head]`."""
        return self._heads(part), self._part_bias(part)

    # ---- MLP --------------------------------------------------------------------------------------------------------

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:  # noqa: N802
        return self._neurons("up")

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:  # noqa: N802
        if isinstance(self.spec.mlp, Dense):
            raise ModelError(f"The MLP of the family {self.spec.name} has no gate", fix="Its input weights are W_in")
        return self._neurons("gate")

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:  # noqa: N802
        return self._matrix(self._dense().down)

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"]:
        self._dense()
        return self._part_bias("up")

    @property
    def b_gate(self) -> Float[Tensor, " d_mlp"]:
        self._dense()
        return self._part_bias("gate")

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        return self._bias(self._dense().down)

    # ---- how --------------------------------------------------------------------------------------------------------

    def _heads(self, part: Part) -> Tensor:
        path, view = projection(self.spec, self.config, part)
        return view.read(self._matrix(path)).transpose(0, 1)

    def _neurons(self, part: Part) -> Tensor:
        self._dense()
        path, view = projection(self.spec, self.config, part)
        return view.read(self._matrix(path))

    def _part_bias(self, part: Part) -> Tensor:
        path, view = projection(self.spec, self.config, part)
        return view.read(self._bias(path))

    def _dense(self) -> "Dense | object":
        if isinstance(self.spec.mlp, Experts):
            raise ModelError("The MLP is a mixture of experts: it has no single weight matrix", fix="experts(j) has one")
        return self.spec.mlp

    def _matrix(self, path: str) -> Float[Tensor, "d_in d_out"]:
        """The weight of a linear map, input first. GPT-2's `Conv1D` stores it so, `Linear` the other way round."""
        module = self.module.get_submodule(path)
        weight = module.get_parameter("weight")
        if not weight.is_floating_point():
            raise ModelError(
                "The weights are quantised: there is no view of them", got=str(weight.dtype), fix="Load with a float dtype"
            )
        return weight if isinstance(module, Conv1D) else weight.T

    def _bias(self, path: str) -> Float[Tensor, " d_out"]:
        module = self.module.get_submodule(path)
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            return bias
        weight = module.get_parameter("weight")
        return torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
