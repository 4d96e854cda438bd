"""Floor 2: language models. `load_model` opens one; `HookedModel` runs, reads and edits it by hook name.

Which models there are is known without torch, so the parts that need it are fetched when first used.
"""

from typing import TYPE_CHECKING

from microtome.common.lazy import lazy

_HOMES = {
    "ActivationCache": "microtome.model.cache",
    "HookedModel": "microtome.model.hooked",
    "HookPoint": "microtome.model.hooked",
    "load_model": "microtome.model.load",
    "HookName": "microtome.model.names",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from microtome.model.cache import ActivationCache as ActivationCache
    from microtome.model.hooked import HookedModel as HookedModel
    from microtome.model.hooked import HookPoint as HookPoint
    from microtome.model.load import load_model as load_model
    from microtome.model.names import HookName as HookName
else:
    __getattr__, __dir__ = lazy(__name__, _HOMES)
