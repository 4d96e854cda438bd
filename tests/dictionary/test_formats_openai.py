"""OpenAI's checkpoints against a twin of their autoencoder, written from what `model.py` of their repository computes and saves."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from microtome.common.errors import ArtifactError
from microtome.dictionary import load_dictionary
from microtome.dictionary.formats import read_dictionary

D, F, K = 12, 24, 4


class TopK(nn.Module):
    """Keeps the k largest, after which `postact_fn` works on what is kept."""

    def __init__(self, postact_fn: nn.Module) -> None:
        super().__init__()
        self.postact_fn = postact_fn

    def forward(self, pre: Tensor) -> Tensor:
        edge = pre.sort(dim=-1, descending=True).values[:, K - 1 : K]
        return torch.where(pre >= edge, self.postact_fn(pre), 0)

    @property
    def numbers(self) -> dict[str, object]:
        """What its state has beside that of any module."""
        return {"k": K, "postact_fn": type(self.postact_fn).__name__}


class Tied(nn.Module):
    """The encoder, backwards."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, latents: Tensor) -> Tensor:
        return latents @ self.linear.weight


class Autoencoder(nn.Module):
    """Activation of an encoder of x − pre_bias; a decoder, plus pre_bias. TopK goes with inputs of mean 0 and deviation 1."""

    def __init__(self, activation: nn.Module, *, tied: bool = False) -> None:
        super().__init__()
        self.pre_bias, self.latent_bias = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(F))
        self.encoder = nn.Linear(D, F, bias=False)
        self.decoder = Tied(self.encoder) if tied else nn.Linear(F, D, bias=False)
        self.activation, self.normed = activation, isinstance(activation, TopK)
        self.register_buffer("stats_last_nonzero", torch.zeros(F, dtype=torch.long))
        self.register_buffer("latents_activation_frequency", torch.ones(F))
        self.register_buffer("latents_mean_square", torch.full((F,), torch.nan))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The latents, and what is made of them."""
        mean = x.mean(1, keepdim=True) if self.normed else torch.zeros(len(x), 1)
        deviation = (x - mean).square().sum(1, keepdim=True).div(D - 1).sqrt()
        rows = (x - mean) / (deviation + 1e-5) if self.normed else x
        latents = self.activation(functional.linear(rows - self.pre_bias, self.encoder.weight, self.latent_bias))
        out = self.decoder(latents) + self.pre_bias
        return latents, out * deviation + mean if self.normed else out

    def save(self, file: Path) -> None:
        """Its state, the activation's class by name, and the activation's own state."""
        state = {name: value for name, value in super().state_dict().items() if not name.startswith("activation.")}
        inside: dict[str, object] = self.activation.state_dict()  # of PyTorch's own class of dict, with an attribute
        inside.update(self.activation.numbers if isinstance(self.activation, TopK) else {})
        said = {"activation": type(self.activation).__name__, "activation_state_dict": inside}
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({**state, **said}, file)


def relu() -> nn.Module:
    return nn.ReLU()


def topk() -> nn.Module:
    return TopK(nn.ReLU())


@pytest.mark.parametrize(
    ("activation", "tied", "architecture"),
    [(relu, False, "standard"), (topk, False, "topk"), (relu, True, "standard"), (topk, True, "topk")],
    ids=["v1", "v5", "v1-tied", "v5-tied"],
)
def test_latents_and_reconstructions(
    activation: Callable[[], nn.Module], tied: bool, architecture: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    theirs, file = Autoencoder(activation(), tied=tied), tmp_path / "8.pt"
    theirs.save(file)
    made = load_dictionary(file, hook_name="blocks.8.hook_resid_post", model_name="gpt2")
    x = torch.randn(50, D) * 3 + 1
    with torch.no_grad():
        latents, out = theirs(x)
    torch.testing.assert_close(made.encode(x).to_dense(), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made(x), out, atol=1e-5, rtol=1e-5)
    assert (made.hook_name, made.architecture) == ("blocks.8.hook_resid_post", architecture)
    assert load_dictionary(tmp_path).fingerprint == made.fingerprint
    notes = read_dictionary(tmp_path).notes
    assert ("the input is layer-normalised" in notes) == (architecture == "topk")
    assert ("encoder and decoder are tied" in notes) == tied
    assert "give hook_name" in notes[-1]


@pytest.mark.parametrize(
    ("place", "point"),
    [
        ("mlp_post_act/autoencoders/3.pt", "blocks.3.mlp.hook_post"),
        ("resid_delta_mlp_v4/autoencoders/0.pt", "blocks.0.hook_mlp_out"),
        ("resid_delta_attn_v5_128k/autoencoders/11.pt", "blocks.11.hook_attn_out"),
        ("resid_post_attn_v5_32k/autoencoders/6.pt", "blocks.6.hook_resid_mid"),
        ("resid_post_mlp_v5_32k/autoencoders/8.pt", "blocks.8.hook_resid_post"),
        ("resid_pre_v9/autoencoders/8.pt", "unknown"),
    ],
)
def test_where_their_storage_says_that_it_belongs(place: str, point: str, tmp_path: Path) -> None:
    Autoencoder(topk()).save(tmp_path / "gpt2-small" / place)
    made = load_dictionary(tmp_path / "gpt2-small" / place)
    assert (made.hook_name, made.model_name) == (point, "unknown" if point == "unknown" else "gpt2")


def changed(tmp_path: Path, **values: object) -> Path:
    """A file of theirs with other values; "gone" takes one away."""
    Autoencoder(topk(), tied="decoder.linear.weight" in values).save(tmp_path / "8.pt")
    state = {**torch.load(tmp_path / "8.pt", weights_only=True), **values}
    torch.save({name: value for name, value in state.items() if str(value) != "gone"}, tmp_path / "8.pt")
    return tmp_path / "8.pt"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"activation_state_dict": {"k": K, "postact_fn": "Identity"}}, "activation 'TopK' with {'k': 4"),
        ({"activation_state_dict": {"postact_fn": "ReLU"}}, "activation 'TopK'"),
        ({"activation_state_dict": {"k": K}}, "activation 'TopK'"),
        ({"activation_state_dict": {}}, "activation 'TopK'"),
        ({"activation_state_dict": {"k": F + 1, "postact_fn": "ReLU"}}, f"k {F + 1}, d_sae {F}"),
        ({"activation_state_dict": {"k": True, "postact_fn": "ReLU"}}, "'k': True.*a positive integer k"),
        ({"activation_state_dict": ["k", K]}, r"activation 'TopK' with \['k', 4\]"),
        ({"activation_state_dict": 3}, "activation 'TopK' with 3"),
        ({"activation": "Identity"}, "activation 'Identity'"),
        ({"activation": "Softplus"}, "activation 'Softplus'"),  # theirs takes it for a ReLU
        ({"decoder.weight": "gone"}, "decoder.weight None"),
        ({"decoder.linear.weight": torch.zeros(F, D)}, "a tied decoder that differs"),
        ({"latent_bias": "gone"}, "latent_bias None"),
    ],
)
def test_what_cannot_be_read(values: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=message):
        load_dictionary(changed(tmp_path, **values))


def test_figures_beside_a_dictionary_are_no_config(tmp_path: Path) -> None:
    """`microtome evaluate` leaves metrics.json in a folder, and 8.pt-metrics.json beside a file."""
    file = changed(tmp_path)
    made = load_dictionary(file).fingerprint
    for name in ("metrics.json", "8.pt-metrics.json"):
        (tmp_path / name).write_text("{}")
        assert load_dictionary(tmp_path).fingerprint == made
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="no dictionary"):
        load_dictionary(tmp_path)
