"""The named recipes: every choice that changes the numbers of a run, as a function that can be read aloud."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from captioner.model import CaptionerConfig, TextConfig, VisionConfig
from captioner.styles import DESCRIPTIVE, SHORT
from infra.others import others
from infra.train.loop import TrainConfig
from infra.train.optim import OptimConfig
from t2i.priors.autoregressive import AutoregressiveConfig
from t2i.priors.sampling import SamplingConfig
from t2i.tokenizers.critic import CriticConfig
from t2i.tokenizers.finite_scalar import FiniteScalarConfig
from t2i.tokenizers.losses import LossConfig
from t2i.tokenizers.patch_vqgan import PatchVQGANConfig
from workflows.asked import captioner_of
from workflows.commands import KINDS, function
from workflows.corpora.shapes import ShapesConfig
from workflows.encode import EncodeConfig
from workflows.evaluate import ReportConfig
from workflows.ingest import IngestConfig
from workflows.mix import READ, MixConfig
from workflows.recaption import RecaptionConfig
from workflows.sample import SampleConfig
from workflows.text_to_image import Recipe
from workflows.train_captioner import TrainCaptionerConfig
from workflows.train_prior import TrainPriorConfig
from workflows.train_tokenizer import TrainTokenizerConfig


def demo(seed: int = 0) -> Recipe:
    """Shapes at 32x32, from noisy alt text to sampled scenes, in minutes on two cores.

    What `demo_v1` does with other trainings: matrices learn by Muon, and a code stands for 8x8 pixels and sees no more.
    """
    before = demo_v1(seed)
    return replace(
        before,
        name="demo",
        captioner=replace(
            _captioner(seed),
            base=_train(seed, 250),
            base_optim=OptimConfig(lr=8e-3, warmup_steps=40, muon=True),
            finetune=_train(seed, 80),
            finetune_optim=OptimConfig(lr=6e-3, warmup_steps=20, muon=True),
        ),
        captions=RecaptionConfig(score_alt=False),  # no bound of `mix` asks for it
        tokenizer=_demo_tokenizer(seed),
        prior=replace(
            before.prior,
            train=_train(seed, 320),
            optim=OptimConfig(lr=1e-2, warmup_steps=50, weight_decay=0.01, muon=True),
        ),
    )


def demo_v1(seed: int = 0) -> Recipe:
    """The demo as it was before Muon: the same corpus and scores in more than twice the time."""
    return Recipe(
        name="demo_v1",
        # Objects stand at the centres of their cells: a pixel of jitter makes the codes several times as surprising.
        corpus=IngestConfig(
            corpus=ShapesConfig(samples=24_000, labelled=1_000, jitter=0, seed=seed), image_size=(32, 32)
        ),
        captioner=_captioner(seed),
        captions=RecaptionConfig(),
        mix=MixConfig(weights={"alt": 0.05, "descriptive": 0.95}),  # DALL-E 3's share
        tokenizer=_tokenizer(seed),
        codes=EncodeConfig(),
        prior=TrainPriorConfig(
            model=AutoregressiveConfig(width=128, layers=4, heads=4),
            vocabulary_size=1000,
            text_length=40,
            drop=0.05,
            train=_train(seed, 1500),
            optim=OptimConfig(lr=5e-3, warmup_steps=100, weight_decay=0.01),
            seed=seed,
        ),
        sample=SampleConfig(count=256, sampling=SamplingConfig(temperature=0), seed=seed),
        report=ReportConfig(
            title="Shapes",
            summary="Scenes of one to three objects, their noisy alt texts rewritten, and pictures drawn from prompts.",
            corpus="shapes",
            targets={"caption_f1": 0.95, "scene_score": 0.80, "object_score": 0.90},
        ),
    )


def debug(seed: int = 0) -> Recipe:
    """The whole path in under a minute on two cores, with a corpus too small to learn from."""
    recipe = demo_v1(seed)
    short = TrainConfig(steps=6, batch=16, seed=seed, log_every_steps=2, save_every_steps=3)
    return replace(
        recipe,
        name="debug",
        corpus=replace(
            recipe.corpus, corpus=ShapesConfig(samples=160, labelled=40, test_fraction=0.2, shard_size=40, seed=seed)
        ),
        captioner=replace(_captioner(seed), base=short, finetune=short),
        captions=RecaptionConfig(retries=()),  # nearly all its captions are faulty
        tokenizer=replace(_tokenizer(seed), train=short),
        prior=replace(recipe.prior, train=short),
        sample=replace(recipe.sample, count=8),
        report=replace(recipe.report, title="Debug", summary="Too short a training to show anything.", targets={}),
    )


def nlvr(corpus: str, seed: int = 0) -> Recipe:
    """Cornell NLVR: pictures of 400x100 with human sentences; captions learned from the scenes of 500 dev rows."""
    recipe, size = demo_v1(seed), (32, 128)
    vision = VisionConfig(image_size=size, patch_size=8, hidden=128, layers=2, heads=4, mlp=384)
    text = TextConfig(hidden=128, layers=2, heads=4, mlp=384, max_length=112)
    styles = (SHORT, replace(DESCRIPTIVE, max_tokens=108))
    return replace(
        recipe,
        name="nlvr",
        corpus=IngestConfig(corpus=corpus, labels="nlvr", image_size=size),
        captioner=replace(
            _captioner(seed),
            model=CaptionerConfig(vision=vision, text=text),
            styles=styles,
            base=_train(seed, 600),
            finetune=_train(seed, 300, batch=32),
        ),
        mix=MixConfig(weights={"alt": 0.05, "short": 0.15, "descriptive": 0.8}),
        tokenizer=replace(_tokenizer(seed), train=_train(seed, 500, batch=32)),
        prior=replace(recipe.prior, text_length=112, drop=0.1, train=_train(seed, 400, batch=32)),
        sample=replace(recipe.sample, count=64, sampling=SamplingConfig(temperature=0.7, guidance=1.5)),
        report=ReportConfig(
            title="Cornell NLVR",
            summary="Three boxes a picture; human sentences (Suhr et al., ACL 2017, CC-BY-4.0) rewritten as scenes.",
            corpus="nlvr",
        ),
    )


def emoji(corpus: str, seed: int = 0) -> Recipe:
    """Noto Emoji at 32x32: names only, so one style, short."""
    recipe = demo_v1(seed)
    return replace(
        recipe,
        name="emoji",
        corpus=IngestConfig(corpus=corpus, labels="emoji", image_size=(32, 32)),
        captioner=replace(
            _captioner(seed),
            vocabulary_size=2000,
            styles=(SHORT,),
            base=_train(seed, 600),
            finetune=_train(seed, 100),
        ),
        mix=MixConfig(weights={"alt": 0.5, "short": 0.5}),
        tokenizer=replace(  # judged by a critic in its second half
            _tokenizer(seed),
            critic=CriticConfig(channels=32, layers=2, weight=0.1, start_step=600),
            critic_optim=OptimConfig(lr=3e-4, warmup_steps=30, betas=(0.5, 0.9)),
        ),
        prior=replace(recipe.prior, vocabulary_size=2000, drop=0.1, train=_train(seed, 700)),
        sample=replace(recipe.sample, count=64, sampling=SamplingConfig(temperature=0.7, guidance=1.5)),
        report=ReportConfig(
            title="Noto Emoji",
            summary="Names of emoji (Google, OFL and Apache-2.0) learned from, and drawn again.",
            corpus="words",
        ),
    )


def own(corpus: str, captioner: str = "none", model: str = "", key_variable: str = "", seed: int = 0) -> Recipe:
    """Pictures of one's own at 64x64, captioned by any captioner: a model's name or folder, a server, or none.

    `captioner` is what `rescribe recaption` takes, `model` and `key_variable` are a server's. Prompts are the captions
    of held-out rows. Steps suit some thousands of pictures; a cluster and more of them want more.
    """
    recipe, size = demo(seed), (64, 64)
    who = None if captioner == "none" else captioner_of(captioner, model, key_variable)
    captions, weights = RecaptionConfig(), dict(READ)
    if isinstance(who, TrainCaptionerConfig) and isinstance(who.model, str):  # BLIP as it was published knows no style
        captions, weights = RecaptionConfig(styles=(SHORT,)), {"alt": 0.05, "short": 0.95}
    return replace(
        recipe,
        name="own",
        corpus=IngestConfig(corpus=corpus, image_size=size, fit="crop"),
        captioner=who,
        captions=captions if who else None,
        mix=MixConfig(weights=weights if who else {"alt": 1.0}),
        tokenizer=replace(_demo_tokenizer(seed), train=_train(seed, 1000)),
        prior=replace(recipe.prior, vocabulary_size=4000, text_length=112, drop=0.1, train=_train(seed, 1000)),
        sample=replace(recipe.sample, count=64, sampling=SamplingConfig(temperature=0.7, guidance=1.5)),
        report=ReportConfig(title="Own pictures", summary="", corpus="words"),
    )


def _captioner(seed: int) -> TrainCaptionerConfig:
    """That of the demo as it was at first."""
    return TrainCaptionerConfig(
        model=CaptionerConfig(
            vision=VisionConfig(image_size=(32, 32), patch_size=8, hidden=128, layers=2, heads=4, mlp=384),
            text=TextConfig(hidden=128, layers=2, heads=4, mlp=384, max_length=48),
        ),
        vocabulary_size=400,
        base=_train(seed, 800),
        base_optim=OptimConfig(lr=1e-3, warmup_steps=50),
        finetune=_train(seed, 150),
        finetune_optim=OptimConfig(lr=1e-3, warmup_steps=20),
        seed=seed,
    )


def _demo_tokenizer(seed: int) -> TrainTokenizerConfig:
    """That of the demo."""
    return replace(
        _tokenizer(seed),
        model=PatchVQGANConfig(
            patch=8,
            channels=192,
            encoder_kernel=1,
            encoder_blocks=0,
            quantizer=FiniteScalarConfig(levels=(8, 8, 8, 5)),
        ),
        train=_train(seed, 640),
        optim=OptimConfig(lr=1e-2, warmup_steps=30, muon=True),
    )


def _tokenizer(seed: int) -> TrainTokenizerConfig:
    """That of the demo as it was at first."""
    return TrainTokenizerConfig(
        model=PatchVQGANConfig(patch=4, channels=96, quantizer=FiniteScalarConfig(levels=(8, 6, 5))),
        losses=LossConfig(distance="l2"),
        train=_train(seed, 1200),
        optim=OptimConfig(lr=3e-3, warmup_steps=30),
        seed=seed,
    )


def _train(seed: int, steps: int, batch: int = 64) -> TrainConfig:
    return TrainConfig(steps=steps, batch=batch, seed=seed, precision="bf16", log_every_steps=20, save_every_steps=300)


_OURS = {make.__name__: make for make in (debug, demo, demo_v1, nlvr, emoji, own)}


def __getattr__(name: str) -> dict[str, Callable[..., Any]]:
    """`RECIPES`: ours, and those of installed packages, which may import this module before they are asked for."""
    if name != "RECIPES":
        raise AttributeError(f"There is no {name} here.")
    ours = _OURS | {name: function(f"{module}.{name}") for name, module in KINDS.items()}
    return ours | others("rescribe.recipes") | ours  # ours come first, and keep their names
