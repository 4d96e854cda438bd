"""Toy models of superposition: `n_features` features through `n_hidden` dimensions and back, several models side by side.

One module for all of Elhage et al. (2022): what differs is where there is a ReLU, whether the two matrices are one, and what
the output should be.

    h = f(W_in x),  x' = g(W_out h + b)

| model of the paper | hidden f | output g | tied | target |
|---|---|---|---|---|
| linear | linear | linear | yes | x |
| ReLU output | linear | relu | yes | x |
| ReLU hidden layer (privileged basis) | relu | relu | yes | x |
| computation in superposition | relu | relu | no | abs(x) |
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from microtome.common.config import require
from microtome.common.device import generator
from microtome.common.errors import InputError

Activation = Literal["linear", "relu"]
_ACTIVATIONS = {"linear": lambda x: x, "relu": torch.relu}


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """Sizes, and which of the table's models. `seed` is for the start: Xavier's normal distribution, biases 0."""

    n_features: int
    n_hidden: int
    n_instances: int = 1
    hidden: Activation = "linear"
    output: Activation = "relu"
    tied: bool = True
    target: Literal["same", "absolute"] = "same"
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = (self.n_features, self.n_hidden, self.n_instances)
        require(min(sizes) > 0, "n_features, n_hidden and n_instances must be positive", got=sizes)
        for name in ("hidden", "output"):
            value = getattr(self, name)
            require(value in _ACTIVATIONS, f"{name} is 'linear' or 'relu'", got=repr(value))


class ToyModel(nn.Module):
    """`n_instances` models in one set of batched matrices; they share nothing but the arithmetic.

    `W_in` is `[instance, hidden, feature]`: column i is the direction of feature i (W_i in the paper). `W_out`
    `[instance, feature, hidden]` is its transpose where the model is tied. `b` is `[instance, feature]`.
    """

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        shape = (config.n_instances, config.n_hidden, config.n_features)
        std = (2 / (config.n_hidden + config.n_features)) ** 0.5
        rng = generator(config.seed, "toy model")
        self.W_in = nn.Parameter(torch.randn(shape, generator=rng) * std)
        self.W_untied: nn.Parameter | None = None
        if not config.tied:
            self.W_untied = nn.Parameter(torch.randn(shape, generator=rng).transpose(1, 2) * std)
        self.b = nn.Parameter(torch.zeros(config.n_instances, config.n_features))

    @property
    def W_out(self) -> Float[Tensor, "instance feature hidden"]:  # noqa: N802
        return self.W_in.transpose(1, 2) if self.W_untied is None else self.W_untied

    def encode(self, x: Float[Tensor, "instance batch feature"]) -> Float[Tensor, "instance batch hidden"]:
        """What the hidden layer holds. Raises InputError for a batch of other sizes."""
        c = self.config
        if x.shape[0] != c.n_instances or x.shape[2] != c.n_features:
            raise InputError(
                "The batch does not fit the toy model",
                got=list(x.shape),
                expected=[c.n_instances, "batch", c.n_features],
            )
        result: Tensor = _ACTIVATIONS[c.hidden](x @ self.W_in.transpose(1, 2))
        return result

    def decode(self, h: Float[Tensor, "instance batch hidden"]) -> Float[Tensor, "instance batch feature"]:
        """The output that the hidden layer `h` gives."""
        result: Tensor = _ACTIVATIONS[self.config.output](torch.baddbmm(self.b[:, None], h, self.W_out.transpose(1, 2)))
        return result

    def forward(self, x: Float[Tensor, "instance batch feature"]) -> Float[Tensor, "instance batch feature"]:
        return self.decode(self.encode(x))

    def target(self, x: Float[Tensor, "instance batch feature"]) -> Float[Tensor, "instance batch feature"]:
        """What the output should be: the input, or its absolute value."""
        return x if self.config.target == "same" else x.abs()

    def loss(
        self,
        x: Float[Tensor, "instance batch feature"],
        importance: Float[Tensor, "#instance feature"] | None = None,
    ) -> Float[Tensor, " instance"]:
        """Mean over batch and features of I_i (x_i − x'_i)², for each instance."""
        error = (self(x) - self.target(x)).square()
        weighted = error if importance is None else error * importance[:, None]
        result: Tensor = weighted.mean(dim=(1, 2))
        return result

    def take(self, instances: Tensor | list[int]) -> "ToyModel":
        """A model of some of the instances (copies of their weights)."""
        index = torch.as_tensor(instances)
        chosen = ToyModel(ToyConfig(**{**self.config.__dict__, "n_instances": len(index)}))
        chosen.load_state_dict({name: value[index] for name, value in self.state_dict().items()})
        return chosen

    @torch.no_grad()
    def rotated(self, rotation: Float[Tensor, "hidden hidden"]) -> "ToyModel":
        """The model with its hidden space turned: W → OW. With a linear hidden layer the outputs stay the same."""
        turned = self.take(list(range(self.config.n_instances)))
        turned.W_in.copy_(rotation @ self.W_in)
        if turned.W_untied is not None:
            turned.W_untied.copy_(self.W_out @ rotation.T)
        return turned
