"""The digest of an image by its tag, asked of its registry as the OCI distribution API has it.

Nobody's name or password is sent: a registry that wants a token gives one to whoever asks.
"""

import json
import re
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException, HTTPMessage
from typing import Any, Self

from plait.errors import ConfigError, DataError

REFERENCE = re.compile(r"^([\w.-]+(?::\d+)?)/([a-z0-9._/-]+):([\w.-]+)$")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
MANIFESTS = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
HOSTS = {"docker.io": "registry-1.docker.io"}
LOOPBACK = {"localhost", "127.0.0.1", "::1"}
PATIENCE = 30.0
SAID = {
    401: "it gives it to nobody without a name",
    403: "it gives it to nobody without a name",
    404: "it has no such image or tag",
    429: "it was asked too often; try again later",
}


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A token is for the host that was asked, and for no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirects)


@dataclass(frozen=True)
class Reference:
    """An image in a registry, by tag."""

    registry: str
    repository: str
    tag: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``registry/repository:tag``.

        Raises:
            ConfigError: the text is none.
        """
        found = REFERENCE.fullmatch(text)
        if found is None:
            raise ConfigError(f"{text!r} is no image", hint="write registry/repository:tag")
        return cls(*found.groups())

    def __str__(self) -> str:
        """As it is written in the list."""
        return f"{self.name}:{self.tag}"

    @property
    def name(self) -> str:
        """Without the tag."""
        return f"{self.registry}/{self.repository}"

    def digest(self) -> str:
        """The digest that the tag has now.

        Raises:
            ConfigError: the registry does not know it.
            DataError: the registry cannot be asked, or gives no digest.
        """
        host = HOSTS.get(self.registry, self.registry)
        secure = urllib.parse.urlsplit(f"//{host}").hostname not in LOOPBACK
        url = f"{'https' if secure else 'http'}://{host}/v2/{self.repository}/manifests/{self.tag}"
        try:
            headers = self._head(url)
        except urllib.error.HTTPError as error:
            said = SAID.get(error.code, f"it answers {error.code}")
            raise ConfigError(f"{self.registry} does not give {self}: {said}") from error
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise DataError(
                f"{self.registry} cannot be asked for {self}: {reason}",
                hint="ask where there is a network; envs/images.lock.json goes with the checkout",
            ) from error
        found = headers.get("Docker-Content-Digest", "")
        if not DIGEST.fullmatch(found):
            raise DataError(f"{self.registry} gives no sha256 of {self}, but {found!r}")
        return found

    def _head(self, url: str) -> HTTPMessage:
        """The headers of the manifest; with a token, where the registry wants one."""
        try:
            return _ask(url)
        except urllib.error.HTTPError as error:
            challenge = error.headers.get("WWW-Authenticate", "")
            if error.code != 401 or not challenge.lower().startswith("bearer "):
                raise
        return _ask(url, self._token(dict(re.findall(r'(\w+)="([^"]*)"', challenge))))

    def _token(self, wanted: dict[str, str]) -> str:
        realm = urllib.parse.urlsplit(wanted.get("realm", ""))
        if realm.scheme != "https" and realm.hostname not in LOOPBACK:
            raise DataError(f"{self.registry} wants a token of {wanted.get('realm')!r}, which is not https")
        words = {"scope": wanted.get("scope", f"repository:{self.repository}:pull")}
        if "service" in wanted:
            words["service"] = wanted["service"]
        url = realm._replace(query=urllib.parse.urlencode(words)).geturl()
        with _opener.open(url, timeout=PATIENCE) as answer:
            try:
                found = json.loads(answer.read(1 << 20))
                return str(found.get("token") or found["access_token"])
            except (ValueError, KeyError, AttributeError) as error:
                raise DataError(f"{realm.hostname} gives no token for {self}") from error


def _ask(url: str, token: str = "") -> HTTPMessage:
    headers = {"Accept": ", ".join(MANIFESTS)} | ({"Authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(url, headers=headers, method="HEAD")  # noqa: S310 - made above
    with _opener.open(request, timeout=PATIENCE) as answer:
        found: HTTPMessage = answer.headers
        return found
