"""What the API answers when it refuses: OpenAI's error body, and a status that its client turns into a class."""

from __future__ import annotations

from typing import Any, NoReturn

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """A request that is refused."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, type: str | None = None
    ) -> None:
        self.status, self.message, self.param, self.code = status, message, param, code
        self.type = type or _TYPES.get(status, "server_error")
        super().__init__(message)

    def body(self) -> dict[str, Any]:
        """Return the answer's body."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def refuse(message: str, *, param: str | None = None, code: str | None = "invalid_value") -> NoReturn:
    """Refuse a request for what it says: status 400.

    Raises:
        ApiError: always.
    """
    raise ApiError(400, message, param=param, code=code)


def missing(noun: str, name: str, *, param: str | None = None) -> ApiError:
    """Return the refusal of what is not there, or is another project's: the two read alike.

    Args:
        noun: what it is, for people.
        name: what was asked for.
        param: where the request named it.
    """
    code = "model_not_found" if noun == "model" else "not_found"
    return ApiError(404, f"No such {noun}: {name[:200]}", param=param, code=code)
