"""What a client did wrong, or must be told: one exception, turned into OpenAI's error body in one place."""

import msgspec


class RequestError(Exception):
    """Ends one request with an HTTP status and OpenAI's error body; the server goes on.

    Args:
        status: HTTP status, 4xx or 5xx.
        message: for the client's eyes; says what was wrong and what would be right.
        type: OpenAI's error class.
        param: the field at fault, as a path such as `messages[0].role`.
        code: short name that programs may compare, such as `context_length_exceeded`.
        retry_after_s: when a retry may succeed; sent as `Retry-After`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        """OpenAI's error object, as JSON; also what follows `data: ` when a stream has begun."""
        return msgspec.json.encode(
            {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}
        )

    def headers(self) -> dict[str, str]:
        """Headers that belong to the answer beside its content type."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers
