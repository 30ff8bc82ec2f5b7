"""GGUF files and ``smollm2`` as models: converted once, found again below an adapter, refused with a reason."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import toy_examples, write_rows
from gguf_files import write_gguf
from rl import loaded_from, of_responses
from rlgf_cli.config.common import LoraConfig, ModelConfig
from rlgf_cli.errors import UserError
from rlgf_cli.models import gguf
from rlgf_cli.models.adapter import find_base
from rlgf_cli.models.load import add_lora, load, save
from rlgf_cli.models.loaded import Loaded

pytest.importorskip("gguf", reason="the package gguf is not installed")


@pytest.fixture
def file(tiny_llama: Path, tmp_path: Path) -> Path:
    return write_gguf(tiny_llama, tmp_path / "tiny.gguf")


def of(path: Path | str) -> Loaded:
    return load(ModelConfig(name=str(path), device="cpu"))


def test_a_gguf_file_is_the_model_that_it_was_written_from(file: Path, tiny_llama: Path, guide_cache: Path) -> None:
    loaded, plain = of(file), of(tiny_llama)
    weights = loaded.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain.model.state_dict().items())
    assert loaded.model.config.tie_word_embeddings
    assert loaded.model.lm_head.weight.data_ptr() == loaded.model.get_input_embeddings().weight.data_ptr()
    texts = ["the cat sees the river .", " in 1234 houses", "<eos>x"]
    assert [loaded.tokenizer(t)["input_ids"] for t in texts] == [plain.tokenizer(t)["input_ids"] for t in texts]
    assert (loaded.eos_ids, loaded.pad_id) == (plain.eos_ids, plain.pad_id)
    (folder,) = (guide_cache / "models").iterdir()  # nothing half written beside it
    assert loaded.notes == [f"the weights are those of {file} (GGUF), in float32 in {folder}"]
    assert "_model_name_or_path" not in json.loads((folder / "config.json").read_text())
    own = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(weights[name], tensor) for name, tensor in own.state_dict().items())


def test_it_is_converted_once_for_each_content(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = gguf.plain_checkpoint(str(file))
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "_read", lambda path: pytest.fail("converted a second time"))
        shutil.copy(file, tmp_path / "tiny-again.gguf")
        monkeypatch.chdir(tmp_path)
        assert gguf.plain_checkpoint("tiny.gguf")[0] == folder
    content = bytearray(file.read_bytes())
    content[-4:] = torch.tensor(7.0).numpy().tobytes()
    file.write_bytes(content)
    assert gguf.plain_checkpoint(str(file))[0] != folder


def test_two_processes_that_convert_at_once_keep_one_folder(
    file: Path, guide_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second finds the first's folder when it is about to name its own."""
    read = gguf._read

    def slower(path: Path) -> Any:
        monkeypatch.setattr(gguf, "_read", read)
        gguf.plain_checkpoint(str(path))
        return read(path)

    monkeypatch.setattr(gguf, "_read", slower)
    folder, _ = gguf.plain_checkpoint(str(file))
    assert [str(path) for path in (guide_cache / "models").iterdir()] == [folder]


def test_an_adapters_base_is_found_again_and_by_peft_alone(file: Path, tmp_path: Path, guide_cache: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    torch.manual_seed(0)
    loaded = add_lora(loaded_from(file), LoraConfig(enabled=True, r=4))
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    save(tmp_path / "adapter", loaded)
    expected = of_responses(loaded)
    again = of(tmp_path / "adapter")
    assert torch.equal(of_responses(again), expected)
    assert again.base is not None and again.base.gguf == gguf.GgufFile(str(file), gguf.blocks_digest([file]))
    again.model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(of_responses(again), expected)
    shutil.rmtree(guide_cache / "models")  # another machine, or an emptied cache
    assert torch.equal(of_responses(of(tmp_path / "adapter")), expected)
    shutil.rmtree(guide_cache / "models")
    file.write_bytes(file.read_bytes()[:-4] + b"1234")
    with pytest.raises(UserError, match="base model of this adapter is not there"):
        find_base(tmp_path / "adapter")


def test_a_gguf_file_goes_through_the_command_line(file: Path, tmp_path: Path, run_cli: Any) -> None:
    data = write_rows(tmp_path / "train.jsonl", toy_examples(4))
    shown = run_cli(
        "sft", "--model", file, "--data", data, "--max-steps", 1, "--max-new-tokens", 24, "--device", "cpu",
        "-o", tmp_path / "run",
    )  # fmt: skip
    assert shown.exit_code == 0, shown.stderr
    assert f"the weights are those of {file} (GGUF)" in shown.stderr.replace("\n", " ")
    assert not of(tmp_path / "run").notes  # its own weights


def test_a_gguf_file_as_guide_and_below_a_reward_model(file: Path, tiny_llama: Path) -> None:
    from rlgf_cli.config.guide import GuideConfig
    from rlgf_cli.guides.hf import HFGuide
    from rlgf_cli.models.classification import load_classifier

    guide = HFGuide(GuideConfig(name=f"hf:{file}", device="cpu"), seed=0)
    assert torch.equal(of_responses(guide._loaded), of_responses(of(tiny_llama)))
    model, _ = load_classifier(ModelConfig(name=str(file)), ["score"])
    body = of(tiny_llama).model.model.state_dict()
    assert all(torch.equal(model.model.state_dict()[name], tensor) for name, tensor in body.items())


@pytest.mark.parametrize("what", ["missing", "damaged", "no package"])
def test_a_file_that_cannot_be_read_is_refused(
    file: Path, guide_cache: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "missing":
        file.unlink()
    elif what == "damaged":
        file.write_bytes(b"GGUF" + bytes(100))
    else:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    expected = {
        "missing": "no such GGUF file",
        "damaged": "cannot read this GGUF",
        "no package": "need the package gguf",
    }
    with pytest.raises(UserError, match=expected[what]) as caught:
        of(file)
    assert caught.value.where == str(file)
    if what == "no package":
        assert "pip install 'rlgf-cli[smollm2]'" in str(caught.value.hint)
    assert not list(guide_cache.glob("models/*"))


def test_smollm2_is_the_hubs_model_or_the_packages_file(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolved(*, cached: bool, packaged: bool, offline: bool) -> tuple[str, gguf.GgufFile | None]:
        monkeypatch.setattr(gguf, "try_to_load_from_cache", lambda repo, name: f"/hub/{name}" if cached else None)
        monkeypatch.setattr(gguf, "packaged_smollm2", lambda: file if packaged else None)
        monkeypatch.setattr(gguf.constants, "HF_HUB_OFFLINE", offline)
        return gguf.plain_checkpoint("smollm2")

    for offline in (False, True):
        assert resolved(cached=True, packaged=True, offline=offline) == (gguf.SMOLLM2_HUB, None)
        folder, source = resolved(cached=False, packaged=True, offline=offline)
        assert Path(folder).is_dir() and source is not None and source.name == "smollm2"
    assert resolved(cached=False, packaged=False, offline=False) == (gguf.SMOLLM2_HUB, None)
    with pytest.raises(UserError, match="neither in the hub's local cache nor installed") as caught:
        resolved(cached=False, packaged=False, offline=True)
    assert "pip install 'rlgf-cli[smollm2]'" in str(caught.value.hint)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert resolved(cached=True, packaged=True, offline=True) == ("smollm2", None)


def test_the_packaged_smollm2_is_a_chat_model_that_answers(smollm2: Loaded) -> None:
    assert sum(p.numel() for p in smollm2.model.parameters()) == 134_515_008
    end = smollm2.turn_end
    assert end is not None and end.token == "<|im_end|>" and smollm2.eos_ids == {end.id} and smollm2.pad_id == end.id
    ids = smollm2.text.encode_prompt(smollm2.tokenizer, "What is the capital of France?", False)
    with torch.no_grad():
        out = smollm2.model.generate(torch.tensor([ids]), max_new_tokens=12)[0, len(ids) :].tolist()
    assert "Paris" in smollm2.text.decode_response(smollm2.tokenizer, out)
    assert out[-1] == end.id
