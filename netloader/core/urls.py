"""URLs that may hold a password: how they are shown, and a type that shows itself like that."""

from __future__ import annotations

import hmac
import re
from urllib.parse import unquote

__all__ = ["Url", "secrets_hidden", "without_secrets"]

_HIDDEN = "***"

_USER = re.compile(r"(?P<scheme>[^/?#]*://)(?P<user>[^:@]*)(?P<secret>:.*)?@", re.DOTALL)
_NO_URL = re.compile(r"^(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*:)?+(?!/(?!/)).*@", re.DOTALL)
_PARAMETER = re.compile(r"(?P<name>[?&][^=&]*(?:pass|secret|token|key|auth)[^=&]*=)(?P<secret>[^&#]*)", re.IGNORECASE)


def without_secrets(url: str) -> str:
    """`url` as it may be shown: passwords, and parameters whose name sounds like one, are replaced by ``***``.

    Of a text that is neither a URL with a host nor a path, all between its scheme and the last ``@`` is replaced.
    """
    if not _USER.match(url):
        url = _NO_URL.sub(rf"\g<scheme>{_HIDDEN}@", url)
    url = _USER.sub(lambda found: f"{found['scheme']}{found['user']}{':' + _HIDDEN if found['secret'] else ''}@", url)
    return _PARAMETER.sub(lambda found: f"{found['name']}{_HIDDEN}", url)


def secrets_hidden(text: str, url: str) -> str:
    """`text` without the secrets of `url`."""
    user = _USER.match(url)
    secrets = {found["secret"] for found in _PARAMETER.finditer(url)}
    if user is not None and user["secret"]:
        secrets.add(user["secret"][1:])
    for secret in {*secrets, *map(unquote, secrets)} - {""}:
        text = text.replace(secret, _HIDDEN)
    return text


class Url:
    """A URL. Neither ``repr`` nor ``str`` shows its secrets; only :meth:`reveal` does."""

    __slots__ = ("_url",)

    def __init__(self, url: str) -> None:
        self._url = url

    def reveal(self) -> str:
        """The whole URL."""
        return self._url

    def __str__(self) -> str:
        return without_secrets(self._url)

    def __repr__(self) -> str:
        return repr(str(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Url) and hmac.compare_digest(self._url.encode(), other._url.encode())

    __hash__ = None  # type: ignore[assignment]  # as `Token`
