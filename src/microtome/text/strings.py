"""Tokens as a person reads them, from `tokenizer.json` alone.

A tokenizer of bytes cuts characters such as “é” or “🙂” into pieces. Each token is turned into its bytes first; the
bytes of neighbours are then joined, and a character is shown on the token that ends it. A piece before that, or one
that never becomes a character, is shown as its bytes: ⟨F0 9F⟩. Line ends are shown as ↵, tabs as →, and invisible
characters (among them those that turn the writing direction) as ⟨U+202E⟩, so that what is displayed is what is there.
"""

import itertools
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from microtome.common.errors import ArtifactError, InputError

_SHOWN = {"\n": "↵", "\t": "→", "\r": "␍"}
_HIDDEN = {"Cc", "Cf", "Zl", "Zp", "Cs", "Co", "Cn"}


class TokenStrings:
    """The display strings of a tokenizer's tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
        self._shown: dict[int, str | None] = {}

    @classmethod
    def open(cls, path: Path) -> "TokenStrings":
        """From a `tokenizer.json`. Raises ArtifactError when it is missing or damaged."""
        if not path.exists():
            raise ArtifactError(f"{path} is missing", fix="Make what it belongs to again")
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises nothing more exact
            raise ArtifactError(f"{path} is damaged: {error}", fix="Make what it belongs to again") from error

    @property
    def size(self) -> int:
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    def show(self, ids: Sequence[int]) -> list[str]:
        """One display string a token, for tokens that stand in this order.

        Raises InputError for a negative id; an id above the vocabulary (models pad theirs) is shown as ⟨id 50300⟩.
        """
        whole = [self._whole(int(token)) for token in ids]
        out: list[str] = []
        while len(out) < len(ids):
            start = stop = len(out)
            while stop < len(ids) and whole[stop] is None:
                stop += 1
            out += _join([self._bytes_of(int(token)) for token in ids[start:stop]])
            if stop < len(ids):
                out.append(whole[stop] or "")
        return out

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token as it is: joined, the text of all. A character stands whole with the token that ends
        it, and bytes that never become one are U+FFFD."""
        return _join([self._bytes_of(int(token)) for token in ids], plain=True)

    def one(self, token: int) -> str:
        """The display string of a token by itself."""
        return self.show([token])[0] if token >= 0 else ""

    @cached_property
    def vocabulary(self) -> list[str]:
        """The display string of every token, each by itself."""
        return [self.one(token) for token in range(self.size)]

    def matching(self, text: str) -> list[int]:
        """The tokens whose display string contains `text`, whatever the case."""
        wanted = "".join(_SHOWN.get(c, c) for c in text).casefold()
        return [i for i, string in enumerate(self.vocabulary) if wanted in string.casefold()]

    def _whole(self, token: int) -> str | None:
        """The display string of a token that consists of whole characters; None for one that holds a piece of one."""
        if token not in self._shown:
            try:
                self._shown[token] = visible(self._bytes_of(token).decode())
            except UnicodeDecodeError:
                self._shown[token] = None
        return self._shown[token]

    def _bytes_of(self, token: int) -> bytes:
        if token < 0:
            raise InputError("A token id cannot be negative", got=token)
        if token in self._added:
            return self._added[token].encode()
        piece = self.tokenizer.id_to_token(token)
        if piece is None:
            return f"⟨id {token}⟩".encode()
        if self._of_bytes:
            try:
                return bytes(_BYTE_OF[c] for c in piece)
            except KeyError:
                return str(piece).encode()
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace("▁", " ").encode()

    @cached_property
    def _of_bytes(self) -> bool:
        """Whether tokens are written in the 256-letter alphabet of bytes (GPT-2's way), not in plain text."""
        return "ByteLevel" in str(self.tokenizer.decoder) or "ByteLevel" in str(self.tokenizer.pre_tokenizer)


def visible(text: str) -> str:
    """`text` with nothing unseen in it: ↵, →, and ⟨U+200B⟩ for other characters that have no shape."""
    return "".join(_SHOWN.get(c) or (f"⟨U+{ord(c):04X}⟩" if unicodedata.category(c) in _HIDDEN else c) for c in text)


def _join(pieces: list[bytes], *, plain: bool = False) -> list[str]:
    """Display strings (or the plain text) of neighbouring tokens whose characters may run from one into the next."""
    data = b"".join(pieces)
    owner = [i for i, piece in enumerate(pieces) for _ in piece]
    parts: list[list[str | int]] = [[] for _ in pieces]
    at = 0
    while at < len(data):
        character = _character(data, at)
        end = at + max(len(character.encode()), 1)
        for i in range(at, end):
            if plain and not character:
                parts[owner[i]].append("\ufffd")
            elif not plain and (not character or owner[i] != owner[end - 1]):
                parts[owner[i]].append(data[i])
        if character:
            parts[owner[end - 1]].append(character if plain else visible(character))
        at = end
    return [_spell(part) for part in parts]


def _character(data: bytes, at: int) -> str:
    """The UTF-8 character that begins at `at`, or nothing if none does."""
    for length in range(1, 5):
        try:
            return data[at : at + length].decode()
        except UnicodeDecodeError:
            continue
    return ""


def _spell(part: list[str | int]) -> str:
    """Characters as they are, and each run of loose bytes in hexadecimal."""
    spelled = ""
    for loose, run in itertools.groupby(part, key=lambda p: isinstance(p, int)):
        items = list(run)
        spelled += f"⟨{' '.join(f'{b:02X}' for b in items)}⟩" if loose else "".join(map(str, items))
    return spelled


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 letters stand for themselves, other bytes for U+0100 and on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(rest)}


_BYTE_OF = _byte_alphabet()
