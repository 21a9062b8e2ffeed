"""The Hugging Face hub: what its trees list, where its files are, and its refusals in sentences.

The token is that of ``HF_TOKEN`` or of the token file, as ``huggingface_hub`` finds it. It goes into one
header to the hub's own address and is written nowhere.
"""

import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from plait.config.lock import Listed, Tree
from plait.errors import DataError
from plait.fetch.http import Refused, Source, get_json
from plait.layout import HubFile, HubTree

NEXT = re.compile(r'<([^>]+)>;\s*rel="next"')
PREFETCH = "on a machine with a network: snakemake prefetch"


def endpoint() -> str:
    """The address of the hub, or of the mirror that ``HF_ENDPOINT`` names."""
    from huggingface_hub import constants

    return constants.ENDPOINT.rstrip("/")


def offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` keeps us from asking anybody."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def refuse_offline(what: str) -> None:
    """Refuse what needs a network where there is to be none.

    Raises:
        DataError: it says how to come by it.
    """
    if offline():
        raise DataError(f"{what} is not here, and HF_HUB_OFFLINE keeps us from fetching it", hint=PREFETCH)


def _token() -> str | None:
    from huggingface_hub import constants, get_token

    return None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()


def source(path: str) -> Source:
    """An address of the hub, with the token if there is one."""
    token = _token()
    return Source(f"{endpoint()}/{path}", {"Authorization": f"Bearer {token}"} if token else {})


def source_of(file: HubFile) -> Source:
    """Where a file of a commit is."""
    kind, owner, name = file.repo.split("--", 2)
    prefix = "" if kind == "models" else f"{kind}/"
    return source(f"{prefix}{owner}/{name}/resolve/{file.commit}/{quote(file.file)}")


def resolve(tree: HubTree) -> Tree:
    """Ask the hub which commit a revision is, and what its files are.

    Raises:
        DataError: there is no such revision, it is not for us, or the hub cannot be asked.
    """
    what = tree.key.removeprefix("models/")
    refuse_offline(f"the list of the files of {what}")
    kind, owner, name = tree.repo.split("--", 2)
    try:
        found, _ = get_json(source(f"api/{kind}/{owner}/{name}/revision/{tree.revision}"), what)
        commit = found["sha"]
        files = _listing(source(f"api/{kind}/{owner}/{name}/tree/{commit}?recursive=true&expand=false"), what)
        return Tree(commit=commit, files=files)
    except Refused as error:
        raise refusal(error, what) from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{what}: {endpoint()} answers, but not as a hub does: {str(error)[:80]!r}",
            hint="HF_ENDPOINT names the hub or a mirror of it",
        ) from error


def _listing(page: Source, what: str) -> dict[str, Listed]:
    """Every file of a tree, page after page."""
    found: dict[str, Listed] = {}
    following: str | None = page.url
    while following:
        # Only an address of the hub itself gets the token: see `plait.fetch.http`.
        secret = page.secret if following.startswith(f"{endpoint()}/") else {}
        entries, headers = get_json(Source(following, secret), what)
        found |= {entry["path"]: _listed(entry) for entry in entries if entry["type"] == "file"}
        link = next((value for key, value in headers.items() if key.lower() == "link"), "")
        after = NEXT.search(link)
        following = after[1] if after else None
    return found


def _listed(entry: dict[str, Any]) -> Listed:
    """A large file has its sha256 listed, any other that of a git blob."""
    large = entry.get("lfs")
    if large:
        return Listed(bytes=large["size"], sha256=large["oid"].removeprefix("sha256:"))
    return Listed(bytes=entry["size"], git_sha1=entry["oid"])


def cached(file: HubFile) -> Path | None:
    """The same file in a cache of ``huggingface_hub`` on this machine."""
    from huggingface_hub import constants

    if not file.repo.startswith(("models--", "datasets--")):
        return None
    place = Path(constants.HF_HUB_CACHE) / file.repo / "snapshots" / file.commit / file.file
    return place.resolve() if place.is_file() else None


def refusal(error: Refused, what: str) -> DataError:
    """The hub's refusal in a sentence."""
    code, sent = error.headers.get("X-Error-Code", ""), _token() is not None
    message = error.headers.get("X-Error-Message", "")
    if code == "GatedRepo":
        page = f"{endpoint()}/{what.partition('@')[0].partition(':')[0]}"
        who = "the token you have is of an account without access" if sent else "no token was found"
        return DataError(
            f"{what} is gated, and {who}",
            hint=f"accept its terms at {page}, then set HF_TOKEN, or `hf auth login`",
        )
    if error.status == 401 and (sent or message.startswith("Invalid credentials")) and code != "RepoNotFound":
        return DataError(
            f"the hub does not accept your token for {what}", hint="HF_TOKEN, or `hf auth login`"
        )
    if error.status in (401, 404) or code in ("RepoNotFound", "RevisionNotFound", "EntryNotFound"):
        private = "" if sent else "; if it is private, set HF_TOKEN, or `hf auth login`"
        return DataError(f"the hub has no {what}", hint=f"look at repo and revision in config/{private}")
    return DataError(f"{what} cannot be fetched: {error}", hint=message or f"asked was {endpoint()}")
