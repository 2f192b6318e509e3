"""aiohttp under the SDK's HTTP client, with the way to its reader left open.

The SDK's own aiohttp client hands a stream through four generators. Here whoever reads the answer
finds aiohttp's reader among the response's extensions and takes all that has arrived at one go.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import httpx2

READER = "quart_chat.reader"
"""The extension that holds the ``aiohttp.StreamReader`` of a response."""

KEEPALIVE_SECONDS = 15


def http_client(base_url: str, connect_seconds: float) -> httpx2.AsyncClient:
    """Return a client for one endpoint, with a time limit for connecting only.

    A proxy is taken from the environment (``HTTPS_PROXY``, ``NO_PROXY``) here and once; aiohttp
    would ask a thread for it at every request.
    """
    connector = aiohttp.TCPConnector(
        limit=0, keepalive_timeout=KEEPALIVE_SECONDS, ssl=httpx2.create_ssl_context()
    )
    session = aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_seconds),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        proxy=proxy_of(base_url),
    )
    return httpx2.AsyncClient(
        transport=AiohttpTransport(session), timeout=None, follow_redirects=False, trust_env=False
    )


def proxy_of(url: str) -> str | None:
    """Return the proxy that the environment names for a URL."""
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    return proxy if proxy and not proxy_bypass(parts.hostname or "") else None


class AiohttpTransport(httpx2.AsyncBaseTransport):
    """Transport that sends httpx's requests over an aiohttp session, which it closes."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request that is in memory whole.

        Raises:
            ConnectTimeout: No connection came about in time.
            ConnectError: Nor in any other way, or it broke before there was an answer.
            ClientResponseError: What came back is not HTTP.
        """
        try:
            response = await self._session.request(
                request.method,
                str(request.url),
                headers=request.headers.multi_items(),
                data=request.content or None,
                allow_redirects=False,
            )
        except TimeoutError as error:
            raise httpx2.ConnectTimeout(str(error), request=request) from error
        except (aiohttp.ClientConnectionError, OSError) as error:
            raise httpx2.ConnectError(str(error), request=request) from error
        return httpx2.Response(
            response.status,
            headers=response.raw_headers,
            stream=Body(response),
            request=request,
            extensions={READER: response.content},
        )

    async def aclose(self) -> None:
        """Close every connection."""
        await self._session.close()


class Body(httpx2.AsyncByteStream):
    """Body of a refusal; closing it ends the connection if more would come."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._response.content.iter_any():
            yield chunk

    async def aclose(self) -> None:
        self._response.release()


def reader_of(response: Any) -> aiohttp.StreamReader:
    """Return the reader of a response that the SDK has left unread."""
    reader: aiohttp.StreamReader = response.extensions[READER]
    return reader
