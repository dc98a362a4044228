"""The errors that a client gets, in the form of OpenAI's API."""

from collections.abc import Mapping
from typing import Any

from lora_jax import errors

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
}


class Refusal(Exception):
    """Ends a request with an HTTP status and a body {"error": {message, type, param, code}}."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else TYPES[400])
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def of(error: errors.UserError, param: str | None = None) -> Refusal:
    """A problem that the user can fix as a 400."""
    message = error.on_one_line()
    return Refusal(f"{message}; {error.do}" if error.do else message, param=param)


def unknown_model(name: str) -> Refusal:
    return Refusal(
        f"The model `{name}` does not exist.", status=404, param="model", code="model_not_found"
    )
