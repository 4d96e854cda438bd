"""Display strings: nothing is hidden, nothing is lost, and characters in pieces are shown once."""

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from microtome.common.errors import ArtifactError, InputError
from microtome.text.strings import TokenStrings, visible

from ..features.tiny import BOS, TEXTS, make_tokenizer  # noqa: TID252 – shared by tests


@pytest.fixture(scope="module")
def strings() -> TokenStrings:
    return TokenStrings(make_tokenizer())


def show(strings: TokenStrings, text: str) -> list[str]:
    return strings.show(strings.tokenizer.encode(text, add_special_tokens=False).ids)


def token(strings: TokenStrings, piece: str) -> int:
    found = strings.tokenizer.token_to_id(piece)
    assert found is not None
    return found


@pytest.mark.parametrize("text", [*TEXTS, "naïve Ωμέγα 🏳️‍🌈 ﷽ 한국어", "\u202eabc\u0000", "a\r\n\tb"])
def test_the_text_is_there_once_beside_the_bytes_of_its_pieces(strings: TokenStrings, text: str) -> None:
    shown = "".join(show(strings, text))
    assert re.sub(r"⟨[0-9A-F]{2}( [0-9A-F]{2})*⟩", "", shown) == visible(text)


def test_a_character_is_shown_on_its_last_piece(strings: TokenStrings) -> None:
    pieces = [bytes([b]) for b in "🦀".encode()]
    ids = [token(strings, _letter(b[0])) for b in pieces]
    assert strings.show(ids) == ["⟨F0⟩", "⟨9F⟩", "⟨A6⟩", "🦀"]
    assert strings.show(ids[:3]) == ["⟨F0⟩", "⟨9F⟩", "⟨A6⟩"]
    assert strings.show(ids[1:]) == ["⟨9F⟩", "⟨A6⟩", "⟨80⟩"]
    assert strings.show([ids[0], token(strings, "a"), ids[1]]) == ["⟨F0⟩", "a", "⟨9F⟩"]


def _letter(byte: int) -> str:
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return chr(byte) if byte in plain else chr(0x100 + [b for b in range(256) if b not in plain].index(byte))


def test_line_ends_tabs_and_hidden_characters() -> None:
    assert visible("a\n\tb\r") == "a↵→b␍"
    assert visible("\u202e\u200b\u0007\u2028") == "⟨U+202E⟩⟨U+200B⟩⟨U+0007⟩⟨U+2028⟩"
    assert visible("<b>&\u00a0é 東🙂") == "<b>&\u00a0é 東🙂"


def test_special_tokens_and_ids_beyond_the_vocabulary(strings: TokenStrings) -> None:
    bos = token(strings, BOS)
    assert strings.show([bos, strings.size + 3]) == [BOS, f"⟨id {strings.size + 3}⟩"]
    assert strings.one(-1) == ""
    assert strings.show([]) == []
    with pytest.raises(InputError, match="negative"):
        strings.show([-1])


def test_matching_ignores_case_and_sees_line_ends(strings: TokenStrings) -> None:
    assert token(strings, "Ġcourt") in strings.matching("COURT")
    assert token(strings, "Ċ") in strings.matching("\n")
    assert strings.matching("no such token") == []
    assert len(strings.vocabulary) == strings.size


def test_pieces_written_as_hexadecimal_and_metaspace() -> None:
    vocabulary = {"<unk>": 0, "▁the": 1, "<0xF0>": 2, "<0x9F>": 3, "<0xA6>": 4, "<0x80>": 5, "ing": 6}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    assert TokenStrings(tokenizer).show([1, 6, 2, 3, 4, 5]) == [" the", "ing", "⟨F0⟩", "⟨9F⟩", "⟨A6⟩", "🦀"]


def test_a_tokenizer_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="missing"):
        TokenStrings.open(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ArtifactError, match="damaged"):
        TokenStrings.open(tmp_path / "tokenizer.json")
