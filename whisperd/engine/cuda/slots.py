"""Where the audio of windows lies on the device, also of those that have left: some come again."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True, eq=False)
class Slot:
    """Room for one window. ``audio`` is what it holds, ``languages`` how likely each one is, once that was asked."""

    number: int
    audio: int | None = None
    languages: list[float] = field(default_factory=list)

    def forget(self) -> None:
        """What it holds is overwritten."""
        self.audio, self.languages = None, []


class Slots:
    """The free slots, the one that was left first at the head: audio that comes again is found as late as can be."""

    def __init__(self, count: int) -> None:
        self._free = [Slot(number=number) for number in range(count)]

    def __len__(self) -> int:
        return len(self._free)

    def holding(self, audio: int | None) -> Slot | None:
        """Takes the free slot that still holds this audio."""
        found = next((slot for slot in self._free if audio is not None and slot.audio == audio), None)
        if found is not None:
            self._free.remove(found)
        return found

    def oldest(self) -> Slot:
        """Takes the slot that has been free for the longest time; nothing of it is remembered."""
        slot = self._free.pop(0)
        slot.forget()
        return slot

    def give_back(self, slot: Slot) -> None:
        """Nobody reads it any more; it keeps its audio until somebody needs the room."""
        self._free.append(slot)
