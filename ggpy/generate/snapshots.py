"""States of sequences from earlier on, to go back to: layers with a state can't forget the last tokens only."""

from collections import OrderedDict

from ..graph import States

#: tokens between two snapshots of a sequence: what is evaluated again, at most, after it was cut
SNAPSHOT_TOKENS = 512


class Snapshot:
    """A slot as it was after some tokens.

    Attributes
    ----------
    slot : int
        -1 when others have needed the room.
    n_tokens : int
        After how many tokens.
    is_kept : bool
        Whether a file has it.
    """

    __slots__ = ("is_kept", "n_tokens", "slot")

    def __init__(self, slot: int, n_tokens: int):
        self.slot, self.n_tokens = slot, n_tokens
        self.is_kept = False


class Snapshots:
    """All snapshots. They stay until room is needed: then those go first that were used longest ago.

    Parameters
    ----------
    states : States
    """

    def __init__(self, states: States):
        self._states = states
        self._by_slot: OrderedDict[int, Snapshot] = OrderedDict()  # the latest used at the end

    def __contains__(self, slot: int) -> bool:
        return slot in self._by_slot

    def add(self, slot: int, n_tokens: int) -> Snapshot:
        """The snapshot that a slot is from now on. Its sequence goes on in a copy."""
        if slot not in self._by_slot:
            self._states.share(slot)
            self._by_slot[slot] = Snapshot(slot, n_tokens)
        self.touch(slot)
        return self._by_slot[slot]

    def touch(self, slot: int) -> None:
        """Makes a snapshot the latest used."""
        self._by_slot.move_to_end(slot)

    def can_evict(self) -> bool:
        """Whether `evict` frees a slot."""
        return any(self._states.holders(slot) == 1 for slot in self._by_slot)

    def evict(self) -> bool:
        """Frees the slot used longest ago that nobody else holds; False if there is none."""
        for slot in self._by_slot:
            if self._states.holders(slot) == 1:
                self.drop(slot)
                return True
        return False

    def drop(self, slot: int) -> None:
        """Lets go of a slot, if it is a snapshot."""
        snapshot = self._by_slot.pop(slot, None)
        if snapshot is not None:
            snapshot.slot = -1
            self._states.give(slot)
