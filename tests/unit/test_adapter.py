"""LoRA checkpoints: found from any folder, never merged into another model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from peft import LoraConfig as PeftLora
from transformers import AutoModelForCausalLM

from conftest import toy_examples, write_rows
from rl import PPO, actor_critic, generator_for, loaded_from, of_responses, prompts_for, step_data, update_settings
from rlgf_cli.config.common import LoraConfig, ModelConfig
from rlgf_cli.config.loader import resolve
from rlgf_cli.config.merge import MergeConfig
from rlgf_cli.errors import UserError
from rlgf_cli.models.adapter import find_base
from rlgf_cli.models.load import add_lora, load, save
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.merging import probe_logits
from rlgf_cli.stages import merge
from rlgf_cli.training.optimizer import make_optimizer
from rlgf_cli.training.update import update

TIED = [
    ("qwen2", ["q_proj", "embed_tokens"]),
    ("qwen2", r".*\.(q_proj|embed_tokens)"),
    ("gpt2", ["c_attn", "wte"]),
    ("gpt2", ["c_attn", "lm_head"]),
    ("t5", ["q", "shared"]),
    ("t5", ["lm_head"]),
    ("bart", ["q_proj", "embed_tokens"]),
]


def randomised(loaded: Loaded) -> Loaded:
    """An adapter that changes what the model says."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
            elif ".modules_to_save." in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return loaded


def lora(path: Path | str, targets: Any = None) -> Loaded:
    return randomised(add_lora(loaded_from(Path(path)), LoraConfig(enabled=True, r=4, target_modules=targets)))


def from_elsewhere(path: Path, targets: Any, folder: Path, **options: Any) -> Path:
    """An adapter that PEFT puts on weights that rlgf does not."""
    loaded = loaded_from(path)
    task = "SEQ_2_SEQ_LM" if loaded.encoder_decoder else "CAUSAL_LM"
    loaded.model = get_peft_model(loaded.model, PeftLora(r=4, target_modules=targets, task_type=task, **options))
    save(folder, randomised(loaded))
    return folder


def merged(adapter: Path, output: Path, dtype: str = "float32") -> Loaded:
    merge.run(resolve(MergeConfig, flags={"model": str(adapter), "output": str(output), "dtype": dtype}))
    return evaluated(output)


def evaluated(path: Path | str) -> Loaded:
    return load(ModelConfig(name=str(path), device="cpu"))


def gap(one: Loaded, other: Loaded) -> float:
    return float((probe_logits(one) - probe_logits(other)).abs().max())


@pytest.fixture(scope="module")
def untied(tiny_qwen2: Path, tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny checkpoints with an output head of its own weights."""

    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp("untied") / family
        shutil.copytree({"qwen2": tiny_qwen2, "gpt2": tiny_gpt2}[family], folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.config.tie_word_embeddings = False
        torch.manual_seed(4)
        model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn_like(model.lm_head.weight))
        model.save_pretrained(folder)
        return folder

    return make


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of the same
@pytest.mark.parametrize(("family", "targets"), TIED)
def test_lora_on_tied_weights_is_refused(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, targets: Any
) -> None:
    """When it is made, when it would be trained on, and when it is merged; what it says can be evaluated."""
    path = request.getfixturevalue(f"tiny_{family}")
    with pytest.raises(UserError, match=r"cannot be merged: its weights are those of .* too") as caught:
        lora(path, targets)
    assert "lora.target_modules" in str(caught.value.hint)
    adapter = from_elsewhere(path, targets, tmp_path / "adapter")
    with pytest.raises(UserError, match="tied embeddings"):
        loaded_from(adapter)
    with pytest.raises(UserError, match="tied embeddings"):
        merged(adapter, tmp_path / "merged")
    assert gap(evaluated(adapter), evaluated(path)) > 0.3
    monkeypatch.setattr(merge, "refuse_tied", lambda *_, **__: None)  # the probe says the same of the result
    with pytest.raises(UserError, match="another model than the adapter's"):
        merged(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_adapters_that_peft_ties_are_refused_as_it_merges_them_twice(
    tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where this fails, PEFT merges them rightly by now, and they need not be refused any more."""
    adapter = from_elsewhere(tiny_qwen2, ["q_proj", "embed_tokens"], tmp_path / "adapter", ensure_weight_tying=True)
    with pytest.raises(UserError, match="tied embeddings"):
        merged(adapter, tmp_path / "merged")
    monkeypatch.setattr(merge, "refuse_tied", lambda *_, **__: None)
    with pytest.raises(UserError, match="another model than the adapter's"):
        merged(adapter, tmp_path / "merged")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_that_an_adapter_replaces_are_merged_where_peft_ties_them(
    tiny_qwen2: Path, tmp_path: Path, tied: bool
) -> None:
    """``modules_to_save``, which PEFT ties to the output head with ``ensure_weight_tying``."""
    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": tied}
    adapter = from_elsewhere(tiny_qwen2, ["q_proj"], tmp_path / "adapter", **options)
    loaded = evaluated(adapter)
    assert gap(loaded, evaluated(tiny_qwen2)) > 0.3
    if not tied:
        with pytest.raises(UserError, match="embed_tokens cannot be merged: its weights are those of lm_head too"):
            merged(adapter, tmp_path / "merged")
        with pytest.raises(UserError, match="tied embeddings"):
            loaded_from(adapter)
        return
    assert gap(loaded, merged(adapter, tmp_path / "merged")) < 1e-4 * 40
    model = actor_critic(loaded_from(adapter))
    expected = of_responses(loaded)
    generator = generator_for(model.loaded)
    data = step_data(model, PPO, generator.generate(PPO, prompts_for(model.loaded, 8), 0, 9.0), generator.sampling)
    optimizer = make_optimizer(model.trainable(), 2e-2, 0.0)
    update(model, optimizer, data, generator.sampling, update_settings(), seed=0, step=0)
    base = model.policy.get_base_model()
    assert base.lm_head.weight is base.get_input_embeddings().weight
    assert (of_responses(model.loaded) - expected).abs().max() > 0.05


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("all-linear", "all-linear"),
        ("q_proj", ["q_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        (r".*layers\.\d+\.mlp.*", r".*layers\.\d+\.mlp.*"),
        (["k_proj"], ["k_proj"]),
    ],
)
def test_target_modules_as_they_are_written_on_the_command_line(given: Any, expected: Any) -> None:
    assert LoraConfig(target_modules=given).target_modules == expected


@pytest.mark.parametrize("family", ["gpt2", "t5", "bart"])
def test_all_linear_is_all_but_the_head(request: pytest.FixtureRequest, tmp_path: Path, family: str) -> None:
    path = request.getfixturevalue(f"tiny_{family}")
    changed = lora(path, "all-linear")
    with torch.no_grad():  # in all layers at once, large changes of T5 round by more than what is compared
        for name, parameter in changed.model.named_parameters():
            parameter.mul_(0.3 if "lora_" in name else 1)
    save(tmp_path / "adapter", changed)
    adapter = evaluated(tmp_path / "adapter")
    names = {name for name, module in adapter.model.named_modules() if hasattr(module, "base_layer")}
    last = {name.rpartition(".")[2] for name in names}
    assert (
        last
        == {
            "gpt2": {"c_attn", "c_proj", "c_fc"},
            "t5": {"q", "k", "v", "o", "wi", "wo"},
            "bart": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
        }[family]
    )
    assert gap(adapter, merged(tmp_path / "adapter", tmp_path / "merged")) < 0.01 < 0.1 < gap(adapter, evaluated(path))


@pytest.mark.parametrize(
    ("family", "targets"), [("qwen2", ["q_proj", "embed_tokens", "lm_head"]), ("gpt2", ["c_attn", "wte", "lm_head"])]
)
def test_lora_on_an_untied_head_merges_into_the_same_model(
    untied: Callable[[str], Path], tmp_path: Path, family: str, targets: list[str]
) -> None:
    path = untied(family)
    save(tmp_path / "adapter", lora(path, targets))
    adapter = evaluated(tmp_path / "adapter")
    product = merged(tmp_path / "adapter", tmp_path / "merged")
    assert gap(adapter, product) < 1e-4 < 0.5 < gap(adapter, evaluated(path))
    assert not list((tmp_path / "merged").glob("*adapter*")) and not (tmp_path / "merged/rlgf_base.json").exists()
    # bfloat16: held against the adapter before the cast, and no further away than the cast rounds
    assert (
        1e-4
        < gap(adapter, merged(tmp_path / "adapter", tmp_path / "bf16", "bfloat16"))
        < 0.05 * float(probe_logits(adapter).abs().max())
    )


def test_an_adapter_on_an_untied_head_learns_in_train(untied: Callable[[str], Path]) -> None:
    path = untied("qwen2")
    model = actor_critic(add_lora(loaded_from(path), LoraConfig(enabled=True, r=4, target_modules=["lm_head"])))
    generator = generator_for(model.loaded)
    data = step_data(model, PPO, generator.generate(PPO, prompts_for(model.loaded, 8), 0, 9.0), generator.sampling)
    optimizer = make_optimizer(model.trainable(), 2e-2, 0.0)
    update(model, optimizer, data, generator.sampling, update_settings(), seed=0, step=0)
    (moved,) = (p for n, p in model.policy.named_parameters() if "lm_head.lora_B" in n)
    assert float(moved.detach().abs().max()) > 0


def test_sft_refuses_an_adapter_on_a_decoders_head(run_cli: Any, untied: Callable[[str], Path], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl", toy_examples(4))
    shown = run_cli(
        "sft", "--model", untied("qwen2"), "--data", data, "--use-peft", "--set", "lora.target_modules=[lm_head]",
        "--max-new-tokens", 24, "--device", "cpu", "-o", tmp_path / "run",
    )  # fmt: skip
    assert (
        shown.exit_code == 2
        and "output head of a decoder" in shown.stderr
        and "hint: leave lm_head out" in shown.stderr
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["no number", "quantized"])
def test_what_cannot_be_merged_is_refused(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    loaded = lora(tiny_llama)
    if what == "no number":
        with torch.no_grad():
            next(p for n, p in loaded.model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    save(tmp_path / "adapter", loaded)
    if what == "quantized":

        def quantized(config: ModelConfig) -> Loaded:
            found = load(config)
            found.model.get_base_model().is_quantized = True
            return found

        monkeypatch.setattr(merge, "load", quantized)
    with pytest.raises(UserError, match="cannot be merged: NaNs" if what == "no number" else "quantized weights"):
        merged(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def project(root: Path, base: Path) -> Path:
    """A tree as work leaves it, its adapter trained in it by relative names."""
    (root / "runs").mkdir(parents=True)
    shutil.copytree(base, root / "runs/sft")
    return root


@pytest.fixture
def tree(tmp_path: Path, tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = project(tmp_path / "project", tiny_gpt2)
    monkeypatch.chdir(root)
    save(root / "runs/rl/best", lora("runs/sft"))
    monkeypatch.chdir(tmp_path)
    return root


def config_of(adapter: Path, **changes: Any) -> dict[str, Any]:
    """``adapter_config.json``, changed."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return json.loads(path.read_text())


def test_an_adapter_loads_from_any_folder(tree: Path) -> None:
    adapter = tree / "runs/rl/best"
    assert config_of(adapter)["base_model_name_or_path"] == str(tree / "runs/sft")
    expected = of_responses(lora(tree / "runs/sft"))
    assert torch.equal(of_responses(evaluated("project/runs/rl/best")), expected)
    own = AutoPeftModelForCausalLM.from_pretrained(adapter)
    loaded = Loaded(own.eval(), None, None, "")  # type: ignore[arg-type]
    assert float((probe_logits(loaded) - probe_logits(evaluated(adapter))).abs().max()) < 1e-4
    assert gap(merged(adapter, tree / "runs/merged"), evaluated(adapter)) < 1e-4


def test_a_moved_tree_is_found_and_saved_as_it_is_now(tree: Path, tmp_path: Path) -> None:
    expected = of_responses(evaluated(tree / "runs/rl/best"))
    tree.rename(tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere/runs"
    found = loaded_from(moved / "rl/best")
    assert torch.equal(of_responses(found), expected)
    save(tmp_path / "saved", found)
    assert config_of(tmp_path / "saved")["base_model_name_or_path"] == str(moved / "sft")
    assert (tmp_path / "saved/rlgf_base.json").is_file()


def test_another_model_in_the_bases_place_is_refused(tree: Path) -> None:
    adapter = tree / "runs/rl/best"
    weights = tree / "runs/sft/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1000:] = bytes(1000)
    weights.write_bytes(content)
    with pytest.raises(UserError, match="other weights now than when the adapter was trained") as caught:
        evaluated(adapter)
    assert caught.value.where == str(adapter / "adapter_config.json")
    # nor is it taken for the base of an adapter that was moved beside it
    config_of(adapter, base_model_name_or_path="/no/such/runs/sft")
    with pytest.raises(UserError, match="is not there: /no/such/runs/sft"):
        evaluated(adapter)
    (adapter / "rlgf_base.json").unlink()  # as the hint says: then nothing is compared
    config_of(adapter, base_model_name_or_path=str(tree / "runs/sft"))
    evaluated(adapter)


@pytest.mark.parametrize("name", ["/no/such/folder", "runs/sft", "nobody/nothing", ""])
def test_a_base_that_is_not_there_is_named_with_the_file_that_names_it(tree: Path, name: str) -> None:
    """An earlier rlgf stored a relative path and no digest."""
    adapter = tree / "runs/rl/best"
    (adapter / "rlgf_base.json").unlink()
    config_of(adapter, base_model_name_or_path=name)
    with pytest.raises(UserError, match=re.escape(name) or "does not name its base") as caught:
        evaluated(adapter)
    assert caught.value.where == str(adapter / "adapter_config.json")
    assert "base_model_name_or_path in this file" in str(caught.value.hint)


def test_hub_names_and_revisions_are_kept(tiny_gpt2: Path, tmp_path: Path) -> None:
    loaded = load(ModelConfig(name=str(tiny_gpt2), device="cpu", revision="v2"), for_training=True)
    save(tmp_path, add_lora(loaded, LoraConfig(enabled=True)))
    assert find_base(tmp_path).revision == "v2"
    (tmp_path / "rlgf_base.json").unlink()
    config_of(tmp_path, base_model_name_or_path="gpt2")
    assert (find_base(tmp_path).name, find_base(tmp_path).revision) == ("gpt2", "v2")
