"""A trained model as plain files: transformers and vLLM, knowing nothing of us, give the same replies."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import httpx
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image, ImageOps

from alert import export
from alert.bank import file as bank_file
from alert.prompt import meta_task
from common import Classifier
from common.config.schema import LoraConfig
from common.data.digits import Digits
from common.data.images import decode, resize
from common.data.loading import Loader
from common.export import __main__ as command
from common.export import bundle
from common.export import card as card_module
from common.export.bundle import ASKING
from common.export.card import CODE, RESIZED
from common.forward.logprobs import token_logps
from common.models.encoder import PromptEncoder
from common.models.extra_embeddings import attach
from common.rollout.base import Decoding, requests
from common.rollout.hf import HFRollout
from common.types import CATEGORY, Prompt, UserError
from tests.conftest import EXTENDING
from tests.test_predict import calibrated

NAMES = ("zero", "one", "two")
GREEDY = Decoding(0.0, 0, 1.0, 16)
LORA = LoraConfig(r=4, alpha=8, targets=r".*(language|text)_model.*\.(q_proj|down_proj)")


@pytest.fixture(params=["qwen2_vl", *EXTENDING, "gemma3"])
def exported(request, load_vlm, digits_task, tmp_path):
    """The folder, pictures, prompts, and what the trained model itself replies, by how its images attend."""
    entries = torch.randn(3, 4, 96, generator=torch.Generator().manual_seed(5)) * 0.3

    def trained(**changes):
        torch.manual_seed(3)
        vlm = load_vlm(family=request.param, lora=LORA, **changes)
        with torch.no_grad():
            rows = vlm.model.get_input_embeddings().weight
            rows[list(vlm.banned)] = rows[len(vlm.processor.tokenizer) :] = 0.0  # as trained, it never says these
            for name, weight in vlm.model.named_parameters():
                if "lora_B" in name:
                    weight += torch.randn(weight.shape) * 0.3
        return vlm

    prompts, pictures = [], Loader(digits_task.images, 32)
    for number, item in enumerate(digits_task.train.items[:40:8]):
        shown = (number % 3, (number + 1) % 3)
        text = meta_task([NAMES[i] for i in shown], "short")
        prompts.append(Prompt(item.image, text, item.name, NAMES, categories=shown, image_last=True))
    replies = {}
    for attention in ("family", "causal"):
        vlm = trained(image_attention=attention)
        vlm = replace(vlm, extra_embeddings=attach(vlm.model, entries, True))
        encoder = PromptEncoder(vlm, pictures, 512)
        asked = requests(encoder, prompts, [""] * len(prompts))
        replies[attention] = [group[0].text for group in HFRollout(vlm).generate(asked, 1, GREEDY)]
    bank_file.export(tmp_path / "bank", entries, NAMES, "any")
    policy = bundle.merged(trained())
    words = export.into_vocabulary(policy.model, policy.processor, policy.pad, tmp_path / "bank", "short")
    bundle.save(policy, tmp_path / "plain", {*policy.banned, *words.ids}, GREEDY.max_tokens)
    (tmp_path / "plain" / ASKING).write_text(json.dumps({"words": words.of_names}))
    return tmp_path / "plain", [pictures([p.image])[0] for p in prompts], prompts, replies


def conversation(folder, prompt, image):
    """As a user would write it: the words of asking.json in the text, the picture behind it."""
    words, text = json.loads((folder / ASKING).read_text())["words"], prompt.text
    for label in prompt.categories:
        text = text.replace(CATEGORY, words[NAMES[label]], 1)
    return [{"role": "user", "content": [{"type": "text", "text": text}, image]}]


def test_what_fills_the_vocabulary_up_is_never_said(load_vlm):
    """Whatever the library puts into new rows, all that can be said are the tokens from before, as probable as before."""
    vlm = load_vlm(family="gemma3")
    with torch.no_grad():
        vlm.model.get_input_embeddings().weight.mul_(0.01)  # rows that the library draws would have it all
    old, ends = vlm.model.lm_head.weight.detach().clone(), len(vlm.processor.tokenizer)
    words, bank = export.words(["x"] * 40, 4), torch.randn(40, 4, 96)
    ids = export.add_rows(vlm.model, vlm.processor.tokenizer, words, bank, vlm.pad)
    rows = vlm.model.lm_head.weight
    assert len(rows) % 64 == 0 and len(rows) > ends + 160, "there is something to fill up"
    hidden = torch.randn(5, 96, generator=torch.Generator().manual_seed(1)) * 100
    before = token_logps(hidden @ old[:ends].T, torch.tensor(vlm.banned), 1.0)
    after = token_logps(hidden @ rows.T, torch.tensor([*vlm.banned, *ids]), 1.0)
    torch.testing.assert_close(after[:, :ends], before, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_transformers_gives_the_same_replies(exported):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder, pictures, prompts, replies = exported
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    found = []
    for prompt, picture in zip(prompts, pictures, strict=True):
        turns = conversation(folder, prompt, {"type": "image", "image": picture})
        inputs = processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, max_new_tokens=GREEDY.max_tokens)[0, inputs["input_ids"].shape[1] :]
        ends = torch.isin(ids, torch.tensor(model.generation_config.eos_token_id)).nonzero()
        found.append(processor.tokenizer.decode(ids[: int(ends[0])] if len(ends) else ids))
    assert found == replies["family"]
    assert len(set(found)) > 1, "the replies do not depend on the question"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="needs make setup-vllm")
def test_vllm_gives_the_same_replies(exported):
    from common.rollout.vllm.engine import GIB, kept_group, undisturbed

    folder, pictures, prompts, replies = exported
    with undisturbed():
        from vllm import LLM, SamplingParams

        llm = LLM(model=str(folder), dtype="float32", enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=GIB)
    turns = [
        conversation(folder, prompt, {"type": "image_pil", "image_pil": picture})
        for prompt, picture in zip(prompts, pictures, strict=True)
    ]
    chosen = SamplingParams(temperature=0.0, max_tokens=GREEDY.max_tokens)
    found = []
    for output in llm.chat(turns, chosen, use_tqdm=False):
        (reply,) = output.outputs  # its text leaves half characters out, which a random model is full of
        ids = reply.token_ids[:-1] if reply.finish_reason == "stop" else reply.token_ids
        found.append(llm.get_tokenizer().decode(ids))
    with kept_group():
        llm.llm_engine.engine_core.shutdown()
    gemma = "gemma" in json.loads((folder / "config.json").read_text())["model_type"]
    assert found == replies["causal" if gemma else "family"]  # vLLM's CPU attention lets no image see both ways


QUICK = [
    "tracking=none",
    "tracking.report=false",
    "trainer.evaluate_every=0",
    "validation=none",
    "setting.test_per_class=10",
]
RUNS = {
    "whole": ["method=nothinking", "trainer.updates=3"],
    "adapters": ["method=clsrl", "model.lora.r=4", "trainer.updates=3"],
    "not trained": ["method=zeroshot"],
    "answers first": ["method=think_after_answer", "trainer.updates=3"],
    "thinks if it likes": ["method=adaptive_thinking", "trainer.updates=3"],
    "without a list": ["method=visual_rft", "trainer.updates=3"],
    "several rewards, adapters": ["method=refine_rft", "trainer.updates=3"],
}


@pytest.mark.parametrize("background", ["white", "black"])
def test_the_card_shows_a_picture_as_the_run_does(background, tmp_path, monkeypatch):
    """Upright, and transparent parts on the same background."""
    rgba = np.random.default_rng(0).integers(0, 256, (6, 9, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rgba).save(tmp_path / "photo.jpg", "PNG", exif=exif)
    code = CODE.substitute(resized=RESIZED["squash"])
    (start,) = re.findall(r"^photo, size = .*?(?=^\()", code, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    known = {"asking": {"image": {"size": 4, "background": background}}, "Image": Image, "ImageOps": ImageOps}
    exec(start, known)
    assert known["photo"].tobytes() == decode(tmp_path / "photo.jpg", background).tobytes()
    assert known["photo"].size == (6, 9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.faults] * (kind != "adapters")) for kind in RUNS]
)
def test_the_card_of_an_exported_run_works(runner, tmp_path, monkeypatch, capsys, kind):
    """The code of the card, run as it stands, and `Classifier` give the run's own replies."""
    run, folder = tmp_path / "run", tmp_path / "plain"
    assert runner(run, [*RUNS[kind], *QUICK, "data.root=/nowhere/of/mine", "tracking.tags=[my_tag]"]) == 0
    assert command.main([str(run), str(folder), "--push", "me/digits"]) == 0
    said = capsys.readouterr().out
    assert "to https://huggingface.co/me/digits" in said and "nothing was sent" in said and "model.safetensors" in said
    card = (folder / "README.md").read_text()
    (code,) = re.findall("```python\n(.*?)```", card, re.DOTALL)
    metrics = json.loads((run / "metrics.json").read_text())
    last = (metrics["after"] or metrics["before"])["test"]
    assert f"{100 * last['accuracy']:.2f}" in card and metrics["manifest"] in card and "license: apache-2.0" in card
    files = [path for path in folder.rglob("*") if path.is_file()]
    own = [b"/nowhere/of/mine", str(tmp_path).encode(), b"my_tag"]
    assert not [path.name for path in files if any(word in path.read_bytes() for word in own)]
    assert command.main([str(run), str(folder), "--push", "me/digits"]) == 0, "what was shown is not written again"
    metrics["signature"] = "another"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.json").write_text(json.dumps(metrics))
    assert command.main([str(tmp_path / "other"), str(folder), "--push", "me/digits", "--yes"]) == 2
    assert "holds something else than an export of" in capsys.readouterr().err
    of_run, of_export, digits = Classifier.load(run), Classifier.load(folder), Digits()
    monkeypatch.chdir(folder)
    for key in ("5", "77", "300"):
        digits.open(key).save("photo.jpg", "PNG")
        capsys.readouterr()
        exec(compile(code, "README.md", "exec"), {})
        printed = capsys.readouterr().out.strip()
        pictures = {"photo.jpg": digits.open(key)}
        (own,), (exported,) = of_run(pictures), of_export(pictures)
        assert printed == own.reply == exported.reply and exported.label == own.label
        assert exported.confidence == pytest.approx(own.confidence, abs=1e-5)
    of_run.close(), of_export.close()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="needs make setup-vllm")
def test_vllm_gives_an_exported_runs_replies(runner, tmp_path):
    from common.rollout.vllm.engine import GIB, kept_group, undisturbed

    run, folder = tmp_path / "run", tmp_path / "plain"
    assert runner(run, [*RUNS["adapters"], *QUICK]) == 0
    assert command.main([str(run), str(folder)]) == 0
    rows = pyarrow.parquet.read_table(run / "predictions.parquet").to_pylist()
    rows = [row for row in rows if (row["phase"], row["split"]) == ("after", "test")][:20]
    digits, turns = Digits(), []
    for row in rows:
        picture = {"type": "image_pil", "image_pil": resize(digits.open(row["image"]), 32, "squash")}
        turns.append([{"role": "user", "content": [picture, {"type": "text", "text": row["prompt"]}]}])
    with undisturbed():
        from vllm import LLM, SamplingParams

        llm = LLM(model=str(folder), dtype="float32", enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=GIB)
    chosen = SamplingParams(temperature=0.0, max_tokens=40)
    found = [output.outputs[0].text for output in llm.chat(turns, chosen, use_tqdm=False)]
    with kept_group():
        llm.llm_engine.engine_core.shutdown()
    assert found == [row["completion"] for row in rows]


def test_what_cannot_be_exported_is_named(tmp_path, capsys):
    assert command.main([str(tmp_path), str(tmp_path / "new")]) == 2
    assert "holds no finished run" in capsys.readouterr().err
    (tmp_path / "mine").touch()
    assert command.main([str(tmp_path), str(tmp_path)]) == 2
    assert "exists already; give a new folder" in capsys.readouterr().err
    assert command.main([str(tmp_path), str(tmp_path / "new"), "--push", "birds"]) == 2
    assert "give the id of a model on the hub" in capsys.readouterr().err
    with pytest.raises(UserError, match="is no bank that a run has exported"):
        export.into_vocabulary(None, None, 0, tmp_path / "embeddings", "short")


@pytest.mark.parametrize("trusted", [False, True])
def test_whoever_trusts_the_code_of_a_run_says_so_on_the_command_line(monkeypatch, tmp_path, trusted):
    from common.export import bundle

    given = []
    monkeypatch.setattr(bundle, "export", lambda *arguments: given.append(arguments))
    assert command.main([str(tmp_path), str(tmp_path / "new"), *["--trust-code"] * trusted]) == 0
    assert given == [(tmp_path, tmp_path / "new", None, None, trusted)]


@pytest.mark.faults
def test_alert_without_training_has_nothing_to_export(runner, tmp_path, capsys):
    run = tmp_path / "run"
    assert runner(run, ["method=gemma_1shot", "model=tiny_gemma3", *QUICK, "setting.test_per_class=2"]) == 0
    assert command.main([str(run), str(tmp_path / "new")]) == 2
    assert "method=gemma_1shot has trained no category embeddings" in capsys.readouterr().err
    for kind in ("adapter", "bank"):
        assert command.main([str(run), str(tmp_path / "new"), "--as", kind]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "nothing is left of what was refused"


@pytest.mark.faults
def test_an_exported_alert_says_how_to_ask_it(runner, tmp_path):
    """The card's code runs; the question has the words of two categories; the bank by itself as well."""
    run, folder = tmp_path / "run", tmp_path / "plain"
    extra = ["rewards=alert_no_judge", "trainer.updates=2", "setting.test_per_class=2"]
    assert runner(run, ["method=alert", "model=tiny_gemma3", *QUICK, *extra]) == 0
    assert command.main([str(run), str(folder)]) == 0 and not (folder / "run").exists()
    asking = json.loads((folder / ASKING).read_text())
    (text,) = (part["text"] for part in asking["messages"][-1]["content"] if part["type"] == "text")
    assert len(asking["words"]) == 10 and sum(word in text for word in asking["words"].values()) == 2
    assert CATEGORY not in text and "listed" not in text
    Digits().open("5").save(folder / "photo.jpg", "PNG")
    (code,) = re.findall("```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert command.main([str(run), str(tmp_path / "bank"), "--as", "bank"]) == 0
    assert bank_file.read(tmp_path / "bank", list(asking["words"])).shape[0] == 10


@pytest.mark.slow
def test_an_exported_alert_answers_as_its_run_did_without_the_dataset(runner, tmp_path, monkeypatch):
    """Candidates, replies and probabilities are the run's evaluation's, from the run's folder and from its export."""
    run, folder, digits = tmp_path / "run", tmp_path / "plain", Digits()
    extra = ["rewards=alert_no_judge", "trainer.updates=2", "setting.test_per_class=3", "model.freeze_vision=true"]
    assert runner(run, ["method=alert", "model=tiny_gemma3", *QUICK, *extra]) == 0
    assert command.main([str(run), str(folder)]) == 0
    rows = pyarrow.parquet.read_table(run / "predictions.parquet").to_pylist()
    rows = [row for row in rows if row["phase"] == "after"]
    assert len({tuple(row["candidates"]) for row in rows}) > 1 and len({row["completion"] for row in rows}) > 1
    monkeypatch.setattr("common.data.task.build", lambda config: pytest.fail("the dataset is read again"))
    for place in (run, folder):
        classifier = Classifier.load(place)
        for part in (rows[:20], rows[20:]):
            answers = classifier({row["image"]: digits.open(row["image"]) for row in part})
            assert [list(answer.candidates) for answer in answers] == [row["candidates"] for row in part]
            assert [answer.reply for answer in answers] == [row["completion"] for row in part]
            for answer, row in zip(answers, part, strict=True):
                share = calibrated(run, row).get(row["answer"])
                assert answer.confidence == (None if share is None else pytest.approx(share, abs=1e-5))
        classifier.close()


def test_what_is_sent_to_the_hub(tmp_path, monkeypatch, capsys):
    """Only with --yes, private unless it is said otherwise, and what was shown before is what goes."""
    calls = []

    class Api:
        def create_repo(self, name, **options):
            calls.append((name, options))

        def upload_folder(self, **options):
            calls.append(options)
            return "the commit"

        def repo_info(self, name):
            return SimpleNamespace(private=name != "me/public")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr(card_module, "check_card", lambda folder, run: None)
    (tmp_path / "README.md").write_text("exported before")
    asked = ["no/run", str(tmp_path), "--push", "me/birds"]
    assert command.main(asked) == 0 and not calls
    assert command.main([*asked, "--yes"]) == 0 and "the commit" in capsys.readouterr().out
    assert calls[0] == ("me/birds", {"private": True, "exist_ok": True}) and calls[1]["folder_path"] == tmp_path
    assert command.main([*asked, "--yes", "--public"]) == 0 and calls[2][1]["private"] is False
    assert command.main(["no/run", str(tmp_path), "--push", "me/public", "--yes"]) == 2
    assert "it is there already and public" in capsys.readouterr().err and len(calls) == 5, "nothing was sent"

    def unreachable(self, name, **options):
        raise httpx.ConnectError("no network")

    monkeypatch.setattr(Api, "create_repo", unreachable)
    assert command.main([*asked, "--yes"]) == 2 and "no network; hf auth login" in capsys.readouterr().err
