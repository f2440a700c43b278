import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from captioner.clip import Clip
from captioner.matching import MatchingConfig
from captioner.model import Captioner
from captioner.scoring import Match
from captioner.tower import Tower
from infra.data.stage import ACCEPTED, Runner, Stage
from tests.captioner.test_matching import BOTH, TEXTS, make

LONG = "a red circle " * 40


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small CLIP with random weights, saved as published ones are; its tokens are single letters."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    model = CLIPModel(
        CLIPConfig(
            text_config={"vocab_size": len(words), **ends, **sizes},
            vision_config={"image_size": 24, "patch_size": 8, **sizes},
            projection_dim=16,
        )
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}).save_pretrained(folder)
    return model, str(folder)


@pytest.fixture(scope="module")
def saved(vocabulary, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("captioner"))
    make(vocabulary, BOTH).save(folder)
    return folder


@pytest.fixture
def pictures():
    rng = np.random.default_rng(2)
    return [rng.integers(0, 256, (20 + 3 * i, 40 - i, 3), dtype=np.uint8) for i in range(len(TEXTS))]


def table(pictures):
    texts = {"caption_alt": TEXTS, "captions_alt?": [None] * len(TEXTS), "caption_short": [*TEXTS[1:], None]}
    return {"pixels": pictures} | texts


def seen(stage, pictures):
    """The pictures as the stage's towers see them; the stage is set up."""
    return {name: [view(picture) for picture in pictures] for name, view in stage.views.items()}


def test_clip_scores_as_in_transformers(clip, pictures):
    model, folder = clip
    ours = Clip(folder)
    assert ours.longest == 77
    processor, tokenizer = CLIPImageProcessorPil.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    tokens = tokenizer(TEXTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    pixels = processor(images=[Image.fromarray(picture) for picture in pictures], return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens, **pixels).logits_per_image / model.logit_scale.exp()
    found = ours.similarity(ours.encode(pictures), TEXTS)
    assert found.values == pytest.approx(logits.diagonal().tolist(), abs=1e-5)
    assert np.std(found.values) > 0.02
    alone = [ours.similarity(ours.encode([picture]), [text]) for picture, text in zip(pictures, TEXTS, strict=True)]
    assert found.values == pytest.approx([one.values[0] for one in alone], abs=1e-5)


def test_clip_says_what_it_did_not_read(clip, pictures):
    ours = Clip(clip[1])
    texts = ["a" * 75, "a" * 76, None, LONG]
    images = ours.encode(pictures[:1] * 4)
    found = ours.similarity(images, texts)
    assert found.cut == [False, True, None, True]
    assert found.values[2] is None
    longer = ours.similarity(images, ["b" + "a" * 74, "a" * 90, None, LONG + "blue"])
    assert longer.values[1::2] == pytest.approx(found.values[1::2], abs=1e-6)
    assert longer.values[0] != pytest.approx(found.values[0], abs=1e-4)
    assert ours.similarity(images, [None] * 4).values == [None] * 4


def test_what_is_no_clip_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no CLIP"):
        Clip(str(tmp_path / "nothing"))
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="type 'bert'"):
        Clip(str(tmp_path))


def count_encodings(monkeypatch):
    calls = []
    encode = Captioner.encode
    monkeypatch.setattr(Captioner, "encode", lambda self, pixels: calls.append(len(pixels)) or encode(self, pixels))
    return calls


def test_a_tower_sees_a_picture_once(saved, pictures, monkeypatch):
    tower = Tower(saved)
    tower.setup()
    calls = count_encodings(monkeypatch)
    features = tower.features(pictures)
    assert tower.features(list(pictures)) is features
    assert torch.equal(tower.features(pictures[3:1:-1]), features[[3, 2]])
    assert calls == [len(pictures)]
    again = [picture.copy() for picture in pictures[:2]]
    torch.testing.assert_close(tower.features(again), features[:2])
    assert tower.features([pictures[0], again[1]]).shape == features[:2].shape
    assert calls == [len(pictures), 2, 2]


def test_the_stage_scores_every_style(saved, clip, pictures, monkeypatch):
    stage = Match(Tower(saved), ("short",), clip=clip[1])
    assert isinstance(stage, Stage)
    stage = pickle.loads(pickle.dumps(stage))
    stage.setup()
    calls = count_encodings(monkeypatch)
    columns = stage({name: (table(pictures) | seen(stage, pictures))[name] for name in stage.reads})
    assert calls == [len(pictures)]
    assert set(columns) == set(stage.writes)
    assert set(stage.writes) == {
        f"{kind}_{style}" for kind in ("match", "clip", "clip_cut") for style in ("alt", "short")
    } | {"matches_alt", "clips_alt"}
    assert all(column[-1] is None for name, column in columns.items() if name.endswith("short"))
    model = Captioner.load(saved)
    matching, features = model.matching, stage.tower.features(pictures)
    assert columns["match_alt"] == matching.match(features, TEXTS)
    assert columns["clip_cut_alt"] == [False] * len(TEXTS)
    for name in ("match_alt", "match_short"):
        assert all(0 < value < 1 for value in columns[name] if value is not None)


def test_each_of_several_alt_texts_has_its_scores(saved, clip, pictures):
    stage = Match(Tower(saved), (), clip=clip[1])
    stage.setup()
    several: list = [None] * len(TEXTS)
    several[1], several[3] = [TEXTS[1], TEXTS[2], LONG], [TEXTS[3], TEXTS[0]]
    batch = {name: (table(pictures) | seen(stage, pictures))[name] for name in stage.reads}
    told = stage(batch | {"captions_alt?": several})
    for kind, kinds in (("match_alt", "matches_alt"), ("clip_alt", "clips_alt")):
        assert told[kind] == stage(batch)[kind]
        for row, texts in enumerate(several):
            if texts is None:
                assert told[kinds][row] is None
                continue
            alone = [
                stage({name: [values[row]] for name, values in batch.items()} | {"caption_alt": [text]})
                for text in texts
            ]
            assert told[kinds][row] == pytest.approx([each[kind][0] for each in alone], abs=1e-4)


def test_stages_of_one_actor_share_what_the_tower_saw(saved, pictures, monkeypatch):
    """A stage before this one asks for the features of all, and rejects two rows: nothing is encoded again."""
    tower = Tower(saved)

    class Speak:
        writes, cpus, gpus = ("caption_short",), 1, 0

        def __init__(self, tower):
            self.tower, self.reads = tower, (tower.view,)

        def setup(self):
            self.tower.setup()

        def __call__(self, batch):
            rows = len(self.tower.features(batch[self.tower.view]))
            said = [f"a red circle {row}" for row in range(rows)]
            return {
                "caption_short": said,
                "state": ["rejected", *[None] * (rows - 2), "rejected"],
                "reason": [None] * rows,
            }

    stages = (Speak(tower), Match(tower, ("short",)))
    for stage in stages:
        stage.setup()
    assert tower.model is stages[1].tower.model
    calls = count_encodings(monkeypatch)
    batch = (
        table(pictures)
        | seen(stages[1], pictures)
        | {"state": [ACCEPTED] * len(pictures), "reason": [None] * len(pictures)}
    )
    columns = Runner(stages)(batch)
    assert calls == [len(pictures)]
    assert [value is None for value in columns["match_alt"]] == [True, *[False] * (len(pictures) - 2), True]


def test_towers_stay_one_when_a_stage_travels(saved):
    tower = Tower(saved)
    one, other = pickle.loads(pickle.dumps((Match(tower, ()), Match(tower, ("short",)))))
    assert one.tower is other.tower


def test_one_tower_under_two_names_runs_once(saved, vocabulary, pictures, tmp_path, monkeypatch):
    """A captioner tuned from a base keeps the base's tower: the base's head judges by the tuned one's features."""
    tuned = make(vocabulary, None)
    tuned.branch(["short"])
    for name in ("tuned", "other"):
        (tmp_path / name).mkdir()
    tuned.save(str(tmp_path / "tuned"))
    stage = Match(Tower(str(tmp_path / "tuned")), (), matcher=Tower(saved))
    stage.setup()
    calls = count_encodings(monkeypatch)
    batch = seen(stage, pictures) | {"caption_alt": TEXTS}
    stage.tower.features(batch[stage.tower.view])
    columns = stage(batch)
    assert calls == [len(pictures)]
    other = make(vocabulary, BOTH)
    other.vision.embeddings.class_embedding.data += 0.1
    other.save(str(tmp_path / "other"))
    calls.clear()
    stage = Match(Tower(str(tmp_path / "tuned")), (), matcher=Tower(str(tmp_path / "other")))
    stage.setup()
    batch = seen(stage, pictures) | {"caption_alt": TEXTS}
    stage.tower.features(batch[stage.tower.view])
    assert stage(batch) != columns
    assert calls == [len(pictures)] * 2


def test_a_captioner_without_a_head_is_refused(vocabulary, tmp_path):
    make(vocabulary, MatchingConfig(contrastive=1, width=8)).save(str(tmp_path))
    with pytest.raises(ValueError, match="no matching head"):
        Match(Tower(str(tmp_path)), ()).setup()
    make(vocabulary, None).save(str(tmp_path))
    with pytest.raises(ValueError, match="no matching head"):
        Match(Tower(str(tmp_path)), ()).setup()


def test_the_stage_in_bf16(saved, pictures):
    exact, rounded = Match(Tower(saved), ()), Match(Tower(saved, "bf16"), ())
    found = []
    for stage in (exact, rounded):
        stage.setup()
        found.append(stage(seen(stage, pictures) | {"caption_alt": TEXTS})["match_alt"])
    assert found[1] == pytest.approx(found[0], abs=0.2)
