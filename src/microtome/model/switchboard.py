"""The switchboard: which taps are connected to a model's hook points at the moment.

Blocks may be nested (edits around generation around a capture). Each time the set of taps changes, the hooks are laid
anew for all of them, by depth and then in the order in which the blocks were entered, so an inner block sees what an
outer one changed. At the end of a block, whatever happened inside, its taps are gone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from microtome.model.names import HookName
from microtome.model.stations import Station, Undo
from microtome.model.taps import Run, Tap, of_all_heads


class Switchboard:
    """Connects taps to the stations of one module. `run` describes the forward pass under way."""

    def __init__(self, hf: nn.Module, stations: Mapping[HookName, Station], run: Run) -> None:
        self.hf, self.stations, self.run = hf, stations, run
        self._rank = {name: i for i, name in enumerate(sorted(stations))}
        self._groups: list[Sequence[Tap]] = []
        self._handles: list[RemovableHandle | Undo] = []

    @property
    def busy(self) -> bool:
        """Whether taps are connected now."""
        return bool(self._groups)

    @contextmanager
    def connected(self, taps: Sequence[Tap]) -> Iterator[None]:
        """Within the block, the module calls these taps too."""
        self._groups.append([of_all_heads(tap) for tap in taps])
        try:
            self._lay()
            yield
        finally:
            self._groups.pop()
            self._lay()

    def _lay(self) -> None:
        """Take all hooks away, then set those of the connected taps."""
        while self._handles:
            self._handles.pop().remove()
        by_station: dict[Station, dict[HookName, list[Tap]]] = {}
        taps = sorted((tap for group in self._groups for tap in group), key=lambda tap: self._rank[tap.name])
        for tap in taps:
            by_station.setdefault(self.stations[tap.name], {}).setdefault(tap.name, []).append(tap)
        if by_station:
            self._handles.append(self.hf.register_forward_pre_hook(self._begin, with_kwargs=True))
        for station, of_station in by_station.items():
            for handle in station.open(self.hf, self.run, of_station):
                self._handles.append(handle)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.run.begin(args, kwargs)
