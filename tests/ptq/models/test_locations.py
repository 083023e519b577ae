"""Models on the hub: each refusal as the library raises it, told in one line that says what to do; nothing is downloaded."""

from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.errors as hub
import pytest
from huggingface_hub.utils import _http

from ptq.config.schema import ModelConfig
from ptq.errors import UserError
from ptq.models.loading import check
from ptq.models.locations import ModelSource, locate, source_of

NAME = "someone/some-model"
URL = f"https://huggingface.co/api/models/{NAME}"
CONFIG = ModelConfig(NAME)
http = _http.httpx2 if hasattr(_http, "httpx2") else _http.httpx


def answered(status, **headers):
    """Returns the error that huggingface_hub makes of an answer of the hub."""
    response = http.Response(status, headers=headers, request=http.Request("GET", URL))
    with pytest.raises(hub.HfHubHTTPError) as caught:
        _http.hf_raise_for_status(response)
    return caught.value


REFUSED = {
    "no such repository": (answered(404, **{"X-Error-Code": "RepoNotFound"}), "no such repository on the hub"),
    "not logged in": (answered(401), "no such repository on the hub (or a private one): check the id, or log in"),
    "gated": (answered(403, **{"X-Error-Code": "GatedRepo"}), "is gated: ask for access on its page, then log in"),
    "no such revision": (answered(404, **{"X-Error-Code": "RevisionNotFound"}), "model.revision: 'v9' is no branch"),
    "disabled": (
        answered(403, **{"X-Error-Message": "Access to this resource is disabled."}),
        "disabled on the hub: name another model",
    ),
    "a bad token": (
        answered(401, **{"X-Error-Message": "Invalid credentials in Authorization header"}),
        "refuses your token (401): log in",
    ),
    "a bad name": (hub.HFValidationError("Repo id must be ..."), "nor a hub id (owner/name): check its spelling"),
}
SILENT = {
    "offline": (hub.OfflineModeIsEnabled("offline mode is enabled"), "HF_HUB_OFFLINE is set"),
    "no network": (http.ConnectError("Name or service not known"), "ConnectError"),
    "slow": (http.ReadTimeout("timed out"), "ReadTimeout"),
    "broken": (answered(503), "it answers 503"),
    "too many questions": (answered(429), "it answers 429"),
}


@pytest.fixture
def api(monkeypatch):
    """Stands in for the hub; every method of HfApi that is not set here fails the test."""

    class Api:
        info: object = None

        def model_info(self, name, revision=None, timeout=None):
            assert timeout is not None
            if isinstance(self.info, Exception):
                raise self.info
            return self.info

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return Api


def refusal(config, action=source_of):
    """Returns the one line that `action` refuses with."""
    with pytest.raises(UserError) as caught:
        action(config)
    line = str(caught.value)
    assert "\n" not in line and line.startswith("model.") and NAME in line
    return line


def holds(*names):
    """A repository with these files."""
    return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_the_hub_refuses_is_told_with_what_to_do(api, what):
    api.info, words = REFUSED[what]
    assert words in refusal(ModelConfig(NAME, revision="v9"))


@pytest.mark.parametrize("what", list(SILENT))
def test_a_hub_that_does_not_answer_leaves_the_cache_and_says_why(api, what, monkeypatch, tmp_path):
    api.info, why = SILENT[what]
    source = source_of(CONFIG)
    assert source.arguments["local_files_only"] and why in str(source.unreachable)
    line = refusal(CONFIG, check)
    assert "the hub cannot be reached" in line and why in line and "connect, or give a local folder" in line


@pytest.mark.parametrize("what", ["no such repository", "gated", "no such revision"])
def test_what_a_download_raises_is_told_too_however_transformers_wrapped_it(what):
    error, words = REFUSED[what]

    def wrapped():
        try:
            raise error
        except hub.HfHubHTTPError as cause:
            raise OSError(f"{NAME} is not a local folder and is not a valid model identifier") from cause

    source = ModelSource(ModelConfig(NAME, revision="v9"), locate(CONFIG), {})
    with pytest.raises(UserError) as caught:
        source.guarded(wrapped)
    assert words in str(caught.value)


def test_a_repository_with_safetensors_is_read_from_the_hub_at_its_revision(api):
    for names in (["model.safetensors"], ["model.safetensors.index.json", "model-00001-of-00002.safetensors"]):
        api.info = holds("config.json", "pytorch_model.bin", *names)
        source = source_of(ModelConfig(NAME, revision="v2"))
        assert source.unreachable is None and source.location.kind == "hub"
        assert source.arguments["revision"] == "v2" and not source.arguments["local_files_only"]


def test_pickled_weights_do_not_matter_where_none_are_wanted(api):
    api.info = holds("config.json", "pytorch_model.bin")
    assert source_of(CONFIG, weights=False).unreachable is None
    assert "only pickled weights" in refusal(CONFIG)


def test_pickled_weights_are_refused_with_the_branch_of_the_hubs_own_conversion(api):
    api.info = holds("config.json", "pytorch_model.bin", "tf_model.h5")
    asked = {}

    def discussions(self, name, **options):
        asked.update(options)
        yield SimpleNamespace(git_reference="refs/pr/3")
        yield SimpleNamespace(git_reference="refs/pr/7")

    api.get_repo_discussions = discussions
    api.list_repo_files = lambda self, name, revision: ["model.safetensors"] if revision == "refs/pr/7" else ["x.md"]
    line = refusal(CONFIG)
    assert "at revision main, only pickled weights" in line and "use model.revision=refs/pr/7" in line
    assert asked["author"] == "SFconvertbot" and asked["discussion_type"] == "pull_request"


@pytest.mark.parametrize("offers", [[], None])
def test_pickled_weights_without_a_conversion_are_refused_with_what_to_do(api, offers):
    api.info = holds("config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")

    def discussions(self, name, **options):
        if offers is None:
            raise answered(503)
        return iter(offers)

    api.get_repo_discussions = discussions
    line = refusal(ModelConfig(NAME, revision="v1"))
    assert "at revision v1" in line and "refs/pr/NN" in line and "save_pretrained" in line


def test_a_repository_of_other_files_is_refused_with_what_to_do(api):
    api.info = holds("README.md", "model.Q4_K_M.gguf")
    assert "download one of its other files and give its path" in refusal(CONFIG)
