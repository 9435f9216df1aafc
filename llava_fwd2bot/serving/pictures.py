"""Images of requests: where their bytes come from, and under which limits they are read."""

from __future__ import annotations

import base64
import binascii
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

from .errors import APIError, invalid
from .limits import Limits

SCHEME = "cache://"
_DATA = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^;,]*)*;base64,", re.IGNORECASE)
SECONDS = 20.0  # that an allowed host may take


class Fetcher:
    """Bytes of images in requests.

    Args:
        hosts: from which URLs are fetched; with none, no URL is.
    """

    def __init__(self, limits: Limits, hosts: Sequence[str] = ()) -> None:
        self.limits, self.hosts = limits, tuple(host.lower() for host in hosts)

    def __call__(self, url: str, param: str) -> bytes:
        """The bytes of a data URI, or of a URL of an allowed host.

        Raises:
            APIError: it is neither, or too large.
        """
        if url[:5].lower() == "data:":
            return self._of_data(url, param)
        if re.match(r"https?://", url, re.IGNORECASE):
            return self._of_host(url, param)
        raise invalid(f"An image is a data URI (data:image/jpeg;base64,…) or {SCHEME}ID, not {url[:80]!r}.", param)

    def _of_data(self, url: str, param: str) -> bytes:
        found = _DATA.match(url)
        if found is None:
            raise invalid("The data URI is not of the form data:image/jpeg;base64,…", param)
        if (len(url) - found.end()) * 3 // 4 > self.limits.image_bytes + 3:
            raise self._too_large(param)
        try:
            data = base64.b64decode(url[found.end() :].encode(), validate=True)
        except (binascii.Error, ValueError) as error:
            raise invalid(f"The data URI is not base64 ({error}).", param) from error
        if len(data) > self.limits.image_bytes:
            raise self._too_large(param)
        return data

    def _of_host(self, url: str, param: str) -> bytes:
        try:
            parts = urllib.parse.urlsplit(url)
            host = (parts.hostname or "").lower()
        except ValueError as error:
            raise invalid(f"{url[:80]!r} is no URL ({error}).", param) from error
        if host not in self.hosts:
            raise APIError(
                403,
                f"URLs of {host or 'no host'} are not fetched: send the image as a data URI, or start the server with "
                "--fetch-host.",
                "url_not_allowed",
                param,
            )
        request = urllib.request.Request(url, headers={"User-Agent": "llava_fwd2bot", "Accept": "image/*"})
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=SECONDS) as response:
                data = response.read(self.limits.image_bytes + 1)
        except (OSError, ValueError, urllib.error.URLError) as error:
            raise invalid(f"{url[:200]} could not be fetched ({error}).", param, "url_failed") from error
        if len(data) > self.limits.image_bytes:
            raise self._too_large(param)
        return data

    def _too_large(self, param: str) -> APIError:
        most = self.limits.image_bytes
        return APIError(413, f"The image has more than {most:,} bytes, which is the limit.", "image_too_large", param)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could lead to a host that is not allowed."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None
