"""One BOS in front of every sequence, whatever the tokenizer does by itself."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from microtome.common.errors import InputError
from microtome.text import BosWarning, adds_bos, bos_id, encode, pad, pad_id, separator_id, tokenizer_fingerprint

MakeTokenizer = Callable[..., Any]


def test_auto_is_the_tokenizers_own_bos_or_none(tokenizer: Any, make_tokenizer: MakeTokenizer) -> None:
    assert bos_id(tokenizer) == bos_id(tokenizer, "required") == 0
    assert bos_id(make_tokenizer(eos_token="</s>")) is None
    assert bos_id(tokenizer, "none") is None
    assert bos_id(tokenizer, "</s>") == 1


def test_a_required_bos_that_the_tokenizer_lacks_is_an_error(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(InputError, match="defines no BOS token and one is required"):
        bos_id(make_tokenizer(eos_token="</s>"), "required")


def test_a_token_outside_the_vocabulary_is_an_error_with_the_nearest_special_one(tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"'<S>' is not a token of .* Did you mean .*'<s>'"):
        bos_id(tokenizer, "<S>")
    with pytest.raises(InputError, match=r"The separator '<eod>' is not a token"):
        separator_id(tokenizer, "<eod>")


def test_encode_gives_one_bos_whether_or_not_the_tokenizer_adds_its_own(make_tokenizer: MakeTokenizer) -> None:
    texts = ["a slice", "", "the block moves"]
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    plain, adding = make_tokenizer(**special), make_tokenizer(adds_bos=True, **special)
    assert (adds_bos(plain), adds_bos(adding), adds_bos(make_tokenizer())) == (False, True, False)
    # The twin: what the adding tokenizer does by itself is exactly one BOS and the text.
    assert encode(plain, texts) == encode(adding, texts) == adding(texts)["input_ids"]
    assert encode(adding, texts, "none") == plain(texts, add_special_tokens=False)["input_ids"]
    assert encode(plain, []) == []


def test_a_text_that_spells_its_bos_gets_no_second_one_and_a_warning(tokenizer: Any) -> None:
    with pytest.warns(BosWarning, match="1 of 2 texts begin with the BOS '<s>' already"):
        rows = encode(tokenizer, ["<s>a slice", "a slice"])
    assert rows[0] == rows[1]
    assert rows[0].count(0) == 1


def test_the_separator_is_the_document_end_then_eos_then_none(make_tokenizer: MakeTokenizer) -> None:
    assert separator_id(make_tokenizer(eos_token="</s>")) == 1
    assert separator_id(make_tokenizer(bos_token="<s>")) is None
    chat = make_tokenizer(eos_token="</s>", additional_special_tokens=["<|endoftext|>"])
    assert separator_id(chat) == chat.convert_tokens_to_ids("<|endoftext|>") != 1
    assert separator_id(chat, "none") is None
    assert separator_id(chat, "</s>") == 1


@pytest.mark.parametrize("side", ["right", "left"])
def test_pad_puts_the_rows_on_one_side_and_masks_the_rest(tokenizer: Any, side: str) -> None:
    rows = [[5, 6, 7], [], [8]]
    ids, mask = pad(rows, pad_id(tokenizer), side)
    assert ids.shape == mask.shape == (3, 3)
    assert [ids[i][mask[i]].tolist() for i in range(3)] == rows
    assert set(ids[~mask].tolist()) == {2}
    assert mask[2].tolist() == ([True, False, False] if side == "right" else [False, False, True])


def test_pad_says_which_sides_there_are_and_takes_no_rows() -> None:
    with pytest.raises(InputError, match="left or right"):
        pad([[1]], 0, "top")
    assert pad([], 0)[0].shape == (0, 0)


def test_the_pad_token_falls_back_to_eos_bos_and_zero(make_tokenizer: MakeTokenizer) -> None:
    kinds = [{"eos_token": "</s>", "bos_token": "<s>"}, {"bos_token": "</s>"}, {}]
    assert [pad_id(make_tokenizer(**kind)) for kind in kinds] == [1, 1, 0]


def test_the_fingerprint_tells_vocabularies_apart_and_nothing_else(make_tokenizer: MakeTokenizer) -> None:
    special = {"bos_token": "<s>", "pad_token": "<pad>"}
    plain, adding = make_tokenizer(**special), make_tokenizer(adds_bos=True, **special)
    before = tokenizer_fingerprint(plain)
    padded = plain(["a", "slice of tissue"], padding=True, truncation=True, max_length=4, pad_to_multiple_of=4)
    assert np.shape(padded["input_ids"]) == (2, 4)
    assert tokenizer_fingerprint(plain) == before == tokenizer_fingerprint(adding)
    plain.add_tokens(["microtome"])
    assert tokenizer_fingerprint(plain) != before
