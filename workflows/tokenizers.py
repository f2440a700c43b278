"""All image tokenizers on one corpus for the same training FLOPs, and what each of them loses: one table."""

from dataclasses import dataclass, replace

from infra.store import Artifact, Plan, Store
from infra.train.loop import TrainConfig
from infra.train.optim import OptimConfig
from t2i.tokenizers.codebook import CodebookConfig
from t2i.tokenizers.critic import CriticConfig
from t2i.tokenizers.dvae import DVAEConfig
from t2i.tokenizers.finite_scalar import FiniteScalarConfig
from t2i.tokenizers.gaussian import GaussianConfig
from t2i.tokenizers.gumbel import GumbelConfig
from t2i.tokenizers.lookup_free import LookupFreeConfig
from t2i.tokenizers.losses import LossConfig
from t2i.tokenizers.maskgit_vqgan import MaskGITVQGANConfig
from t2i.tokenizers.patch_vqgan import patch_vqgan_shapes
from t2i.tokenizers.task import TokenizerConfig, check_patches
from t2i.tokenizers.vit_vqgan import TowerConfig, ViTVQGANConfig
from t2i.tokenizers.vq_vae import VQVAEConfig
from t2i.tokenizers.vqgan import VQGANConfig
from workflows.ingest import IngestConfig, ingest
from workflows.rebuild import RebuildConfig, rebuild
from workflows.train_tokenizer import TrainTokenizerConfig, train_tokenizer
from workflows.yardstick import CalibrateConfig, TrainExtractorConfig, calibrate, train_extractor, yardstick

BATCH = 64


@dataclass(frozen=True, kw_only=True)
class TokenizersRecipe:
    """Every choice that changes the numbers of a comparison of tokenizers."""

    name: str
    corpus: IngestConfig
    # Of the yardstick; None, as of sets: the corpus has none, and its test split is rebuilt.
    extractor: TrainExtractorConfig | str | None
    sets: CalibrateConfig | None
    tokenizers: tuple[TrainTokenizerConfig | str, ...]
    table: RebuildConfig  # with what they are called in it

    def __post_init__(self) -> None:
        if (self.extractor is None) != (self.sets is None):
            raise ValueError("A yardstick has an extractor and sets of pictures: give both, or neither.")
        if not self.tokenizers or len({*self.table.names}) not in (0, len(self.tokenizers)):
            raise ValueError("A table is of at least one tokenizer, each with a name of its own, or of none by name.")
        for each in self.tokenizers:
            if not isinstance(each, str):
                check_patches(each.model, self.corpus.sizes)

    def run(self, store: Store | Plan) -> Artifact:
        """Make what the recipe describes, or find it; returns the artifact that holds `table.json`."""
        images = store.step(ingest, self.corpus)
        extractor = store.step(train_extractor, self.extractor, images)
        measured_by = store.step(calibrate, self.sets, images, extractor) or images
        made = [store.step(train_tokenizer, each, images) for each in self.tokenizers]
        return store.step(rebuild, self.table, measured_by, *made)


def tokenizers(seed: int = 0) -> TokenizersRecipe:
    """Shapes at 32x32 by every tokenizer, 20 TFLOP each: codes of 4x4 pixels, 512 of them, but for two.

    The demo's has 2,560 codes of 8x8 pixels, the KL autoencoder 4 numbers of 4x4 pixels. Those with a critic are
    trained from three seeds. It wakes after half of the steps, and counts.
    """
    before, judged = yardstick(), _judged(seed)
    trained = _plain(seed) | {f"vqgan, critic, seed {n}": replace(judged, seed=n) for n in range(3)}
    return TokenizersRecipe(
        name="tokenizers",
        corpus=before.corpus,
        extractor=before.extractor,
        sets=before.sets,
        tokenizers=tuple(trained.values()),
        table=RebuildConfig(names=tuple(trained)),
    )


def _plain(seed: int) -> dict[str, TrainTokenizerConfig]:
    """Without a critic, by name; of each the steps that 20 TFLOP are (`workflows.flops.steps_for`)."""
    likelihood = LossConfig(reconstruction=0.0, logit_laplace=1.0, kl=6.6 / 48)  # 48 values a code, as 192 of DALL-E
    latents = LossConfig(reduction="sum", kl=1e-2)
    return {
        "vq_vae": _of(VQVAEConfig(channels=96, blocks=2, quantizer=_AVERAGED), 1162, seed),
        "vqgan": _of(_pyramid(_LEARNED), 677, seed),
        "vqgan, ema": _of(_pyramid(_AVERAGED), 677, seed),
        "vqgan, fsq": _of(_pyramid(FiniteScalarConfig(levels=(8, 8, 8))), 679, seed),
        "vqgan, lfq": _of(_pyramid(LookupFreeConfig(width=9)), 676, seed),
        "vqgan, simvq": _of(_pyramid(CodebookConfig(size=512, width=16, linear=True)), 677, seed),
        "vit_vqgan": _of(_VIT, 621, seed),
        "dvae": _of(_DVAE, 1491, seed, likelihood),
        "maskgit_vqgan": _of(_MASKGIT, 570, seed),
        "patch_vqgan": _of(patch_vqgan_shapes(), 2956, seed),
        "kl": _of(_pyramid(GaussianConfig(width=4)), 671, seed, latents),
    }


_LEARNED = CodebookConfig(size=512, width=16)
_AVERAGED = replace(_LEARNED, ema=0.99, dead_below=1.0)
_TOWER = TowerConfig(layers=3, width=128, heads=4, head_width=32)
_VIT = ViTVQGANConfig(patch=4, encoder=_TOWER, decoder=_TOWER, quantizer=replace(_LEARNED, normalize=True))
_MASKGIT = MaskGITVQGANConfig(
    channels=32, multipliers=(1, 1, 2), blocks=1, groups=8, quantizer=replace(_LEARNED, width=64)
)
_DVAE = DVAEConfig(
    channels=32, multipliers=(1, 2, 4), blocks=1,
    quantizer=GumbelConfig(size=512, width=32, anneal_steps=800, warmup_steps=200),
)  # fmt: skip


def _judged(seed: int) -> TrainTokenizerConfig:
    """With a critic that wakes after half of the steps."""
    critic = CriticConfig(channels=32, layers=2, weight=0.1, start_step=280)
    optim = OptimConfig(lr=1e-3, warmup_steps=30, betas=(0.5, 0.9))
    return replace(_of(_pyramid(_AVERAGED), 515, seed), critic=critic, critic_optim=optim)


def _pyramid(quantizer: CodebookConfig | FiniteScalarConfig | LookupFreeConfig | GaussianConfig) -> VQGANConfig:
    """VQGAN's network at f4."""
    return VQGANConfig(
        channels=24,
        multipliers=(1, 1, 2),
        blocks=1,
        attention_levels=(),
        groups=8,
        latent_channels=32,
        quantizer=quantizer,
    )


def _of(model: TokenizerConfig, steps: int, seed: int, losses: LossConfig | None = None) -> TrainTokenizerConfig:
    train = TrainConfig(steps=steps, batch=BATCH, seed=seed, precision="bf16", log_every_steps=20, save_every_steps=200)
    return TrainTokenizerConfig(
        model=model,
        seed=seed,
        losses=losses or LossConfig(distance="l2"),
        train=train,
        optim=OptimConfig(lr=3e-3, warmup_steps=50),
    )
