"""predlog's exceptions. One that a client sees carries its status; one that ends a process carries its exit code."""

from __future__ import annotations


class HttpError(Exception):
    """An answer other than success: status code, one sentence for a person, and header lines, each with its CRLF."""

    def __init__(self, status: int, detail: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.fields = b"".join(f"{name}: {value}\r\n".encode("latin-1") for name, value in headers)


class InvalidEvent(Exception):
    """A document that is not an event. `faults` has FastAPI's shape: [{"loc": [...], "msg": str, "type": str}, ...]."""

    def __init__(self, faults: list[dict[str, object]]) -> None:
        super().__init__(f"{len(faults)} fault(s)")
        self.faults = faults


class NotConfirmed(Exception):
    """The outcome of an event that the broker has not confirmed."""


class Unavailable(NotConfirmed):
    """The event was not accepted; a retry can succeed.

    `reason` is one word for metrics. `public` is for clients, and names no address; `why` is for the log and /readyz.
    """

    def __init__(self, reason: str, public: str, why: str = "") -> None:
        super().__init__(f"{public}; nothing was accepted, try again")
        self.reason = reason
        self.why = why or public


class TooLarge(NotConfirmed):
    """The event was not accepted and never will be: the broker takes no message of more than `most_bytes`."""

    def __init__(self, most_bytes: int) -> None:
        super().__init__(f"the broker takes no event longer than {most_bytes} bytes")
        self.most_bytes = most_bytes


class OutcomeUnknown(NotConfirmed):
    """The event was sent, and may or may not be stored."""

    def __init__(self) -> None:
        super().__init__(
            "no confirm from the broker in time: the event may or may not be stored; "
            "a retry with the same Idempotency-Key is safe"
        )


class Fatal(Exception):
    """An error that ends the process with one line for a person and `exit_code`, without a traceback."""

    exit_code = 1


class SettingError(Fatal):
    """A setting with a bad value."""

    exit_code = 2


class StartupError(Fatal):
    """Something outside (port, folder, broker, password, queue) that keeps the process from starting."""


class DiskTrouble(Exception):
    """A disk that is full or fails. The trouble can pass, so the process waits and retries."""


class TakenOver(Fatal):
    """Another consumer has begun to write the same CSV. This one must stop, touch nothing and ack nothing."""
