"""Errors of the API in one shape, RFC 9457's application/problem+json, and in OpenAI's on its route."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from lowssl_core.errors import UserError
from server.api.exchange import Exchange
from server.api.service import Service
from server.serving.errors import NoModel, Overloaded, TimedOut, UnknownVersion

MEDIA_TYPE = "application/problem+json"
OPENAI_ROUTE = "/v1/embeddings"

# The machine's word for a status, where nothing more exact is known.
CODES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    406: "not_acceptable",
    408: "upload_timed_out",
    409: "conflict",
    413: "too_large",
    415: "unsupported_media_type",
    422: "invalid",
    429: "rate_limited",
    500: "internal_error",
    503: "unavailable",
}


class Problem(Exception):  # noqa: N818 - the name of the thing in RFC 9457
    """An answer other than the one asked for.

    Args:
        status: of HTTP.
        detail: one sentence for the caller: what was given, what is accepted.
        code: a word for the caller's program; by the status, if not given.
        headers: of the answer.
        errors: what is wrong with single images: {"index", "code", "message"}.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        errors: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.code = code or CODES.get(status, "error")
        self.headers = dict(headers or {})
        self.errors = errors


def problem_response(problem: Problem, request: Request) -> Response:
    """The answer that tells of a problem, in the shape that the route's clients expect."""
    request_id = Exchange.of(request.scope).request_id
    if request.url.path == OPENAI_ROUTE:
        kind = "invalid_request_error" if problem.status < 500 else "server_error"
        param = "input" if problem.errors else None
        error = {"message": problem.detail, "type": kind, "param": param, "code": problem.code}
        body: dict[str, Any] = {"error": error, "request_id": request_id}
        media_type = "application/json"
    else:
        body = {
            "type": "about:blank",
            "title": HTTPStatus(problem.status).phrase,
            "status": problem.status,
            "detail": problem.detail,
            "code": problem.code,
            "request_id": request_id,
        }
        if problem.errors:
            body["errors"] = list(problem.errors)
        media_type = MEDIA_TYPE
    return Response(orjson.dumps(body), problem.status, problem.headers, media_type)


def fault_response(scope: Scope) -> Response:
    """The answer after a fault of the server: it gives nothing away but where the log has more."""
    detail = "something went wrong here; the server's log says what, under this request_id"
    return problem_response(Problem(500, detail), Request(scope))


def install_problem_handlers(app: FastAPI) -> None:
    """Answer in this shape also what FastAPI and Starlette find: no such page or method, wrong parameters."""

    async def on_problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)
        return problem_response(error, request)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        detail = error.detail
        if error.status_code == 404:
            detail = "there is nothing at this address; /docs lists what there is"
        elif error.status_code == 405:
            detail = f"{request.method} is not possible here; {(error.headers or {}).get('Allow', 'another method')} is"
        return problem_response(Problem(error.status_code, detail, headers=error.headers), request)

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        said = "; ".join(f"{'.'.join(map(str, one['loc'][1:])) or 'body'}: {one['msg']}" for one in error.errors())
        return problem_response(Problem(422, said), request)

    async def on_overload(request: Request, error: Exception) -> Response:
        assert isinstance(error, Overloaded)
        return problem_response(_try_again(str(error), "overloaded", error.retry_after), request)

    async def on_timeout(request: Request, error: Exception) -> Response:
        return problem_response(_try_again(str(error), "timed_out", 1), request)

    async def on_no_model(request: Request, error: Exception) -> Response:
        how = Service.of(request).how_to_import
        return problem_response(Problem(503, f"no version serves yet; to import one: {how}", code="no_model"), request)

    async def on_unknown_version(request: Request, error: Exception) -> Response:
        return problem_response(Problem(404, str(error), code="unknown_version"), request)

    async def on_trouble(request: Request, error: Exception) -> Response:
        # Not the caller's doing, such as a database that is out of reach; paths and addresses are for the log.
        Service.of(request).log.error("trouble", request_id=Exchange.of(request.scope).request_id, reason=str(error))
        return problem_response(_try_again("the registry cannot be used at the moment", "unavailable", 5), request)

    app.add_exception_handler(Overloaded, on_overload)
    app.add_exception_handler(TimedOut, on_timeout)
    app.add_exception_handler(NoModel, on_no_model)
    app.add_exception_handler(UnknownVersion, on_unknown_version)
    app.add_exception_handler(UserError, on_trouble)
    app.add_exception_handler(Problem, on_problem)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_invalid)


def _try_again(detail: str, code: str, seconds: int) -> Problem:
    return Problem(503, detail, code=code, headers={"Retry-After": str(seconds)})
