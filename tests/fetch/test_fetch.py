"""Files of a hub on this machine: whole, resumed, checked, refused in a sentence."""

import hashlib
import json
import time

import pytest
from hub_server import BIG, COMMIT, SMALL, TOKEN, Hub, git_sha1

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def test_a_revision_is_locked_with_what_the_hub_lists(hub, place):
    hub.page = 2
    said = place.plait("lock")
    assert "locked in config/hub.lock.json: models/us/tiny@main is 0123456789ab, 3 files" in said
    entry = place.lock["models/us/tiny@main"]
    assert entry["commit"] == COMMIT
    assert entry["files"][WEIGHTS] == {"bytes": len(BIG), "sha256": hashlib.sha256(BIG).hexdigest()}
    assert entry["files"][CONFIG] == {"bytes": len(SMALL), "git_sha1": git_sha1(SMALL)}
    asked = len(hub.requests)
    place.plait("lock")
    assert len(hub.requests) == asked, "what is locked is not asked again"


def test_update_asks_again_and_says_what_it_was(hub, locked):
    entry = locked.lock
    entry["models/us/tiny@main"]["commit"] = "f" * 40
    (locked.folder / "config/hub.lock.json").write_text(json.dumps(entry))
    assert "is 0123456789ab, was ffffffffffff" in locked.plait("lock", "--update")


@pytest.mark.parametrize(("name", "content"), [(WEIGHTS, BIG), (CONFIG, SMALL)])
def test_a_file_comes_whole_and_nothing_is_left_beside_it(locked, name, content):
    locked.plait("fetch", locked.file(name))
    assert locked.read(locked.file(name)) == content
    assert locked.beside(locked.file(name)) == [name]
    checked = json.loads(locked.read(locked.file(name).replace(COMMIT, f"{COMMIT}.checked") + ".json"))
    assert checked == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_a_connection_that_is_cut_again_and_again_goes_on_where_it_was(hub, locked):
    hub.faults.cuts = [100_000, 0, 300_000, 1]
    locked.plait("fetch", locked.file(WEIGHTS))
    assert locked.read(locked.file(WEIGHTS)) == BIG
    ranges = [asked for _, asked in hub.files_asked()]
    assert ranges == ["", "bytes=100000-", "bytes=100000-", "bytes=400000-", "bytes=400001-"]


def test_a_killed_process_is_followed_by_another_that_goes_on(hub, locked):
    hub.faults.slow = 0.15
    first = locked.start("fetch", locked.file(WEIGHTS))
    part = locked.folder / locked.file(WEIGHTS).replace(WEIGHTS, f".{WEIGHTS}.part")
    wait_for(lambda: part.is_file() and part.stat().st_size > 100_000)
    first.kill()
    first.communicate()
    there = part.stat().st_size
    hub.faults.slow = 0.0
    said = locked.plait("fetch", locked.file(WEIGHTS))
    assert f"goes on after {there} bytes" in said
    assert hub.files_asked()[-1][1] == f"bytes={there}-"
    assert 100_000 < there < len(BIG)
    assert locked.read(locked.file(WEIGHTS)) == BIG
    assert locked.beside(locked.file(WEIGHTS)) == [WEIGHTS]


def test_two_fetchers_at_one_time_fetch_once(hub, locked):
    hub.faults.slow = 0.1
    both = [locked.start("fetch", locked.file(WEIGHTS)) for _ in range(2)]
    said = [one.communicate(timeout=60)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert len(hub.files_asked()) == 1
    assert any("waiting for process" in one and "is here already" in one for one in said)
    assert locked.read(locked.file(WEIGHTS)) == BIG


def test_a_flipped_bit_is_fetched_again_once(hub, locked):
    hub.faults.flips = [77]
    said = locked.plait("fetch", locked.file(WEIGHTS))
    assert "came as something else, and is fetched again: sha256" in said
    assert locked.read(locked.file(WEIGHTS)) == BIG


@pytest.mark.parametrize(("name", "digest"), [(WEIGHTS, "sha256"), (CONFIG, "git_sha1")])
def test_wrong_bytes_twice_are_refused_and_removed(hub, locked, name, digest):
    hub.faults.flips = [3, 3]
    said = locked.plait("fetch", locked.file(name), code=2)
    assert f"us/tiny: {name} came twice as something else: {digest}" in said
    assert locked.beside(locked.file(name)) == []


def test_a_flipped_part_of_a_killed_process_is_found(hub, locked):
    hub.faults.cuts, hub.faults.statuses = [500_000], [None, 403]
    locked.plait("fetch", locked.file(WEIGHTS), code=2)
    part = locked.folder / locked.file(WEIGHTS).replace(WEIGHTS, f".{WEIGHTS}.part")
    assert part.stat().st_size == 500_000
    part.write_bytes(b"\0" * 500_000)
    assert "fetched again" in locked.plait("fetch", locked.file(WEIGHTS))
    assert locked.read(locked.file(WEIGHTS)) == BIG


def test_a_busy_hub_is_waited_for_as_long_as_it_asks(hub, locked):
    hub.faults.statuses = [503, (429, 2), 500]
    begin = time.monotonic()
    said = locked.plait("fetch", locked.file(CONFIG))
    assert time.monotonic() - begin > 2
    assert "status 429; next try in 2.0 s" in said
    assert locked.read(locked.file(CONFIG)) == SMALL


def test_a_hub_that_asks_for_hours_is_not_waited_for(hub, locked):
    hub.faults.statuses = [(429, 7200)]
    said = locked.plait("fetch", locked.file(CONFIG), code=2)
    assert "us/tiny: config.json cannot be fetched: status 429; it asks to wait 7200 s" in said


def test_a_busy_hub_is_asked_again_for_its_tree(hub, place):
    hub.faults.api_statuses = [502, 429]
    place.plait("lock")
    assert place.lock["models/us/tiny@main"]["commit"] == COMMIT


def test_a_server_without_ranges_begins_anew(hub, locked):
    hub.faults.cuts, hub.faults.no_range = [100_000], True
    locked.plait("fetch", locked.file(WEIGHTS))
    assert locked.read(locked.file(WEIGHTS)) == BIG


def test_a_whole_part_is_not_fetched_again(hub, locked):
    hub.faults.cuts, hub.faults.statuses = [0], [None, 403]
    locked.plait("fetch", locked.file(WEIGHTS), code=2)
    part = locked.folder / locked.file(WEIGHTS).replace(WEIGHTS, f".{WEIGHTS}.part")
    part.write_bytes(BIG)
    locked.plait("fetch", locked.file(WEIGHTS))
    assert hub.files_asked()[-1][1] == f"bytes={len(BIG)}-"
    assert locked.read(locked.file(WEIGHTS)) == BIG


def test_a_mirror_that_gives_pointers_is_named(hub, locked):
    hub.faults.pointers = True
    said = locked.plait("fetch", locked.file(WEIGHTS), code=2)
    assert "came twice as something else: git's LFS pointer" in said


def test_a_redirect_is_followed_without_the_token(hub, locked):
    other = Hub(urls={f"/cdn/{WEIGHTS}": BIG}).start()
    hub.faults.redirect = f"{other.url}/cdn"
    other.faults.cuts = [200_000]
    said = locked.plait("fetch", locked.file(WEIGHTS), HF_TOKEN=TOKEN)
    assert locked.read(locked.file(WEIGHTS)) == BIG
    sent = [headers.get("Authorization") for _, headers in hub.requests if "Authorization" in headers]
    assert sent == [f"Bearer {TOKEN}"] * 2
    assert [headers.get("Range", "") for _, headers in other.requests] == ["", "bytes=200000-"]
    assert not any("Authorization" in headers for _, headers in other.requests)
    assert TOKEN not in said
    assert "Signature" not in said
    other.stop()


def test_a_redirect_in_circles_ends(hub, locked):
    hub.faults.redirect = f"{hub.url}/us/tiny/resolve/{COMMIT}"
    said = locked.plait("fetch", locked.file(WEIGHTS), code=2)
    assert "redirects more than 10 times" in said
    assert "Signature" not in said


REFUSALS = {
    "gated": ({}, "us/tiny: config.json is gated, and no token was found"),
    "closed": ({"HF_TOKEN": TOKEN}, "is gated, and the token you have is of an account without access"),
    "gated with another's token": ({"HF_TOKEN": "hf_other"}, "the hub does not accept your token"),
    "private": ({}, "the hub has no us/tiny: config.json"),
    "gone": ({}, "the hub has no us/tiny: config.json"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_sentences(hub, locked, case):
    environment, sentence = REFUSALS[case]
    if case.startswith("gated"):
        hub.gated.add("models/us/tiny")
    if case == "closed":
        hub.closed.add("models/us/tiny")
    if case == "private":
        hub.private.add("models/us/tiny")
    if case == "gone":
        del hub.repos["models/us/tiny"]
    said = locked.plait("fetch", locked.file(CONFIG), code=2, **environment)
    assert sentence in said
    assert "HF_TOKEN" in said
    assert "hf_" not in said
    assert len(hub.files_asked()) == 1, "a refusal is not tried again"


@pytest.mark.parametrize("by_file", [False, True])
def test_a_gated_file_comes_with_the_token(hub, locked, by_file, tmp_path):
    hub.gated.add("models/us/tiny")
    environment = {"HF_TOKEN": TOKEN}
    if by_file:
        (tmp_path / "token").write_text(f"{TOKEN}\n")
        environment = {"HF_TOKEN_PATH": str(tmp_path / "token")}
    said = locked.plait("fetch", locked.file(CONFIG), **environment)
    assert locked.read(locked.file(CONFIG)) == SMALL
    assert TOKEN not in said


UNRESOLVED = {
    "us/none": "the hub has no us/none@main",
    "us/tiny@v9": "the hub has no us/tiny@v9",
}


@pytest.mark.parametrize("name", UNRESOLVED)
def test_what_the_hub_does_not_have_is_refused_when_it_is_locked(place, name):
    repo, _, revision = name.partition("@")
    place.config({"raw_hf": {"tiny": {"kind": "hub", "repo": repo, "revision": revision or "main"}}})
    assert UNRESOLVED[name] in place.plait("lock", code=2)
    assert not (place.folder / "config/hub.lock.json").exists()


def test_a_revision_may_have_slashes(place):
    place.config({"raw_hf": {"tiny": {"kind": "hub", "repo": "us/tiny", "revision": "refs/pr/1"}}})
    place.plait("lock")
    assert place.lock["models/us/tiny@refs/pr/1"]["commit"] == COMMIT


def test_something_else_than_a_hub_is_named(place, hub):
    hub.urls["/api"] = b""
    said = place.plait("lock", code=2, HF_ENDPOINT=f"{hub.url}/nothing")
    assert "the hub has no us/tiny@main" in said


def test_offline_says_what_to_do(locked, hub):
    asked = len(hub.requests)
    said = locked.plait("fetch", locked.file(CONFIG), code=2, HF_HUB_OFFLINE="1")
    assert "us/tiny: config.json is not here, and HF_HUB_OFFLINE keeps us from fetching it" in said
    assert "snakemake prefetch" in said
    assert len(hub.requests) == asked


def test_offline_nothing_is_locked(place, hub):
    said = place.plait("lock", code=2, HF_HUB_OFFLINE="1")
    assert "the list of the files of us/tiny@main is not here, and HF_HUB_OFFLINE keeps us from" in said
    assert hub.requests == []


def test_many_locks_at_one_time_lose_no_entry(place, hub):
    names = [f"us/m{number}" for number in range(6)]
    hub.repos |= {f"models/{name}": {"config.json": SMALL} for name in names}
    targets = [f"data/hub/models--{name.replace('/', '--')}/main.json" for name in names]
    jobs = [place.start("lock", target) for target in targets]
    said = [job.communicate(timeout=60)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 6, said
    assert set(place.lock) == {f"models/{name}@main" for name in names}


def test_the_file_of_a_cache_is_linked(locked, hub, caches):
    home = caches(WEIGHTS, BIG)
    said = locked.plait("fetch", locked.file(WEIGHTS), HF_HOME=home, HF_HUB_OFFLINE="1")
    assert "linked to" in said
    assert (locked.folder / locked.file(WEIGHTS)).is_symlink()
    assert locked.read(locked.file(WEIGHTS)) == BIG
    assert hub.files_asked() == []


def test_a_damaged_file_of_a_cache_is_not_taken(locked, hub, caches):
    home = caches(WEIGHTS, BIG[:-1] + b"x")
    said = locked.plait("fetch", locked.file(WEIGHTS), HF_HOME=home)
    assert "is not taken: sha256" in said
    assert not (locked.folder / locked.file(WEIGHTS)).is_symlink()
    assert locked.read(locked.file(WEIGHTS)) == BIG


def test_a_file_of_a_dataset_with_a_space_in_its_name(hub, place):
    place.config({"datasets": {"x": {"source": {"kind": "hub", "repo": "us/talks", "files": ["data/*"]}}}})
    place.plait("lock")
    file = place.file("data/b c.jsonl", repo="datasets--us--talks")
    place.plait("fetch", file)
    assert place.read(file) == SMALL
    assert hub.files_asked()[-1][0] == f"/datasets/us/talks/resolve/{COMMIT}/data/b%20c.jsonl"


def test_what_nothing_in_config_names_is_refused(locked):
    said = locked.plait("fetch", locked.file(CONFIG).replace(COMMIT, "f" * 40), code=2)
    assert "nothing in config/ or config/hub.lock.json comes as" in said


def test_another_file_at_the_place_is_not_overwritten(locked):
    path = locked.folder / locked.file(CONFIG)
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    assert "is not us/tiny: config.json" in locked.plait("fetch", locked.file(CONFIG), code=2)
    assert path.read_text() == "mine"


def wait_for(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)
