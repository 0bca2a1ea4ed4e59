"""Publishing and fetching, with the real client against a hub on localhost."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fakehub
import pytest
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.repocard_data import model_index_to_eval_results

from mfuser import Registry, from_pretrained
from mfuser.engine.pretrained import FILES
from mfuser.engine.run import evaluate

IMAGES = (torch.arange(3 * 80 * 120) % 251).to(torch.uint8).reshape(3, 80, 120)


@pytest.fixture(scope="module")
def run(tiny: Registry, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a report."""
    folder = tmp_path_factory.mktemp("run") / "run"
    shutil.copytree(trained, folder)
    evaluate(folder, registry=tiny, limit=1, quiet=True)
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[fakehub.FakeHub]:
    with fakehub.serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", fakehub.TOKEN)
        yield hub


def test_there_and_back(
    hub: fakehub.FakeHub, run: Path, tmp_path: Path, mfuser: Callable[..., Any]
) -> None:
    """Published privately, fetched, and from_pretrained by its name: the same outputs."""
    pushed = mfuser("push", run, "me/garden", "--license", "apache-2.0")
    assert pushed.code == 0, pushed.err
    assert "uploaded to me/garden (private)" in pushed.out and "note:" not in pushed.out
    repo = hub.repos["me/garden"]
    assert repo.private and {*repo.files} == {*FILES}

    card = ModelCard(repo.files["README.md"].decode())
    report = json.loads((run / "report.json").read_text())
    assert card.data.license == "apache-2.0" and card.data.model_name == "garden"
    _, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    figures = {(r.dataset_name, r.metric_type): r.metric_value for r in results}
    for name, domain in report["domains"].items():
        assert figures[(name, "mean_iou")] == round(100 * domain["miou"], 2)
    assert "mfuser pull me/garden model" in card.text and "Protocol: source toy" in card.text

    pulled = mfuser("pull", "me/garden", tmp_path / "here")
    assert pulled.code == 0 and "19 classes, trained for 4 steps" in pulled.out, pulled.err
    expected = from_pretrained(run).segment(IMAGES)
    assert torch.equal(from_pretrained(tmp_path / "here").segment(IMAGES), expected)
    assert torch.equal(from_pretrained("me/garden").segment(IMAGES), expected)
    assert not any(tmp_path.joinpath("here").glob("*.json.incomplete"))

    again = mfuser("push", run, "me/garden", "--full", "--json")
    files = json.loads(again.out)["files"]
    assert files["model.safetensors"] > 2 * len(repo.files["config.json"])
    assert json.loads(again.out)["private"]
    assert torch.equal(from_pretrained("me/garden").segment(IMAGES), expected)


def test_a_dry_run_asks_nobody(
    hub: fakehub.FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch, mfuser: Callable[..., Any]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    done = mfuser("push", run, "me/garden", "--dry-run")
    assert done.code == 0 and "would be uploaded to me/garden (private)" in done.out
    assert all(name in done.out for name in FILES) and "no license" in done.out
    assert hub.asked == []


def test_a_folder_in_place_of_the_hub(
    hub: fakehub.FakeHub, run: Path, tmp_path: Path, mfuser: Callable[..., Any]
) -> None:
    pushed = mfuser("push", run, f"{tmp_path}/garden")
    assert pushed.code == 0 and f"written to {tmp_path}/garden:" in pushed.out, pushed.err
    assert {p.name for p in (tmp_path / "garden").iterdir()} == {*FILES}
    card = (tmp_path / "garden" / "README.md").read_text("utf-8")
    assert card.count("# garden") == 1 and "mfuser pull" not in card
    again = mfuser("push", run, f"{tmp_path}/garden")
    assert again.code == 2 and "garden is there and not empty" in again.err
    pulled = mfuser("pull", f"{tmp_path}/garden", tmp_path / "here")
    assert pulled.code == 0 and hub.asked == []
    expected = from_pretrained(run).segment(IMAGES)
    assert torch.equal(from_pretrained(tmp_path / "here").segment(IMAGES), expected)


def test_what_the_hub_refuses(
    hub: fakehub.FakeHub,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mfuser: Callable[..., Any],
) -> None:
    """Each in one sentence with a way on, and exit code 2."""
    hub.repos["me/open"] = fakehub.Repo(private=False, files={"README.md": b""})
    hub.repos["other/hidden"] = fakehub.Repo(private=True)

    def refused(said: str, *arguments: object) -> None:
        done = mfuser(*arguments)
        assert done.code == 2 and said in done.err and "Traceback" not in done.err, done.err
        assert len(done.err.strip().splitlines()) == 1, done.err

    out = tmp_path / "out"
    refused("is called owner/name", "push", run, "garden")
    refused("public already: say --public", "push", run, "me/open")
    refused("may not do that with 'other/new'", "push", run, "other/new")
    refused("no repository 'me/absent'", "pull", "me/absent", out)
    refused("no revision 'v9'", "pull", "me/open", out, "--revision", "v9")
    refused("holds no model of this project", "pull", "me/open", out)
    refused("not empty; choose another folder", "pull", "me/open", run)
    refused("there is no run folder", "push", tmp_path / "absent", "me/x")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused("does not show it to this login", "pull", "other/hidden", out)
    refused("does not accept this login", "push", run, "me/another")
    monkeypatch.delenv("HF_TOKEN")
    refused("uploading needs a login: log in (hf auth login)", "push", run, "me/x")
    refused("if it is private, log in", "pull", "other/hidden", out)
    assert not out.exists() and {*hub.repos} == {"me/open", "other/hidden"}


def test_no_way_to_the_hub(
    hub: fakehub.FakeHub,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mfuser: Callable[..., Any],
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{probe.getsockname()[1]}")
        for arguments in (("pull", "me/garden", tmp_path / "o"), ("push", run, "me/garden")):
            done = mfuser(*arguments)
            assert done.code == 2 and "hub cannot be reached for 'me/garden'" in done.err, done.err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = mfuser("pull", "me/garden", tmp_path / "o")
    assert done.code == 2 and "HF_HUB_OFFLINE=1 forbids asking" in done.err, done.err
