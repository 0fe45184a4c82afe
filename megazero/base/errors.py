"""What a user did wrong, said in one sentence each."""


class UserError(Exception):
    """One or more mistakes of the user. Each sentence names the flag or file, its value, and what to write instead."""

    def __init__(self, *sentences: str) -> None:
        super().__init__("\n".join(sentences))
        self.sentences: tuple[str, ...] = tuple(dict.fromkeys(sentences))
