"""Who calls, and whether they may: the first thing that every route asks, before it reads a body."""

import math
from collections.abc import Awaitable, Callable

from fastapi import Depends, Request

from server.access.keys import PREFIX, Role
from server.api.exchange import Exchange
from server.api.problems import Problem
from server.api.service import Service

_UNKNOWN = "this API key is not known, or was revoked"
_MISSING = "an API key is needed: send it as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"


async def check_caller(request: Request, role: Role) -> None:
    """Let pass whose key has at least `role`, or anyone where no keys are needed.

    Raises:
        Problem: 401 without a good key, 403 for one of a lesser role, 429 for too many requests.
    """
    service = Service.of(request)
    given = _given_key(request)
    caller, per_minute = "", service.settings.requests_per_minute
    # Where no key is needed a wrong one is told of all the same, but what other services' clients send is not ours.
    if given is not None and (service.needs_keys or given.startswith(PREFIX)):
        key = await service.keys.find(given)
        if key is None:
            raise Problem(401, _UNKNOWN, headers={"WWW-Authenticate": 'Bearer error="invalid_token"'})
        Exchange.of(request.scope).key = key.name
        if not key.may(role):
            raise Problem(403, f"this takes a key of the role {role}; this key's is {key.role}")
        caller, per_minute = key.id, key.requests_per_minute or per_minute
    elif service.needs_keys:
        raise Problem(401, _MISSING, headers={"WWW-Authenticate": "Bearer"})
    wait = service.rates.take(caller, per_minute) if per_minute else 0.0
    if wait:
        raise Problem(
            429,
            f"more than {per_minute} requests a minute",
            headers={"Retry-After": str(math.ceil(wait))},
        )


def require(role: Role) -> Callable[[Request], Awaitable[None]]:
    """`check_caller` as a dependency of a route."""

    async def check(request: Request) -> None:
        await check_caller(request, role)

    return check


def _given_key(request: Request) -> str | None:
    authorization = request.headers.get("authorization")
    if authorization is not None:
        scheme, _, text = authorization.partition(" ")
        return text.strip() if scheme.lower() == "bearer" else ""
    return request.headers.get("x-api-key")


EMBEDDERS = Depends(require("embed"))
OPERATORS = Depends(require("operate"))
