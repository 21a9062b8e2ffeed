"""One GET that survives what networks do: redirects, cuts, busy servers.

A secret header goes to the origin it is meant for and nowhere else; no address is logged after a redirect,
since those of content networks are signed.
"""

import email.utils
import http.client
import json
import logging
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import plait
from plait.errors import DataError

BUSY = {408, 425, 429, 500, 502, 503, 504}
REDIRECTS = {301, 302, 303, 307, 308}
MOST_REDIRECTS = 10
TIMEOUT = 30.0
"""Seconds of silence after which a connection counts as cut."""
TRIES = 7
"""Failures in a row, without a byte between them, after which it is given up."""
FIRST_DELAY, LONGEST_DELAY = 0.5, 60.0
LONGEST_WISH = 900.0
"""Seconds that a server may ask us to wait."""

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Transient(Exception):  # noqa: N818 - it is a state of the network, seen by no user
    """What another try may mend; ``after`` is how long the server asks us to wait, in seconds."""

    def __init__(self, why: str, after: float | None = None) -> None:
        """Keep both."""
        super().__init__(why)
        self.after = after


class Refused(Exception):  # noqa: N818 - callers turn it into a sentence
    """An answer that another try will not change; its headers have names as in ``X-Error-Code``."""

    def __init__(self, status: int, headers: Mapping[str, str]) -> None:
        """Keep both."""
        super().__init__(" ".join(filter(None, (f"status {status}", headers.get("X-Error-Code", "")))))
        self.status, self.headers = status, headers


@dataclass(frozen=True)
class Source:
    """An address, and the headers that only its own origin may see."""

    url: str
    secret: Mapping[str, str] = field(default_factory=dict, repr=False)


class _Stay(urllib.request.HTTPRedirectHandler):
    """Redirects are followed here by hand: urllib would send the token along."""

    def redirect_request(self, *_: Any) -> None:
        """No."""


@contextmanager
def get(source: Source, headers: Mapping[str, str] | None = None) -> Iterator[http.client.HTTPResponse]:
    """Open an address, at its end after redirects.

    Raises:
        Transient: the network, or a server that is busy.
        Refused: any other answer than 2xx or 416.
        DataError: it redirects in circles, or a certificate is wrong.
    """
    answer = _follow(source, headers or {})
    try:
        yield answer
    finally:
        answer.close()


def read(answer: http.client.HTTPResponse, amount: int | None = None) -> bytes:
    """The next bytes of an answer, or all of them.

    Raises:
        Transient: the connection was cut, or fell silent.
    """
    try:
        return answer.read(amount)
    except (http.client.HTTPException, OSError) as error:
        raise Transient(f"{type(error).__name__}: {error}") from error


def _follow(source: Source, headers: Mapping[str, str]) -> http.client.HTTPResponse:
    opener = urllib.request.build_opener(_Stay)
    url = source.url
    for _ in range(MOST_REDIRECTS):
        request = urllib.request.Request(url, headers={  # noqa: S310 - http and https only, see _joined
            "User-Agent": f"plait/{plait.__version__}", "Accept-Encoding": "identity", **headers
        })  # fmt: skip
        if _origin(url) == _origin(source.url):
            for name, value in source.secret.items():
                request.add_unredirected_header(name, value)
        try:
            answer: http.client.HTTPResponse = opener.open(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            status, found = error.code, {**error.headers}
            if status == 416:
                return error  # type: ignore[return-value]  # it has status, headers and close like any answer
            error.close()
            if status not in REDIRECTS:
                raise _told(status, found) from None
            url = _joined(url, error.headers.get("Location", ""), source.url)
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            raise _cause(error, source.url) from error
        else:
            return answer
    raise DataError(f"{source.url} redirects more than {MOST_REDIRECTS} times")


def _told(status: int, headers: Mapping[str, str]) -> Exception:
    if status in BUSY:
        return Transient(f"status {status}", retry_after(headers.get("Retry-After", "")))
    return Refused(status, {name.title(): value for name, value in headers.items()})


def _joined(url: str, location: str, asked: str) -> str:
    joined = urljoin(url, location)
    if not location or urlsplit(joined).scheme not in ("http", "https"):
        raise DataError(f"{asked} redirects to no http or https address")
    return joined


def _cause(error: Exception, url: str) -> Exception:
    reason = getattr(error, "reason", error)
    if isinstance(reason, ssl.SSLCertVerificationError):
        return DataError(
            f"{urlsplit(url).hostname} shows a certificate that is not trusted: {reason.verify_message}",
            hint="SSL_CERT_FILE names a file of certificates to trust",
        )
    return Transient(f"{type(reason).__name__}: {reason}")


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def retry_after(text: str) -> float | None:
    """Seconds that a Retry-After header asks for: a number or a date; None where it says nothing.

    >>> retry_after("7")
    7.0
    >>> retry_after("soon") is None
    True
    """
    if text.strip().isdigit():
        return float(text)
    try:
        return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except ValueError:
        return None


class Patience:
    """How often a thing may fail, and how long to wait before the next try."""

    def __init__(self, what: str) -> None:
        """Begin with no failures."""
        self.what = what
        self.failures = 0

    def progressed(self) -> None:
        """Something came: failures are counted anew."""
        self.failures = 0

    def wait(self, why: Transient) -> None:
        """Sleep before the next try.

        Raises:
            DataError: that was the last one, or the server asks for more time than a job has.
        """
        self.failures += 1
        if self.failures >= TRIES or (why.after or 0) > LONGEST_WISH:
            wish = f"; it asks to wait {why.after:.0f} s" if why.after else ""
            raise DataError(
                f"{self.what} cannot be fetched: {why}{wish}",
                hint="is there a network? what has come is kept, and the same command goes on from there",
            ) from why
        delay = why.after if why.after is not None else FIRST_DELAY * 2 ** (self.failures - 1)
        log.info("%s: %s; next try in %.1f s", self.what, why, min(delay, LONGEST_WISH))
        time.sleep(delay if why.after is not None else min(delay, LONGEST_DELAY))


def patiently(what: str, ask: Callable[[], Result]) -> Result:
    """What ``ask`` gives, after as many tries as it takes.

    Raises:
        DataError: too many failed.
    """
    patience = Patience(what)
    while True:
        try:
            return ask()
        except Transient as why:
            patience.wait(why)


def get_json(source: Source, what: str) -> tuple[Any, Mapping[str, str]]:
    """An answer in JSON, and its headers.

    Raises:
        DataError: it does not come, or is not JSON.
        Refused: the server gives none.
    """

    def ask() -> tuple[Any, Mapping[str, str]]:
        with get(source) as answer:
            body = read(answer)
            try:
                return json.loads(body), {**answer.headers}
            except ValueError as error:
                raise DataError(
                    f"{what}: {urlsplit(source.url).netloc} answers, but not as a hub does: {body[:40]!r}",
                    hint="HF_ENDPOINT names the hub or a mirror of it",
                ) from error

    return patiently(what, ask)
