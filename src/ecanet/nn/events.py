"""Events of gates: a gate need not know who listens."""

from collections.abc import Callable


class Event:
    """Calls its subscribers each time it happens."""

    def __init__(self) -> None:
        self._subscribers: list[Callable[[], None]] = []

    def subscribe(self, do: Callable[[], None]) -> Callable[[], None]:
        """Subscribe a function; usable as a decorator."""
        self._subscribers.append(do)
        return do

    def happens(self) -> None:
        """Call all subscribers."""
        for do in self._subscribers:
            do()


#: A gate's factor is set to something other than 1.
GATE_GETS_FACTOR = Event()
