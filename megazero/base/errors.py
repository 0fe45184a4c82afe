"""What a user did wrong, said in one sentence each."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """One or more mistakes of the user. Each sentence names the flag or file, its value, and what to write instead."""

    def __init__(self, *sentences: str) -> None:
        super().__init__("\n".join(sentences))
        self.sentences: tuple[str, ...] = tuple(dict.fromkeys(sentences))


@contextmanager
def naming(flag: str) -> Iterator[None]:
    """Sentences about a file within begin with the flag that names it."""
    try:
        yield
    except UserError as error:
        raise UserError(*(s if s.startswith("--") else f"{flag}: {s}" for s in error.sentences)) from None
