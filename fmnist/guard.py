"""What stands before MLflow's pages: a key for each start, this machine's addresses only, and no
writing call that the pages don't need.

Any account of a machine can connect to 127.0.0.1, and MLflow itself asks nobody who they are.
"""

import hmac
import re
import secrets
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

READING = {"GET", "HEAD"}
OPEN = {"/health"}
"""Answered to anybody."""
CALLS = re.compile(
    r"/graphql"
    r"|/ajax-api/2\.0/mlflow/(runs|experiments|logged-models)/search"
    r"|/ajax-api/2\.0/mlflow/experiments/search-datasets"
    r"|/ajax-api/[34]\.0/mlflow/(traces|datasets|issues)/(search|metrics|batchGetInfos)"
    r"|/ajax-api/2\.0/mlflow/runs/(delete|restore|update|set-tag|delete-tag)"
    r"|/ajax-api/2\.0/mlflow/experiments/(update|set-experiment-tag|delete-experiment-tag)"
    r"|/ajax-api/2\.0/mlflow/(registered-models|model-versions)/(update|delete)"
    r"|/ajax-api/2\.0/mlflow/logged-models/[\w-]+"
)
"""What the pages send besides GET: questions; and deleting, renaming and describing.

Runs and models are made by commands only.
"""


def addresses(port: int) -> list[str]:
    """What a browser on this machine may call the server; it leaves HTTP's own port out."""
    hosts = [f"{host}:{port}" for host in ("127.0.0.1", "localhost")]
    return hosts + (["127.0.0.1", "localhost"] if port == 80 else [])


class Guard:
    """An ASGI application in front of another, which answers nothing without a key.

    Who opens `/?key=...` gets the key as a cookie.
    """

    def __init__(self, app: ASGIApp, port: int) -> None:
        self.app, self.key = app, secrets.token_urlsafe(24)
        self.cookie = f"fmnist-{port}"  # a browser doesn't tell the ports of a host apart
        self.hosts = addresses(port)
        self.origins = {f"http://{host}" for host in self.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (answer := self._answer(scope)) is not None:
            await answer(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self.app(scope, receive, send)

    def _answer(self, scope: Scope) -> Response | None:
        """What is answered in place of the pages; None where these may."""
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        path, reading = scope["path"], scope["method"] in READING
        if path in OPEN and reading:
            return None
        if headers.get("host") not in self.hosts:
            return PlainTextResponse(f"not an address of this server: {self.hosts}", 403)
        given = parse_qs(scope["query_string"].decode("latin-1")).get("key", [])
        if path == "/" and reading and given and self._is_key(given[0]):
            return self._welcome()
        if not self._is_key(self._cookie(headers)):
            return PlainTextResponse("open the link that `fmnist ui` printed: it holds a key", 403)
        if headers.get("origin", "") not in {"", *self.origins}:
            return PlainTextResponse("not asked for by a page of this server", 403)
        if not reading and not CALLS.fullmatch(path):
            return PlainTextResponse("this is not changed through `fmnist ui`", 403)
        return None

    def _is_key(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), self.key.encode())

    def _cookie(self, headers: Mapping[str, str]) -> str:
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            return ""
        return found.value if found else ""

    def _welcome(self) -> Response:
        """Keep the key in the browser, and not in the address; the part behind # stays."""
        answer = RedirectResponse("/", 303, {"Referrer-Policy": "no-referrer"})
        answer.set_cookie(self.cookie, self.key, httponly=True, samesite="strict")
        return answer
