"""The door: what every request must pass before any route sees it. Nothing is open but /health.

As a layer around the whole application it needs no route to remember it: a new one is closed from its first day.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from ultrafuser.server.api_error import ApiError
from ultrafuser.server.facts import facts_of
from ultrafuser.server.keys import KeyRing
from ultrafuser.server.metrics import Metrics
from ultrafuser.server.rates import Rates
from ultrafuser.server.settings import ServerSettings

OPEN = frozenset({("GET", "/health")})
# A browser that opens the page asks for the key by itself; Chromium looks at the first scheme alone.
_CHALLENGES = {"WWW-Authenticate": 'Basic realm="ultrafuser", charset="UTF-8", Bearer realm="ultrafuser"'}


class Guard:
    """Checks size of the head, Host, key and rate, in this order.

    Args:
        app: What lies behind.
        settings: Limits and hosts.
        keys: Who may pass.
        metrics: Counts who may not.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, keys: KeyRing, metrics: Metrics) -> None:
        self.app, self.settings, self.keys, self.metrics = app, settings, keys, metrics
        self.rates = Rates(settings.limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer with an error."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            key_id = self._check(scope)
            if scope["method"] != "POST":
                await self.app(scope, receive, send)
                return
            with self.rates.taking(key_id):
                await self.app(scope, receive, send)
        except ApiError as error:
            if error.status_code == 429:
                self.metrics.rejected("rate")
            await error.response()(scope, receive, send)

    def _check(self, scope: Scope) -> str:
        self._check_size(scope)
        if (scope["method"], scope["path"]) in OPEN:
            return "-"
        self._check_host(_values(scope, b"host"))
        key_id = self.keys.find(_values(scope, b"authorization"))
        if key_id is None:
            message = "this server needs a key: send it as Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers=_CHALLENGES)
        facts_of(scope).key_id = key_id
        return key_id

    def _check_size(self, scope: Scope) -> None:
        limits, headers = self.settings.limits, scope["headers"]
        size = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > limits.num_headers or size > limits.header_bytes:
            raise ApiError(431, "the headers of this request are too large", code="headers_too_large")
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > limits.url_bytes:
            raise ApiError(414, "the address of this request is too long", code="url_too_long")

    def _check_host(self, hosts: Sequence[bytes]) -> None:
        allowed = self.settings.allowed_hosts
        if "*" in allowed:
            return
        host = hosts[0].decode("latin-1").lower() if len(hosts) == 1 else ""
        name, colon, port = host.rpartition(":")
        if host not in allowed and not (colon and port.isdigit() and name in allowed):
            raise ApiError(400, "this server is not called so: see --allowed-hosts", code="invalid_host")


def _values(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]
