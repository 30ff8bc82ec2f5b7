"""Run folders: who may take one, what is written down, what is removed and what never is."""

from __future__ import annotations

import errno
import hashlib
import json

import pytest

from rlgf_cli.artifacts import jsonl
from rlgf_cli.artifacts.jsonl import write_json, write_jsonl
from rlgf_cli.artifacts.rundir import RunDir, parent_of, remove_written
from rlgf_cli.artifacts.runfile import claim_file
from rlgf_cli.errors import Interrupted, RlgfError, Signalled, StoppedEarly, UserError


def finished(path, command="train", files=("config.resolved.json", "model.safetensors")):
    """A folder in which a run of ``command`` wrote ``files`` and was done."""
    run = RunDir.claim(path, command, seed=3)
    with run.running():
        for name in files:
            run.file(name).parent.mkdir(exist_ok=True)
            run.file(name).write_text(name)
    return run


def names(path):
    """All files below a folder, but for the locks of runs that this process claimed and did not begin."""
    files = (child for child in path.rglob("*") if child.is_file() and child.suffix != ".lock")
    return sorted(str(child.relative_to(path)) for child in files)


def manifest(path):
    return json.loads((path / "run.json").read_text())


# claim


@pytest.mark.parametrize("there", ["nothing", "empty folder", "eval only"])
def test_a_free_folder_is_taken(tmp_path, there):
    path = tmp_path / "deep" / "run"
    if there != "nothing":
        path.mkdir(parents=True)
    if there == "eval only":
        (path / "eval").mkdir()
    finished(path)
    assert {"config.resolved.json", "model.safetensors", "run.json"} <= set(names(path))


def test_claiming_writes_nothing_yet(tmp_path):
    RunDir.claim(tmp_path / "run", "train")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_used_folder_is_refused_with_the_three_ways_out(tmp_path):
    finished(tmp_path / "run")
    with pytest.raises(UserError) as caught:
        RunDir.claim(tmp_path / "run", "train")
    assert f"(train, {manifest(tmp_path / 'run')['ended']})" in caught.value.message
    assert all(way in caught.value.hint for way in ("--resume", "--overwrite", "another -o"))


def test_only_ways_out_that_the_command_has_are_named(tmp_path):
    finished(tmp_path / "run", "prepare")
    with pytest.raises(UserError) as caught:
        RunDir.claim(tmp_path / "run", "prepare", can_resume=False)
    assert "--resume" not in caught.value.hint and "--overwrite" in caught.value.hint


@pytest.mark.parametrize("existing", ["refuse", "resume", "overwrite"])
def test_a_folder_of_something_else_is_never_taken(tmp_path, existing):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="holds no run of rlgf"):
        RunDir.claim(tmp_path, "train", existing=existing)
    assert names(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("existing", ["refuse", "resume", "overwrite"])
def test_a_file_is_no_folder(tmp_path, existing):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(UserError, match="a folder is needed"):
        RunDir.claim(tmp_path / "x", "train", existing=existing)


@pytest.mark.parametrize("existing", ["resume", "overwrite"])
def test_another_commands_run_is_left_alone(tmp_path, existing):
    finished(tmp_path / "run", "sft")
    before = names(tmp_path)
    with pytest.raises(UserError, match="a run of `rlgf sft`, not of `rlgf train`"):
        RunDir.claim(tmp_path / "run", "train", existing=existing)
    assert names(tmp_path) == before


@pytest.mark.parametrize("content", ["{}", '{"command": "train"}', "[]", '"x"'])
@pytest.mark.parametrize("existing", ["refuse", "resume", "overwrite"])
def test_a_run_json_of_another_tool_is_left_alone(tmp_path, content, existing):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match="not written by rlgf"):
        RunDir.claim(tmp_path, "train", existing=existing)
    assert (tmp_path / "run.json").read_text() == content


def test_a_damaged_run_json_is_named(tmp_path):
    (tmp_path / "run.json").write_text('{"command": ')
    with pytest.raises(RlgfError) as caught:
        RunDir.claim(tmp_path, "train", existing="overwrite")
    assert caught.value.where == f"{tmp_path / 'run.json'}:1"


def test_a_run_of_a_later_rlgf_is_left_alone(tmp_path):
    finished(tmp_path)
    write_json(tmp_path / "run.json", {**manifest(tmp_path), "schema_version": 99})
    with pytest.raises(UserError, match="schema version 99"):
        RunDir.claim(tmp_path, "train", existing="overwrite")


def test_resume_goes_on_with_the_same_run(tmp_path):
    first = finished(tmp_path)
    run = RunDir.claim(tmp_path, "train", existing="resume", seed=9)
    with run.running():
        assert manifest(tmp_path)["status"] == "running"
        run.file("more.txt").write_text("more")
    data = manifest(tmp_path)
    assert (data["run_id"], data["resumed"], data["seed"]) == (first.manifest.data["run_id"], 1, 3)
    assert data["wrote"] == ["config.resolved.json", "model.safetensors", "more.txt"]
    assert "model.safetensors" in names(tmp_path)


def test_resume_of_nothing_begins(tmp_path):
    assert RunDir.claim(tmp_path / "run", "train", existing="resume").fresh


# overwrite


def test_overwrite_removes_what_was_written_and_nothing_else(tmp_path):
    finished(tmp_path, files=["config.resolved.json", "checkpoints/step_1", "rollouts/step_1.jsonl"])
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "scores.json").write_text("{}")
    run = RunDir.claim(tmp_path, "train", existing="overwrite")
    assert names(tmp_path) == ["eval/scores.json", "notes.txt"]
    assert run.fresh and run.manifest.data["wrote"] == []


def test_eval_is_never_removed_whatever_the_manifest_says(tmp_path):
    finished(tmp_path)
    write_json(tmp_path / "run.json", {**manifest(tmp_path), "wrote": ["eval", "model.safetensors"]})
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "scores.json").write_text("{}")
    RunDir.claim(tmp_path, "train", existing="overwrite")
    assert names(tmp_path) == ["config.resolved.json", "eval/scores.json"]
    with pytest.raises(AssertionError):
        RunDir.claim(tmp_path / "other", "train").file("eval/scores.json")


@pytest.mark.parametrize("name", ["..", "../outside", "", ".", "a/b"])
def test_a_manifest_cannot_reach_outside_its_folder(tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    (tmp_path / "run" / "a" / "b").mkdir(parents=True)
    remove_written(tmp_path / "run", [name, str(outside)])
    assert names(tmp_path) == ["outside/mine"] and (tmp_path / "run" / "a" / "b").is_dir()


def test_a_link_is_removed_and_not_followed(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "mine").write_text("mine")
    run = RunDir.claim(tmp_path / "run", "train")
    with run.running():
        run.file("checkpoints").symlink_to(data)
    RunDir.claim(tmp_path / "run", "train", existing="overwrite")
    assert names(tmp_path) == ["data/mine"]


@pytest.mark.parametrize("existing", ["resume", "overwrite"])
def test_what_a_killed_run_left_half_made_is_removed(tmp_path, existing):
    finished(tmp_path)
    (tmp_path / ".tmp-abc").mkdir()
    (tmp_path / ".tmp-abc" / "half").write_text("x")
    (tmp_path / ".metrics.jsonl.123.tmp").write_text("x")
    RunDir.claim(tmp_path, "train", existing=existing)
    assert not [name for name in names(tmp_path) if name.startswith(".")]


# the manifest


def test_the_manifest_says_what_ran(tmp_path):
    finished(tmp_path)
    data = manifest(tmp_path)
    assert (data["command"], data["status"], data["seed"], data["schema_version"]) == ("train", "done", 3, 1)
    assert data["versions"]["torch"] and data["versions"]["rlgf-cli"]
    assert data["ended"] >= data["started"] and data["seconds"] >= 0


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (StoppedEarly("budget"), "stopped"),
        (Interrupted("saved"), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
        (Signalled("SIGTERM"), "stopped"),
        (RlgfError("reward"), "failed"),
        (ZeroDivisionError(), "failed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_the_manifest_says_how_it_ended(tmp_path, error, status):
    run = RunDir.claim(tmp_path / "run", "train")
    with pytest.raises(type(error)), run.running():
        run.file("metrics.jsonl").write_text("{}\n")
        raise error
    assert manifest(tmp_path / "run")["status"] == status
    assert manifest(tmp_path / "run")["reason"] == (str(error) or type(error).__name__)
    assert "metrics.jsonl" in names(tmp_path / "run")


def test_a_run_that_was_charged_is_not_removed(tmp_path):
    """Its account is in its folder: removed, the cap of the next run would be as if nothing was spent."""
    run = RunDir.claim(tmp_path / "run", "train")
    with pytest.raises(UserError), run.running():
        run.manifest.save(spend={"calls": 1})
        raise UserError("a reward that cannot be used")
    assert manifest(tmp_path / "run")["status"] == "failed"


def test_the_manifest_learns_of_a_file_before_it_is_written(tmp_path):
    run = RunDir.claim(tmp_path, "train")
    run.file("checkpoints/step_3")
    assert manifest(tmp_path)["wrote"] == ["checkpoints"]


def test_parents_are_named_by_run_and_content(tmp_path):
    finished(tmp_path / "sft", "sft", files=["model.safetensors"])
    data = tmp_path / "train.jsonl"
    data.write_text("{}\n")
    run = RunDir.claim(tmp_path / "run", "train")
    for path in (tmp_path / "sft", data, data, "gpt2", None):
        run.manifest.add_parent(path)
    folder, file = manifest(tmp_path / "run")["parents"]
    assert folder["run_id"] == manifest(tmp_path / "sft")["run_id"]
    weights = hashlib.sha256(b"model.safetensors").hexdigest()
    assert folder["sha256"] == hashlib.sha256(weights.encode()).hexdigest()
    assert file == {"path": str(data), "run_id": None, "sha256": hashlib.sha256(b"{}\n").hexdigest()}


def test_a_file_with_a_manifest_beside_it_is_named_by_its_run(tmp_path):
    made = claim_file(tmp_path / "guide.jsonl", "collect-guide")
    with made.running():
        write_jsonl(tmp_path / "guide.jsonl", [{"a": 1}])
    assert parent_of(tmp_path / "guide.jsonl")["run_id"] == made.data["run_id"]


# failing


@pytest.mark.parametrize("there", ["nothing", "eval"])
def test_what_the_user_can_fix_leaves_nothing(tmp_path, there):
    path = tmp_path / "run"
    if there == "eval":
        (path / "eval").mkdir(parents=True)
        (path / "eval" / "scores.json").write_text("{}")
    run = RunDir.claim(path, "train")
    with pytest.raises(UserError), run.running():
        run.write_config({"values": {}})
        raise UserError("the prompt is too long")
    assert names(tmp_path) == (["run/eval/scores.json"] if there == "eval" else [])
    RunDir.claim(path, "train")


def test_what_the_user_can_fix_keeps_a_run_that_has_a_checkpoint(tmp_path):
    run = RunDir.claim(tmp_path, "train")
    with pytest.raises(UserError), run.running():
        run.file("checkpoints/step_1").mkdir(parents=True)
        (tmp_path / "checkpoints" / "step_1" / "COMPLETE").touch()
        raise UserError("x")
    assert names(tmp_path) == ["checkpoints/step_1/COMPLETE", "run.json"]
    assert manifest(tmp_path)["status"] == "failed"


def test_a_resumed_run_is_never_removed(tmp_path):
    finished(tmp_path)
    run = RunDir.claim(tmp_path, "train", existing="resume")
    with pytest.raises(UserError), run.running():
        raise UserError("x")
    assert "model.safetensors" in names(tmp_path)


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_full_disk_leaves_nothing_half_made(tmp_path, monkeypatch, when):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = RunDir.claim(tmp_path / "run", "prepare")
    if when == "at once":
        monkeypatch.setattr(jsonl.os, "fsync", full)
    with pytest.raises(OSError, match="No space"), run.running():
        run.file("train.jsonl").write_text("{}\n")
        monkeypatch.setattr(jsonl.os, "fsync", full)
        write_jsonl(run.file("test.jsonl"), [{"a": 1}])
    assert list(tmp_path.iterdir()) == []


# writing many files


def test_files_move_into_the_folder_when_all_are_there(tmp_path):
    run = RunDir.claim(tmp_path, "sft")
    run.file("tokenizer").mkdir()
    (tmp_path / "tokenizer" / "old").write_text("old")

    def save(folder):
        (folder / "model.safetensors").write_text("new")
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "new").write_text("new")

    assert run.write_files(save) == ["model.safetensors", "tokenizer"]
    assert names(tmp_path) == ["model.safetensors", "run.json", "tokenizer/new"]
    assert manifest(tmp_path)["wrote"] == ["tokenizer", "model.safetensors"]


def test_files_that_failed_to_be_written_leave_the_old_ones(tmp_path):
    run = finished(tmp_path, "sft")

    def save(folder):
        (folder / "model.safetensors").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        run.write_files(save)
    assert (tmp_path / "model.safetensors").read_text() == "model.safetensors"
    assert names(tmp_path) == ["config.resolved.json", "model.safetensors", "run.json"]


# a single file as the product


def collected(path, command="collect-guide"):
    with claim_file(path, command).running():
        path.write_text('{"a": 1}\n')


def test_a_file_and_its_manifest(tmp_path):
    path = tmp_path / "deep" / "guide.jsonl"
    collected(path)
    assert names(tmp_path) == ["deep/guide.jsonl", "deep/guide.jsonl.run.json"]


def test_a_used_file_is_refused(tmp_path):
    path = tmp_path / "guide.jsonl"
    collected(path)
    with pytest.raises(UserError) as caught:
        claim_file(path, "collect-guide", can_resume=True)
    assert all(way in caught.value.hint for way in ("--resume", "--overwrite", "another -o"))
    with pytest.raises(UserError) as caught:
        claim_file(path, "collect-guide")
    assert "--resume" not in caught.value.hint and "--overwrite" in caught.value.hint


def test_resume_keeps_the_lines_and_overwrite_does_not(tmp_path):
    path = tmp_path / "guide.jsonl"
    collected(path)
    assert claim_file(path, "collect-guide", existing="resume").data["resumed"] == 1
    assert path.read_text() == '{"a": 1}\n'
    claim_file(path, "collect-guide", existing="overwrite")
    assert names(tmp_path) == []


@pytest.mark.parametrize("existing", ["resume", "overwrite"])
def test_a_file_that_rlgf_did_not_write_is_left_alone(tmp_path, existing):
    path = tmp_path / "mine.jsonl"
    path.write_text("mine")
    with pytest.raises(UserError, match="not written by rlgf"):
        claim_file(path, "collect-guide", existing=existing)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("existing", ["resume", "overwrite"])
def test_a_file_of_another_command_is_left_alone(tmp_path, existing):
    path = tmp_path / "guide.jsonl"
    collected(path, "collect-guide")
    with pytest.raises(UserError, match="a run of `rlgf collect-guide`"):
        claim_file(path, "postprocess", existing=existing)
    assert path.read_text() == '{"a": 1}\n'


def test_a_manifest_whose_file_was_never_written_is_no_obstacle(tmp_path):
    path = tmp_path / "guide.jsonl"
    with pytest.raises(UserError), claim_file(path, "collect-guide").running():
        raise UserError("no key")
    collected(path)
    assert path.read_text() == '{"a": 1}\n'


# files beside it


def collected_with(path, beside, existing="refuse"):
    with claim_file(path, "collect-guide", existing=existing, beside=[beside]).running():
        path.write_text('{"a": 1}\n')
        beside.write_text('{"b": 1}\n')


def test_a_file_beside_the_product_is_replaced_with_it(tmp_path):
    path, beside = tmp_path / "guide.jsonl", tmp_path / "guide.dropped.jsonl"
    collected_with(path, beside)
    claim_file(path, "collect-guide", existing="resume", beside=[beside])
    assert names(tmp_path) == ["guide.dropped.jsonl", "guide.jsonl", "guide.jsonl.run.json"]
    claim_file(path, "collect-guide", existing="overwrite")  # by a run that writes no such file, too
    assert names(tmp_path) == []


def test_a_file_beside_a_product_that_was_removed_is_used(tmp_path):
    path, beside = tmp_path / "guide.jsonl", tmp_path / "guide.dropped.jsonl"
    collected_with(path, beside)
    path.unlink()
    with pytest.raises(UserError, match="already exists") as caught:
        claim_file(path, "collect-guide", beside=[beside], can_resume=True)
    assert caught.value.where == str(beside) and "--resume" in caught.value.hint


def test_it_is_kept_by_a_run_that_writes_no_such_file(tmp_path):
    path, beside = tmp_path / "guide.jsonl", tmp_path / "guide.dropped.jsonl"
    collected_with(path, beside)
    path.rename(tmp_path / "kept.jsonl")
    left = names(tmp_path)
    with pytest.raises(UserError, match="already exists") as caught:
        claim_file(path, "collect-guide")
    assert caught.value.where == str(beside) and "--overwrite" in caught.value.hint
    assert names(tmp_path) == left
    claim_file(path, "collect-guide", existing="overwrite")
    assert names(tmp_path) == ["kept.jsonl"]


@pytest.mark.parametrize("existing", ["refuse", "resume", "overwrite"])
@pytest.mark.parametrize("before", ["nothing", "another run"])
def test_a_file_of_that_name_from_elsewhere_is_left_alone(tmp_path, existing, before):
    path, beside = tmp_path / "guide.jsonl", tmp_path / "guide.dropped.jsonl"
    if before == "another run":
        collected(path)
        if existing == "refuse":
            path.unlink()
    beside.write_text("mine")
    left = names(tmp_path)
    with pytest.raises(UserError, match="this one is not its"):
        claim_file(path, "collect-guide", existing=existing, beside=[beside])
    assert names(tmp_path) == left and beside.read_text() == "mine"


def test_a_manifest_removes_no_file_of_another_folder(tmp_path):
    path, other = tmp_path / "runs" / "guide.jsonl", tmp_path / "other"
    collected(path)
    other.write_text("mine")
    run_json = path.with_name("guide.jsonl.run.json")
    run_json.write_text(run_json.read_text().replace('"wrote": []', '"wrote": ["../other"]'))
    claim_file(path, "collect-guide", existing="overwrite")
    assert names(tmp_path) == ["other"]


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match="a file name is needed"):
        claim_file(tmp_path, "collect-guide")
