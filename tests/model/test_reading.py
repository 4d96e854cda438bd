"""Likely tokens, losses and near tokens, against plain arithmetic and the library's own loss."""

import pytest
import torch

from microtome.common.errors import InputError
from microtome.model import HookedModel

TEXTS = ["naïve café 🦀 and 東京", "def f(x):\n\treturn x  # ok", "Ωμέγα 🏳️‍🌈 ﷽"]


@pytest.mark.parametrize("text", TEXTS)
def test_token_strings_join_to_the_text(smol: HookedModel, tiny_llama: HookedModel, text: str) -> None:
    for model in (smol, tiny_llama):
        strings = model.to_str_tokens(text, prepend_bos=False)
        assert "".join(strings) == text
        assert len(strings) == model.to_tokens(text, prepend_bos=False).shape[1]
        assert not any("\ufffd" in string for string in strings)
    assert smol.to_str_tokens("The cat")[0] == "<|im_start|>"
    assert smol.to_str_tokens(smol.to_tokens("The cat")[0]) == smol.to_str_tokens("The cat")


def test_top_next_tokens_are_the_largest_probabilities(smol: HookedModel) -> None:
    prompt = "When Mary and John went to the store, John gave a drink to"
    found = smol.top_next_tokens(prompt, k=5)
    probabilities = smol(prompt)[0, -1].double().softmax(-1)
    assert found[0].text == " Mary"
    assert [f.token for f in found] == probabilities.argsort(descending=True)[:5].tolist()
    for one in found:
        assert one.score == pytest.approx(float(probabilities[one.token]), rel=1e-4)
        assert one.logit == pytest.approx(float(smol(prompt)[0, -1, one.token]))
    with pytest.raises(InputError, match="not so many tokens"):
        smol.top_next_tokens(prompt, k=10**6)


def test_losses_are_the_librarys(tiny_llama: HookedModel) -> None:
    tokens = torch.tensor([[0, 17, 45, 80, 301, 12], [0, 9, 9, 250, 61, 7]])
    losses = tiny_llama.token_losses(tokens)
    assert losses.shape == (2, 5)
    assert float(losses.mean()) == pytest.approx(float(tiny_llama.hf(input_ids=tokens, labels=tokens).loss), rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_loss(tiny_llama: HookedModel, side: str) -> None:
    batch = tiny_llama.prompts(["The cat", "The cat sat on the mat, and"], side=side)  # type: ignore[arg-type]
    losses, alone = tiny_llama.token_losses(batch), tiny_llama.token_losses("The cat")
    kept = losses[0][losses[0] != 0]
    torch.testing.assert_close(kept, alone[0])


def test_a_tokens_own_vector_is_nearest_to_itself(smol: HookedModel) -> None:
    paris = smol.to_single_token(" Paris")
    assert smol.nearest_tokens(smol.W_U[:, paris], 3)[0].token == paris
    assert smol.nearest_tokens(smol.W_E[paris], 3, to="W_E")[0].score == pytest.approx(1, rel=1e-5)
    direction = torch.randn(576, generator=torch.Generator().manual_seed(0))
    best = smol.nearest_tokens(direction, 1, by="dot")[0]
    assert best.token == int((direction @ smol.W_U).argmax())
    with pytest.raises(InputError, match="not of the residual stream"):
        smol.nearest_tokens(torch.zeros(5), 3)


def test_a_text_of_several_tokens_is_no_single_token(smol: HookedModel) -> None:
    with pytest.raises(InputError, match=r"not a single token.*iffel"):
        smol.to_single_token(" Eiffel")
