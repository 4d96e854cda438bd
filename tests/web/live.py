"""A small real model, a dictionary on it and their index, saved as a user would have them: the server loads them itself."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from microtome.dictionary import Origin, load_dictionary, save_dictionary
from microtome.dictionary.topk import TopKConfig, TopKSAE
from microtome.features import IndexConfig, build_index
from microtome.model import load_model
from microtome.text import TokenizeConfig, open_corpus, tokenize_corpus

from ..features.tiny import BOS, TEXTS, make_tiny_index, make_tokenizer  # noqa: TID252 – tests share their tiny index

D_SAE, K = 3000, 8
HOOK = "blocks.1.hook_resid_pre"
HOSTILE = " <img src=x onerror=\"document.title='pwned'\">"
HOSTILE_DOCUMENT = "<script>document.title='pwned'</script>.txt"


def make_live_index(folder: Path) -> Path:
    """Write `model`, `sae`, `tokens` and `index` into `folder`; return the index. Takes a few seconds."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(), bos_token=BOS)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    model = load_model(folder / "model")

    (folder / "sae").mkdir()
    torch.manual_seed(1)
    sae = TopKSAE.initialised(24, TopKConfig(d_sae=D_SAE, k=K), center=torch.zeros(24), seed=1)
    save_dictionary(sae, folder / "sae", Origin(model_name=model.name, hook_name=HOOK))

    (folder / "texts.txt").write_text("\n\n".join(TEXTS * 8), encoding="utf-8")
    assert model.tokenizer is not None
    corpus = open_corpus(folder / "texts.txt")
    tokens = tokenize_corpus(corpus, model.tokenizer, folder / "tokens", config=TokenizeConfig(context=32))
    small = IndexConfig(top=5, bands=3, per_band=2, window=16, batch=16)
    build_index(model, load_dictionary(folder / "sae"), tokens, folder / "index", config=small, metrics={"fvu": 0.5})
    return folder / "index"


def make_hostile_index(folder: Path) -> Path:
    """The tiny index with a token whose text is markup in place of " court", and a document named as a script."""
    make_tiny_index(folder)
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_tokens([HOSTILE])
    court, hostile = (int(tokenizer.token_to_id(text) or 0) for text in ("Ġcourt", HOSTILE))
    assert court
    assert hostile
    tokenizer.save(str(file))
    _rewrite(folder / "features.parquet", ["top_token", "top_logit_ids", "bottom_logit_ids"], {court: hostile})
    _rewrite(folder / "examples.parquet", ["token", "tokens"], {court: hostile})
    table = pq.read_table(folder / "examples.parquet")
    names = pa.array([HOSTILE_DOCUMENT] * len(table), pa.string())
    table = table.set_column(table.schema.get_field_index("document"), "document", names)
    pq.write_table(table, folder / "examples.parquet")
    return folder


def _rewrite(path: Path, columns: list[str], change: dict[int, int]) -> None:
    table = pq.read_table(path)
    for name in columns:
        field = table.schema.field(name)
        values = [_changed(value, change) for value in table[name].to_pylist()]
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))
    pq.write_table(table, path)


def _changed(value: int | list[int], change: dict[int, int]) -> int | list[int]:
    return [change.get(v, v) for v in value] if isinstance(value, list) else change.get(value, value)
