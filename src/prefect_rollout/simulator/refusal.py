"""How the cloud says no."""


class Refusal(Exception):  # noqa: N818 - an answer of the contract, not a fault of the simulator
    """An error answer: HTTP status, sub-code and message of the contract's error table."""

    def __init__(self, status: int, message: str, sub_code: int = 0) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.sub_code = sub_code
