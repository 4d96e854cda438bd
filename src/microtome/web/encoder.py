"""Encodes texts with the model, in one worker thread, so that pages are served while the model works.

1. Nothing is loaded until the first text comes; browsing needs no model.
2. Texts wait in a short queue; when it is full, the next one is refused at once.
3. Whatever keeps the model from loading is kept as the reason that the text box shows.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from microtome.common.errors import InputError, MicrotomeError, ModelError
from microtome.features import FeatureIndex, PromptFeatures
from microtome.web.schemas import EncoderState

if TYPE_CHECKING:
    from microtome.dictionary import DictionaryOrSet
    from microtome.model import HookedModel

Loader = Callable[[], "tuple[HookedModel, DictionaryOrSet]"]

MAX_CHARACTERS = 2000
MAX_TOKENS = 512
MAX_WAITING = 8


class BusyError(MicrotomeError):
    """More texts are waiting than the queue holds."""


class Encoder:
    """The one worker. `loader` opens the model and the dictionary; None means that there is to be no model."""

    def __init__(self, index: FeatureIndex, loader: Loader | None) -> None:
        self.index = index
        self._loader = loader
        self._loaded: tuple[HookedModel, DictionaryOrSet] | None = None
        self._loading = False
        self._failure: str | None = None
        self._waiting = 0
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="microtome-encoder")

    def state(self) -> EncoderState:
        """Whether texts can be encoded, and if not, why."""
        if self._loader is None:
            status, reason = "unavailable", _NO_MODEL
        elif self._loaded is not None:
            status, reason = "ready", None
        elif self._loading:
            status, reason = "loading", None
        else:
            status, reason = ("not loaded", None) if self._failure is None else ("unavailable", self._failure)
        return EncoderState(
            status=status,  # type: ignore[arg-type]
            reason=reason,
            max_characters=MAX_CHARACTERS,
            max_tokens=MAX_TOKENS,
            waiting=self._waiting,
        )

    async def encode(self, text: str, k: int) -> tuple[PromptFeatures, float]:
        """The features that fire on `text`, at most `k` a token, and the seconds it took.

        Raises InputError for a text that is too long, ModelError when there is no model, BusyError when too many wait.
        """
        if self._loader is None:
            raise ModelError("Texts cannot be encoded here", fix=_NO_MODEL)
        if len(text) > MAX_CHARACTERS:
            raise InputError(
                "The text is too long", got=f"{len(text):,} characters", expected=f"at most {MAX_CHARACTERS:,}"
            )
        n_tokens = len(self.index.strings.tokenizer.encode(text).ids)
        if n_tokens > MAX_TOKENS:
            raise InputError("The text is too long", got=f"{n_tokens:,} tokens", expected=f"at most {MAX_TOKENS:,}")
        with self._lock:
            if self._waiting >= MAX_WAITING:
                raise BusyError("The model is busy", got=f"{self._waiting} texts waiting", fix="Try again in a moment")
            self._waiting += 1
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._work, text, k)

    def close(self) -> None:
        """Take no more texts; the one in hand is finished."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _work(self, text: str, k: int) -> tuple[PromptFeatures, float]:
        try:
            model, dictionary = self._load()
            began = time.perf_counter()
            found = self.index.top_features(text, model=model, dictionary=dictionary, k=k)
            return found, time.perf_counter() - began
        finally:
            with self._lock:
                self._waiting -= 1

    def _load(self) -> "tuple[HookedModel, DictionaryOrSet]":
        if self._loaded is None:
            assert self._loader is not None
            self._loading = True
            try:
                self._loaded = self._loader()
                self._failure = None
            except MicrotomeError as error:
                self._failure = str(error)
                raise ModelError(
                    "The model could not be opened, so texts cannot be encoded", got=self._failure
                ) from error
            except Exception as error:  # whatever torch or a file system raises must not end the worker
                self._failure = f"{type(error).__name__}: {error}"
                raise ModelError("The model could not be opened", got=self._failure) from error
            finally:
                self._loading = False
        return self._loaded


def index_loader(index: FeatureIndex) -> Loader:
    """Opens the model and the dictionary that the index names."""

    def load() -> "tuple[HookedModel, DictionaryOrSet]":
        from microtome.dictionary import load_dictionary_or_set
        from microtome.features.prompt import dictionary_of
        from microtome.model import load_model

        return load_model(index.record.model), load_dictionary_or_set(dictionary_of(index.record, index.path))

    return load


_NO_MODEL = "This workbench was started without a model; start it again without --no-model to try texts."
