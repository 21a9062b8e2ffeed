"""What is given up at once, and what is tried again."""

import time
from email.utils import formatdate

import pytest

from plait.errors import DataError
from plait.fetch import http


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(http, "FIRST_DELAY", 0.001)


def test_no_network_ends_in_a_sentence_after_some_tries(soon, caplog):
    caplog.set_level("INFO")
    with pytest.raises(DataError, match="a file cannot be fetched: ConnectionRefusedError") as error:
        http.get_json(http.Source("http://127.0.0.1:1/x"), "a file")
    assert len(caplog.messages) == http.TRIES - 1
    assert "is there a network?" in str(error.value)


def test_a_redirect_to_a_file_of_this_machine_is_not_followed(hub):
    hub.faults.redirect = "file:///etc"
    asked = http.Source(f"{hub.url}/us/tiny/resolve/0123456789abcdef0123456789abcdef01234567/config.json")
    with pytest.raises(DataError, match="redirects to no http or https address"), http.get(asked):
        pass


def test_an_answer_that_is_not_json_names_the_server(hub):
    hub.urls["/page"] = b"<html>log in first"
    with pytest.raises(DataError, match=r"answers, but not as a hub does: b'<html>"):
        http.get_json(http.Source(f"{hub.url}/page"), "us/tiny")


def test_secrets_are_in_no_text_of_a_source():
    assert "hf_x" not in repr(http.Source("http://a/b", {"Authorization": "Bearer hf_x"}))


def test_a_date_is_as_good_as_seconds():
    assert 50 < http.retry_after(formatdate(time.time() + 60)) <= 60
    assert http.retry_after(formatdate(time.time() - 60)) == 0.0


@pytest.mark.parametrize("url", ["http://127.0.0.1:80/a", "http://127.0.0.1/b"])
def test_a_port_that_is_the_usual_one_is_the_same_origin(url):
    assert http._origin(url) == ("http", "127.0.0.1", 80)
    assert http._origin(url) != http._origin("https://127.0.0.1/b")
