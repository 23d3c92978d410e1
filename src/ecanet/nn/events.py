"""What happens to gates, for those who have to hear of it: a gate need not know them."""

from collections.abc import Callable


class Event:
    """Calls whoever subscribed, each time it happens."""

    def __init__(self) -> None:
        self._subscribers: list[Callable[[], None]] = []

    def subscribe(self, do: Callable[[], None]) -> Callable[[], None]:
        """Have a function called; a decorator."""
        self._subscribers.append(do)
        return do

    def happens(self) -> None:
        """Call them."""
        for do in self._subscribers:
            do()


#: A gate gets a factor other than 1.
GATE_GETS_FACTOR = Event()
