"""Small real things for tests: a random Llama, a random dictionary saved as a user has it, and the tiny texts tokenized."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from microtome.dictionary import (
    CrossLayerTranscoder,
    Dictionary,
    Origin,
    TemporalDictionary,
    load_dictionary,
    save_dictionary,
)
from microtome.dictionary.activation import JumpReLU, ReLU, TopK
from microtome.dictionary.dictionary import InputNorm
from microtome.dictionary.temporal import CodeAttention
from microtome.text import TokenDataset, TokenizeConfig, open_corpus, tokenize_corpus

from .features.tiny import BOS, TEXTS, make_tokenizer


def tiny_text_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the tiny texts as a model has it."""
    return PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(), bos_token=BOS)


def random_llama(n_vocab: int, *, n_ctx: int) -> LlamaForCausalLM:
    """Two layers, d_model 24; always the same weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=n_vocab,
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            max_position_embeddings=n_ctx,
            tie_word_embeddings=False,
            initializer_range=0.2,
        )
    )


def random_dictionary(
    folder: Path,
    *,
    model: str,
    hook: str = "blocks.1.hook_resid_pre",
    d_in: int = 24,
    d_sae: int = 40,
    k: int = 4,
    dead: Sequence[int] = (),
    seed: int = 0,
) -> Dictionary:
    """Write a dictionary with random weights into `folder` and open it. The latents `dead` never fire."""
    center = torch.randn(d_in, generator=torch.Generator().manual_seed(seed)) * 0.01
    sae = topk_dictionary(d_in, d_sae, k, origin=Origin.at(model, hook), center=center, seed=seed)
    with torch.no_grad():
        sae.b_enc[list(dead)] = -1e6
    folder.mkdir(parents=True, exist_ok=True)
    save_dictionary(sae, folder)
    return load_dictionary(folder)


def topk_dictionary(
    d_in: int, d_sae: int, k: int, *, origin: Origin, center: Tensor | None = None, seed: int = 0
) -> Dictionary:
    """A TopK dictionary with random unit decoder rows, the encoder their transpose, and b_dec at `center`."""
    sae = Dictionary(d_in, d_sae, TopK(k), origin=origin)
    with torch.no_grad():
        rows = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed))
        sae.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
        sae.encoder.copy_(sae.W_dec)
        if center is not None:
            sae.b_dec.copy_(center)
    return sae


def random_cross_layer(model: str, inputs: Sequence[str], outputs: Sequence[str], *, d: int) -> CrossLayerTranscoder:
    """A cross-layer transcoder of 40 latents a layer with random weights and one threshold for each; of layer l the first
    l + 1 latents never fire."""
    origin = Origin(model_name=model, inputs=tuple(inputs), outputs=tuple(outputs))
    clt = CrossLayerTranscoder(d, 40, JumpReLU(torch.zeros(40 * len(inputs))), origin=origin)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in clt.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        for layer, bias in enumerate(clt.b_enc):
            bias[: layer + 1] = -1e6
    return clt.requires_grad_(False)


def tokenized_texts(folder: Path, tokenizer: PreTrainedTokenizerBase, *, times: int, context: int) -> TokenDataset:
    """The tiny texts, `times` over, as `folder/texts.txt` and the token dataset `folder/tokens`."""
    (folder / "texts.txt").write_text("\n\n".join(TEXTS * times), encoding="utf-8")
    corpus = open_corpus(folder / "texts.txt")
    return tokenize_corpus(corpus, tokenizer, folder / "tokens", config=TokenizeConfig(context=context))


def random_temporal(
    model: str,
    hook: str,
    *,
    d_in: int,
    d_sae: int = 48,
    layers: int = 2,
    scale: float = 1.0,
    k: int | None = 4,
    input_norm: InputNorm = "none",
    seed: int = 5,
) -> TemporalDictionary:
    """A temporal dictionary with random weights."""
    activation = ReLU() if k is None else TopK(k)
    novel = Dictionary(d_in, d_sae, activation, origin=Origin.at(model, hook), input_norm=input_norm)
    made = TemporalDictionary(novel, [CodeAttention(d_sae, 3, d_sae // 8) for _ in range(layers)], scale=scale)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        novel.b_enc.zero_()
    return made.requires_grad_(False)
