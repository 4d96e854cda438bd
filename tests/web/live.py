"""A small real model, a dictionary on it and their index, saved as a user would have them: the server loads them itself."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from microtome.features import IndexConfig, build_index
from microtome.model import load_model

from ..features.tiny import make_tiny_index  # noqa: TID252 – tests share their tiny index
from ..makers import random_dictionary, random_llama, tiny_text_tokenizer, tokenized_texts  # noqa: TID252 – shared by tests

D_SAE, K = 3000, 8
HOOK = "blocks.1.hook_resid_pre"
HOSTILE = " <img src=x onerror=\"document.title='pwned'\">"
HOSTILE_DOCUMENT = "<script>document.title='pwned'</script>.txt"


def make_live_index(folder: Path) -> Path:
    """Write `model`, `sae`, `tokens` and `index` into `folder`; return the index. Takes a few seconds."""
    tokenizer = tiny_text_tokenizer()
    random_llama(len(tokenizer), n_ctx=1024).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    model = load_model(folder / "model")
    assert model.tokenizer is not None
    sae = random_dictionary(folder / "sae", model=model.name, hook=HOOK, d_sae=D_SAE, k=K, seed=1)
    tokens = tokenized_texts(folder, model.tokenizer, times=8, context=32)
    small = IndexConfig(top=5, bands=3, per_band=2, window=16, batch=16)
    build_index(model, sae, tokens, folder / "index", config=small, metrics={"fvu": 0.5}).close()
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
