"""Uploads: what can be known is refused before training, and an upload that fails says where the model is. No network."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants
from torch import nn

from dae.hub import PretrainedModel, prepare_repository


class Small(PretrainedModel):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def to_config(self):
        return {}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of this machine: `hub.answers[path] = (status, JSON)`, everything else succeeds; `hub.asked` lists the paths."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            hub.asked.append(self.path)
            fine = {"id": "me/model", "name": "me", "type": "user", "url": f"{constants.ENDPOINT}/me/model"}
            status, content = hub.answers.get(self.path, (200, fine))
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = answer

        def log_message(self, *_):
            pass

    hub = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.answers, hub.asked = {}, []
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{hub.server_address[1]}")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield hub
    hub.shutdown()
    hub.server_close()


WRITE = "/api/models/me/model/auth-check/write"
FORBIDDEN = (403, {"error": "You don't have the rights to create a model under the namespace me"})


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"/api/whoami-v2": (401, {"error": "Invalid"})}, "account of the Hub.*Invalid user token.*hf auth login"),
        ({"/api/whoami-v2": (500, {})}, "account of the Hub that can be reached"),
        ({"/api/repos/create": FORBIDDEN, "/api/models/me/model": (404, {})}, "me/model cannot be created.*rights.*of your own"),
        (
            {"/api/repos/create": FORBIDDEN, WRITE: (403, {"error": "read only"})},
            "me/model cannot be created or written.*read only",
        ),
        ({"/api/repos/create": (409, {"error": "exists"}), WRITE: (404, {})}, "me/model cannot be created or written"),
    ],
)
def test_what_the_hub_refuses(hub, answers, words):
    hub.answers = answers
    with pytest.raises(OSError, match=words) as caught:
        prepare_repository("me/model")
    assert "\n" not in str(caught.value) and "push_to_hub=false" in str(caught.value)
    assert "hf_secret" not in str(caught.value)


def test_what_the_hub_allows(hub):
    prepare_repository("me/model", "me/model-prior")
    assert hub.asked == ["/api/whoami-v2", "/api/repos/create", WRITE]


@pytest.mark.parametrize("name", ["a/b/c", "me/", "me/a b", "-a", "a..b", "me/" + "x" * 97])
def test_no_name_of_a_repository(hub, name):
    with pytest.raises(ValueError, match=r"is no name of a repository.*expected <user>/<name>") as caught:
        prepare_repository(name)
    assert "\n" not in str(caught.value) and hub.asked == []


def test_a_later_name_that_is_none(hub):
    with pytest.raises(ValueError, match="me/model--prior"):
        prepare_repository("me/model", "me/model--prior")
    assert hub.asked == []


def test_no_token(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match="hf auth login") as caught:
        prepare_repository("me/model")
    assert hub.asked == [] and "\n" not in str(caught.value)


def test_offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"HF_HUB_OFFLINE=1.*unset it"):
        prepare_repository("me/model")
    assert hub.asked == []


def test_nobody_answers(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"Hub that can be reached.*push_to_hub=false") as caught:
        prepare_repository("me/model")
    assert "\n" not in str(caught.value)


def test_an_upload_that_fails_says_where_the_model_is(hub, tmp_path):
    model = Small()
    model.save_pretrained(tmp_path / "model", card="# Card")
    hub.answers = {"/api/models/me/model/preupload/main": (403, {"error": "quota\nexceeded"})}
    with pytest.raises(
        OSError, match=r"upload to me/model failed.*saved in .*model; upload it with `hf upload me/model "
    ) as caught:
        model.push_to_hub("me/model", folder=tmp_path / "model")
    assert "\n" not in str(caught.value)
