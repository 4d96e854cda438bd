"""Dictionaries of models with centred writing weights: the mean over d_model is taken away inside the encoder."""

import json
from pathlib import Path

import pytest
import torch
from tests.dictionary.test_formats import FIXTURES, made_of, x_of
from transformers import GPT2Config, GPT2LMHeadModel

from microtome.dictionary import Origin, load_dictionary, save_dictionary
from microtome.dictionary.formats import read_dictionary


@pytest.mark.parametrize("name", ["standard", "standard_plain", "gated", "jumprelu"])
def test_a_model_with_centred_writing_weights(name: str, tmp_path: Path) -> None:
    """Trained on activations of mean zero: on those as they are, the codes are what SAELens's are on the centred ones."""
    source = FIXTURES / "saelens" / name
    cfg = json.loads((source / "cfg.json").read_text())
    cfg["metadata"]["model_from_pretrained_kwargs"] = {"center_writing_weights": True, "fold_ln": False}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    (tmp_path / "sae_weights.safetensors").write_bytes((source / "sae_weights.safetensors").read_bytes())
    reading = read_dictionary(tmp_path)
    plain, x = load_dictionary(source), x_of() + 3
    centred = x - x.mean(1, keepdim=True)
    torch.testing.assert_close(
        reading.dictionary.encode(x).to_dense(), plain.encode(centred).to_dense(), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(reading.dictionary(x), plain(centred), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain(x), plain(centred), atol=1e-2)
    assert "fold_ln=False" in reading.notes[0]
    assert "mean over d_model" in reading.notes[1]


def test_centred_writing_weights_take_the_mean_from_the_stream() -> None:
    """What the folding rests on, on a GPT-2: centring all that writes leaves the logits and takes each row's mean away."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=12, n_layer=2, n_head=2, initializer_range=0.3)
    model, centred = GPT2LMHeadModel(config).eval(), GPT2LMHeadModel(config).eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for key, value in state.items():
        if key.endswith(("wte.weight", "wpe.weight", "c_proj.weight", "c_proj.bias")):
            state[key] = value - value.mean(-1, keepdim=True)
    state["lm_head.weight"] = model.lm_head.weight.clone()
    centred.lm_head.weight = torch.nn.Parameter(centred.lm_head.weight.clone())  # else it is the embedding
    centred.load_state_dict(state)
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        before, after = model(tokens, output_hidden_states=True), centred(tokens, output_hidden_states=True)
    stream = before.hidden_states[1]
    assert stream.mean(-1).abs().max() > 0.01
    torch.testing.assert_close(after.hidden_states[1], stream - stream.mean(-1, keepdim=True), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after.logits, before.logits, atol=1e-4, rtol=1e-4)


def test_centring_does_not_touch_what_is_not_on_the_stream(tmp_path: Path) -> None:
    for folder, hook in (("z", "blocks.3.attn.hook_z"), ("post", "blocks.3.mlp.hook_post")):
        (tmp_path / folder).mkdir()
        made = made_of("standard", origin=Origin.at("tiny", hook))
        save_dictionary(made, tmp_path / folder)
        cfg = json.loads((tmp_path / folder / "cfg.json").read_text())
        cfg["metadata"]["model_from_pretrained_kwargs"] = {"center_writing_weights": True}
        (tmp_path / folder / "cfg.json").write_text(json.dumps(cfg))
        assert load_dictionary(tmp_path / folder).fingerprint == made.fingerprint
