"""Prompts that hold a row's alt text; and that a captioner trained on them says what only the alt text tells."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from captioner.decoding import caption
from captioner.model import Captioner, CaptionerConfig, TextConfig, VisionConfig
from captioner.stages import Caption
from captioner.styles import ALT_TOKENS, Style, fill, prompts_of
from captioner.task import BaseTask, FinetuneTask
from captioner.tower import Tower
from captioner.vocabulary import train_vocabulary
from infra.train.engine import PlainEngine
from infra.train.optim import OptimConfig

COLORS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (240, 220, 40)}
NAMES = ("ada", "bob", "eve", "kim", "leo", "max", "ned", "sue")
SIZE, LENGTH = (8, 8), 32
PLAIN = Style(name="plain", max_tokens=8)
ALT = Style(name="told", prompt="[the file says {alt} .] what is it ?", max_tokens=8)
ROWS = [(name, color) for name in NAMES for color in COLORS]
SEEN = [row for place, row in enumerate(ROWS) if place % 5]  # a fifth of the pairs is never trained on


def table(rows):
    said = [f"{color} balloon of {name}" for name, color in rows]
    return {
        "pixels": [np.full((*SIZE, 3), COLORS[color], np.uint8) for _, color in rows],
        "caption_alt": [f"photo {name}" for name, _ in rows],
        "reference_plain": said,
        "reference_told": said,
    }


@pytest.fixture(scope="module")
def vocabulary():
    texts = [text for name, column in table(ROWS).items() if name != "pixels" for text in column]
    return train_vocabulary([*texts, ALT.prompt, "한국"], 300)


@pytest.fixture(scope="module")
def task(vocabulary, tmp_path_factory):
    """A fine-tuning of both styles on a base of random weights."""
    folder, shape = str(tmp_path_factory.mktemp("base")), {"hidden": 64, "layers": 1, "mlp": 128}
    config = CaptionerConfig(
        vision=VisionConfig(image_size=SIZE, patch_size=8, **shape), text=TextConfig(max_length=LENGTH, **shape)
    )
    common = {"vocabulary": vocabulary, "image_size": SIZE, "max_length": LENGTH, "optim": OptimConfig(lr=4e-3)}
    base = BaseTask(source=config, **common)
    base.export({"base": base.updates()[0].module}, folder)
    return FinetuneTask(source=folder, styles=(PLAIN, ALT), **common)


def collate(task, rows):
    return task.collate({name: table(rows)[name] for name in task.reads}, None)


@pytest.fixture(scope="module")
def captioner(task):
    (update,) = task.updates()
    batch = {name: torch.from_numpy(array) for name, array in collate(task, SEEN).items()}
    batch["weight"] = torch.ones(len(SEEN))
    engine = PlainEngine(update)
    for _ in range(150):
        losses, counts = engine(batch), update.module.targets(batch)
        engine.backward(sum(losses[name] / counts[name] for name in losses))
        engine.step(task.optim.lr)
    return update.module.eval()


def speak(captioner, style, rows, alts=None):
    columns = table(rows)
    with torch.no_grad():
        features = captioner.encode(torch.from_numpy(np.stack(columns["pixels"])))
        prompts = prompts_of(style, alts or columns["caption_alt"], captioner.vocabulary, captioner.max_length)
        return caption(captioner, features, style, prompts).texts


def test_the_alt_text_stands_in_the_prompt_and_is_no_target(task, vocabulary):
    batch = collate(task, ROWS)
    for row, (name, color) in enumerate(ROWS):
        ids, mask = batch["ids_told"][row], batch["mask_told"][row]
        prompt = [vocabulary.bos, *vocabulary.encode([f"the file says photo {name} . what is it ?"])[0]]
        said = [*vocabulary.encode([f"{color} balloon of {name}"])[0], vocabulary.sep]
        assert ids[: len(prompt) + len(said)].tolist() == prompt + said
        assert mask[: len(prompt)].sum() == 0
        assert mask[len(prompt) :].tolist()[: len(said)] == [1] * len(said)
        assert mask.sum() == len(said)
    assert batch["mask_plain"].sum(1).tolist() == batch["mask_told"].sum(1).tolist()


def test_a_row_without_alt_text_gets_the_prompt_without_its_place(task, vocabulary):
    rows = {name: table(ROWS[:2])[name] for name in task.reads} | {"caption_alt": [None, "   "]}
    batch = task.collate(rows, None)
    prompt = [vocabulary.bos, *vocabulary.encode([" what is it ?"])[0]]
    assert batch["ids_told"][:, : len(prompt)].tolist() == [prompt] * 2
    assert (batch["mask_told"].sum(1) == batch["mask_plain"].sum(1)).all()


def test_alt_texts_are_read_only_where_a_style_asks(task):
    assert "caption_alt" in task.reads
    plain = FinetuneTask(**{**vars(task), "styles": (PLAIN, Style(name="b", prompt="a {alternative}"))})
    assert "caption_alt" not in plain.reads


@pytest.mark.timeout(120)
def test_only_the_style_that_reads_the_alt_text_says_what_it_tells(captioner):
    """On pairs that were never trained on: the colour is in the picture, the name in the alt text alone."""
    unseen = [row for row in ROWS if row not in SEEN]
    told, plain = speak(captioner, ALT, unseen), speak(captioner, PLAIN, unseen)
    assert told == table(unseen)["reference_told"]
    assert [text.split()[0] for text in plain] == [color for _, color in unseen]
    assert len({(text, color) for text, (_, color) in zip(plain, unseen, strict=True)}) == len(COLORS)


@pytest.mark.timeout(120)
def test_the_name_comes_from_the_alt_text_and_not_from_the_picture(captioner):
    rows = SEEN[:8]
    swapped = [f"photo {NAMES[(NAMES.index(name) + 3) % 8]}" for name, _ in rows]
    said = speak(captioner, ALT, rows, swapped)
    assert [text.split()[-1] for text in said] == [alt.split()[-1] for alt in swapped]
    assert [text.split()[0] for text in said] == [color for _, color in rows]
    # Rows with and without an alt text, and so of prompts of other lengths, are decoded together as they are alone.
    mixed = [None if place % 3 == 0 else alt for place, alt in enumerate(swapped)]
    alone = [speak(captioner, ALT, [row], [alt])[0] for row, alt in zip(rows, mixed, strict=True)]
    assert speak(captioner, ALT, rows, mixed) == alone


texts = st.text(max_size=300) | st.lists(st.sampled_from([*NAMES, "photo", "zzz", "한국"]), max_size=99).map(" ".join)


@given(
    st.lists(st.none() | texts, min_size=1, max_size=4),
    st.sampled_from([ALT.prompt, "{alt}", "a {alt} b [or {alt} ]c"]),
)
def test_room_for_the_caption_stays(vocabulary, alts, prompt):
    style = Style(name="s", prompt=prompt, max_tokens=10)
    for length in (64, 512):
        prompts = prompts_of(style, alts, vocabulary, length)
        assert len(prompts) == len(alts)
        for alt, filled in zip(alts, prompts, strict=True):
            size = len(vocabulary.encode([filled])[0])
            assert 1 + size + style.max_tokens <= length
            assert size <= len(vocabulary.encode([prompt])[0]) + prompt.count("{alt}") * ALT_TOKENS[1]
            if len(vocabulary.encode([alt or ""])[0]) <= ALT_TOKENS[0]:
                assert filled == fill(prompt, alt)


def test_a_style_without_room_for_the_alt_text_is_refused(vocabulary):
    style = Style(name="long", prompt="{alt}", max_tokens=60)
    with pytest.raises(ValueError, match=r"'long' leaves 3 of 64 tokens .* lower its max_tokens \(60\)"):
        prompts_of(style, [None], vocabulary, 64)
    assert prompts_of(style, [None, "ada"], vocabulary, 69) == ["", "ada"]
    plain = Style(name="long", prompt="x", max_tokens=999)  # styles without alt texts are bounded where they are said
    assert prompts_of(plain, ["ada", None], vocabulary, 20) == ["x", "x"]


def test_an_alt_text_cannot_end_the_prompt(vocabulary):
    """It is filled in once and never read as a prompt."""
    assert fill("a {alt} b", "{alt} [{alt}]") == "a {alt} [{alt}] b"
    assert prompts_of(ALT, ["{alt}"], vocabulary, 64) == ["the file says {alt} . what is it ?"]


def test_a_captioner_keeps_its_prompts(task, tmp_path):
    (update,) = task.updates()
    update.module.save(str(tmp_path))
    assert Captioner.load(str(tmp_path)).styles == (PLAIN, ALT)


@pytest.mark.timeout(120)
def test_the_stage_fills_prompts(captioner, tmp_path):
    captioner.save(str(tmp_path))
    stage = Caption(Tower(str(tmp_path)), (PLAIN, ALT))
    stage.setup()
    rows = [row for row in ROWS if row not in SEEN]
    unseen = table(rows)
    columns = stage({stage.tower.view: unseen["pixels"], "caption_alt": unseen["caption_alt"]})
    assert columns["caption_told"] == unseen["reference_told"]
    assert columns["caption_plain"] != unseen["reference_told"]
    with pytest.raises(ValueError, match="lower its max_tokens"):
        Caption(Tower(str(tmp_path)), (Style(name="told", prompt="{alt}", max_tokens=30),)).setup()
