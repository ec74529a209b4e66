"""The actor between the workers of a cluster and the study; torch-free: it starts at once."""

from unclamp.study.messages import Message


class Channel:
    """Keeps what workers tell until the study takes it, and answers whether they shall stop."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._is_stopping = False

    def tell(self, message: Message | None) -> bool:
        """Take a message; return whether whoever tells shall stop."""
        if message is not None:
            self._messages.append(message)
        return self._is_stopping

    def take(self) -> list[Message]:
        """Return what was told since the last time."""
        taken, self._messages = self._messages, []
        return taken

    def stop(self) -> None:
        """Have all workers stop."""
        self._is_stopping = True
