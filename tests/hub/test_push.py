"""Publishing, against a server of the test's own."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from hub_server import hub_server
from typer.testing import CliRunner

from m3i_scale.cli import app
from m3i_scale.errors import ExportError
from m3i_scale.exports import push as pushing
from m3i_scale.exports.export import export_and_push
from m3i_scale.exports.push import listed_files, push

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"
COMMAND = """
import sys
from pathlib import Path
from m3i_scale.exports.push import push
print(push(Path(sys.argv[1]), "user/model"))
"""


@pytest.fixture
def hub(monkeypatch):
    with hub_server() as (hub, address):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported[0], tmp_path / "tiny")


def test_everything_arrives_in_one_commit(hub, folder):
    facts = push(folder, "user/model")
    assert hub.repos["user/model"]["visibility"] == "private"
    assert hub.files == {name: (folder / name).read_bytes() for name in facts["files"]}
    assert len(hub.commits) == 1
    assert facts["bytes"] == sum(len(content) for content in hub.files.values())
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in json.dumps(facts)


def test_public(hub, folder):
    push(folder, "user/model", public=True)
    assert hub.repos["user/model"]["visibility"] == "public"


def test_a_public_repository_is_not_taken_for_a_private_one(hub, folder):
    hub.repos["user/model"] = {"visibility": "public"}
    with pytest.raises(ExportError) as caught:
        push(folder, "user/model")
    assert caught.value.where == "--push user/model"
    assert "--public" in caught.value.fix
    assert hub.objects == {}
    assert hub.commits == []


def test_a_second_call_goes_on(hub, folder):
    hub.fail_object_after = 1
    with pytest.raises(ExportError) as caught:
        push(folder, "user/model")
    assert caught.value.where == "--push user/model"
    assert "--overwrite" in caught.value.fix
    assert TOKEN not in str(caught.value)
    assert hub.commits == []  # nobody saw half of a model
    assert len(hub.received) == 1
    hub.fail_object_after = None
    push(folder, "user/model")
    assert sorted(hub.received) == sorted(hub.objects)  # nothing was sent twice
    assert set(hub.files) == set(listed_files(folder))


def smaller(folder):
    """An export with one file less."""
    facts = json.loads((folder / "export.json").read_text())
    name = next(name for name in facts["files"] if name.startswith("text/"))
    (folder / name).unlink()
    del facts["files"][name]
    (folder / "export.json").write_text(json.dumps(facts))
    return name


def test_what_an_earlier_export_had_and_this_one_has_not_goes_in_the_same_commit(hub, folder):
    push(folder, "user/model")
    hub.files |= {".gitattributes": b"", "picture.png": b"mine"}  # what no export has listed stays
    gone = smaller(folder)
    facts = push(folder, "user/model")
    assert facts["removed"] == [gone]
    assert {*hub.files} == {*listed_files(folder), ".gitattributes", "picture.png"}
    assert hub.commits[1:] == [[*sorted(listed_files(folder)), f"- {gone}"]]
    assert push(folder, "user/model")["removed"] == []


def test_a_list_of_somebody_else_removes_nothing(hub, folder):
    push(folder, "user/model")
    smaller(folder)
    for content in (b"[]", b'{"files": [1]}', b"\xff", b'{"files": {"../x": "0", "absent": "0"}}'):
        hub.files["export.json"] = content
        before = {*hub.files}
        assert push(folder, "user/model")["removed"] == []
        assert {*hub.files} == before


def test_a_repository_that_changes_meanwhile_loses_nothing(hub, folder, monkeypatch):
    push(folder, "user/model")
    gone = smaller(folder)
    earlier = pushing._of_earlier_export

    def changed_meanwhile(*given):
        found = earlier(*given)
        hub.commits.append(["of somebody else"])
        return found

    monkeypatch.setattr(pushing, "_of_earlier_export", changed_meanwhile)
    with pytest.raises(ExportError) as caught:
        push(folder, "user/model")
    assert caught.value.where == "--push user/model"
    assert re.search(r"\b412\b", caught.value.what)
    assert "--overwrite" in caught.value.fix
    assert gone in hub.files


def test_dry_run_sends_nothing(hub, folder):
    facts = push(folder, "user/model", dry_run=True)
    assert facts["files"]["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert hub.requests == []


def test_no_token(hub, folder, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ExportError) as caught:
        push(folder, "user/model")
    assert caught.value.where == "--push user/model"
    assert caught.value.fix.startswith("run `hf auth login`")
    assert hub.requests == []


@pytest.mark.parametrize(("status", "fix"), [(401, "token"), (403, "token"), (413, "--overwrite")])
def test_what_to_do_about_a_refusal(hub, folder, status, fix):
    hub.refuse = status
    with pytest.raises(ExportError) as caught:
        push(folder, "user/model")
    assert caught.value.where == "--push user/model"
    assert re.search(rf"\b{status}\b", caught.value.what)
    assert fix in caught.value.fix


def test_a_private_repository_stays_so_and_is_told_so(hub, folder):
    assert push(folder, "user/model")["public"] is False
    assert push(folder, "user/model", public=True)["public"] is False
    assert push(folder, "user/other", public=True)["public"] is True


def test_what_is_sent_and_what_would_be_are_told_with_sizes(hub, run_dir, tmp_path, same_process):
    out = tmp_path / "out"
    command = ["export", str(run_dir[0]), "--output", str(out), "--push", "user/model"]
    told = {}
    for options in (("--dry-run",), ("--public", "--dry-run"), ("--public",)):
        done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*command, "--overwrite", *options])
        assert done.exit_code == 0, done.exception
        told[options] = done.stdout
        for name in ("config.json", "model.safetensors"):
            assert f"{(out / name).stat().st_size:,} bytes" in done.stdout
    assert ["would send to" in text for text in told.values()] == [True, True, False]
    assert ["user/model, private" in text for text in told.values()] == [True, False, False]
    assert ["user/model, public" in text for text in told.values()] == [False, True, True]


def changed(folder):
    (folder / "README.md").write_text("changed")


def missing(folder):
    (folder / "model.safetensors").unlink()


def beside(folder):
    (folder / ".env").write_text("SECRET=1")


def linked(folder):
    (folder / "README.md").rename(folder.parent / "README.md")
    (folder / "README.md").symlink_to(folder.parent / "README.md")


def outside(folder):
    (folder.parent / "id_rsa").write_text("x")
    facts = json.loads((folder / "export.json").read_text())
    facts["files"]["../id_rsa"] = "0" * 64
    (folder / "export.json").write_text(json.dumps(facts))


def no_export(folder):
    (folder / "export.json").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed, "'README.md' is missing or has changed"),
        (missing, "'model.safetensors' is missing"),
        (beside, "not part of the export, e.g. '.env'"),
        (linked, "'README.md' must be a file in the folder"),
        (outside, "'../id_rsa' must be a file in the folder"),
        (no_export, "no export"),
    ],
)
def test_only_what_was_proven_is_sent(hub, folder, change, message):
    change(folder)
    with pytest.raises(ExportError, match=message):
        push(folder, "user/model")
    assert hub.requests == []


@pytest.mark.parametrize("name", ["a/b/c", "user/../x", "https://hub/x"])
def test_names_that_are_none(hub, folder, name):
    with pytest.raises(ExportError) as caught:
        push(folder, name)
    assert caught.value.where == f"--push {name}"


@pytest.mark.parametrize("option", [{"public": True}, {"dry_run": True}])
def test_options_without_effect(run_dir, tmp_path, option):
    with pytest.raises(ExportError) as caught:
        export_and_push(run_dir[0], tmp_path / "out", **option)
    assert "--push USER/NAME" in caught.value.fix


def test_in_a_process_of_its_own(folder):
    """As a user would: the address and the token from the environment."""
    with hub_server() as (hub, address):
        environment = os.environ | {"HF_ENDPOINT": address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        environment["HF_HUB_DISABLE_XET"] = "1"
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, str(folder)], capture_output=True, text=True, env=environment, check=True
        )
        assert len(hub.commits) == 1
        assert TOKEN not in done.stdout + done.stderr
