import json
import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional

from infra.data.stage import Stage
from infra.train.engine import PlainEngine
from infra.train.optim import OptimConfig
from t2i.nn.weights import initialize
from t2i.pixels import resized, scale
from t2i.protocol import Space
from t2i.stages import Encode
from t2i.tokenizers.codebook import CodebookConfig
from t2i.tokenizers.critic import Critic, CriticConfig
from t2i.tokenizers.dvae import DVAEConfig
from t2i.tokenizers.finite_scalar import FiniteScalar, FiniteScalarConfig
from t2i.tokenizers.gumbel import Gumbel, GumbelConfig
from t2i.tokenizers.lookup_free import LookupFreeConfig
from t2i.tokenizers.losses import LossConfig
from t2i.tokenizers.maskgit_vqgan import MaskGITVQGANConfig
from t2i.tokenizers.patch_vqgan import PatchVQGANConfig
from t2i.tokenizers.pixels import PixelsConfig
from t2i.tokenizers.task import TokenizerTask, build_tokenizer, load_tokenizer, save_tokenizer
from t2i.tokenizers.turns import GeneratorTurn
from t2i.tokenizers.vit_vqgan import (
    TowerConfig,
    ViTVQGANConfig,
    vit_vqgan_base,
    vit_vqgan_large,
    vit_vqgan_small,
)
from t2i.tokenizers.vq_vae import VQVAEConfig
from t2i.tokenizers.vqgan import VQGANConfig

pytestmark = pytest.mark.family("config", "quantizer")
SMALL = {"channels": 8, "groups": 4}
PYRAMID = {**SMALL, "multipliers": (1, 2), "blocks": 1, "attention_levels": (1,), "latent_channels": 8}
TOWERS = {
    "patch": 2,
    "encoder": TowerConfig(layers=1, width=16, heads=2, head_width=8),
    "decoder": TowerConfig(layers=2, width=32, heads=2, head_width=8),
}
QUANTIZERS = {
    "codebook": CodebookConfig(size=16, width=4),
    "codebook on the sphere": CodebookConfig(size=16, width=4, normalize=True),
    "linear codebook": CodebookConfig(size=16, width=4, linear=True),
    "finite scalar": FiniteScalarConfig(levels=(4, 3, 2)),
    "averaged codebook": CodebookConfig(size=16, width=4, ema=0.9, dead_below=0.5),
    "gumbel": GumbelConfig(size=16, width=4, anneal_steps=160),
    "lookup-free": LookupFreeConfig(width=4, group=2, temperature=0.5),
}
TOKENIZERS = {
    "vqgan": VQGANConfig(**PYRAMID, quantizer=QUANTIZERS["codebook"]),
    "vqgan, linear codebook": VQGANConfig(**PYRAMID, quantizer=QUANTIZERS["linear codebook"]),
    "patch vqgan": PatchVQGANConfig(**SMALL, patch=2, quantizer=QUANTIZERS["finite scalar"]),
    "patch vqgan, patches alone": PatchVQGANConfig(
        **SMALL, patch=2, encoder_kernel=1, encoder_blocks=0, quantizer=QUANTIZERS["finite scalar"]
    ),
    "patch vqgan, lookup-free": PatchVQGANConfig(**SMALL, patch=2, quantizer=QUANTIZERS["lookup-free"]),
    "vq-vae": VQVAEConfig(channels=8, levels=1, blocks=1, quantizer=QUANTIZERS["averaged codebook"]),
    "patch vqgan, gumbel": PatchVQGANConfig(**SMALL, patch=2, quantizer=QUANTIZERS["gumbel"]),
    "patch vqgan, sphere": PatchVQGANConfig(**SMALL, patch=2, quantizer=QUANTIZERS["codebook on the sphere"]),
    "vit vqgan": ViTVQGANConfig(**TOWERS, quantizer=QUANTIZERS["codebook on the sphere"]),
    "vit vqgan, logits": ViTVQGANConfig(**TOWERS, quantizer=QUANTIZERS["codebook on the sphere"], logits=True),
    "vit vqgan, gumbel": ViTVQGANConfig(**TOWERS, quantizer=QUANTIZERS["gumbel"]),
    "dvae": DVAEConfig(channels=16, multipliers=(1, 2), blocks=1, quantizer=QUANTIZERS["gumbel"]),
    "maskgit vqgan": MaskGITVQGANConfig(**SMALL, multipliers=(1, 2), blocks=1, quantizer=QUANTIZERS["codebook"]),
}
LOSSES = {  # others: l2
    "vit vqgan, logits": LossConfig(distance="l2", logit_laplace=0.1),
    "dvae": LossConfig(reconstruction=0.0, logit_laplace=1.0, kl=6.6 / 12),  # DALL-E's of 2x2 pixels a code
}


@pytest.fixture(params=TOKENIZERS)
def config(request):
    return TOKENIZERS[request.param]


def quantizer_of(name):
    quantizer = QUANTIZERS[name].build()
    initialize(quantizer, 0)
    return quantizer


@pytest.fixture(params=QUANTIZERS)
def quantizer(request):
    return quantizer_of(request.param)


def build(config, seed=0):
    tokenizer = build_tokenizer(config)
    initialize(tokenizer, seed)
    return tokenizer


def images(rows=3, size=(8, 12)):
    return torch.randint(256, (rows, 3, *size), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


PUBLISHED = {
    "VQGAN f16-1024 (taming-transformers)": (VQGANConfig(), 72_141_699),
    "VQGAN f16-16384 (taming-transformers)": (VQGANConfig(quantizer=CodebookConfig(size=16_384)), 76_073_859),
    "vq-f4 (latent-diffusion)": (
        VQGANConfig(
            multipliers=(1, 2, 4),
            attention_levels=(),
            latent_channels=3,
            quantizer=CodebookConfig(size=8192, width=3),
        ),
        55_322_782,
    ),
    "vq-f8 (latent-diffusion)": (
        VQGANConfig(
            multipliers=(1, 2, 2, 4),
            attention_levels=(3,),
            latent_channels=4,
            quantizer=CodebookConfig(size=16_384, width=4),
        ),
        67_717_295,
    ),
    "ViT-VQGAN small (enhancing-transformers)": (vit_vqgan_small(), 50_908_195),
    "ViT-VQGAN base (enhancing-transformers)": (vit_vqgan_base(), 170_664_483),
    "ViT-VQGAN large (enhancing-transformers)": (vit_vqgan_large(), 613_487_907),
    "dVAE (DALL-E)": (DVAEConfig(), 97_616_006),
    "MaskGIT-VQGAN (1d-tokenizer)": (MaskGITVQGANConfig(), 54_515_587),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config, count = PUBLISHED[name]
    with torch.device("meta"):
        tokenizer = build_tokenizer(config)
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == count


def test_the_published_critic_has_its_size_and_grid():
    with torch.device("meta"):
        critic = Critic(CriticConfig())
        assert sum(parameter.numel() for parameter in critic.parameters()) == 2_765_633
        assert critic(torch.empty(1, 3, 256, 256)).shape == (1, 1, 30, 30)


def test_codes_and_pictures_have_their_shapes(config):
    tokenizer = build(config)
    codes = tokenizer.encode(scale(images()))
    assert codes.dtype == torch.int64
    assert codes.shape == (3, *tokenizer.space((8, 12)).shape) == (3, 4, 6)
    assert 0 <= codes.min() <= codes.max() < tokenizer.codebook_size
    decoded = tokenizer.decode(codes)
    assert decoded.shape == (3, 3, 8, 12)
    assert decoded.abs().max() <= 1


def test_a_size_that_does_not_fit_is_told(config):
    with pytest.raises(ValueError, match="do not divide"):
        build(config).space((8, 11))


def test_codes_say_all_that_the_decoder_hears(config):
    tokenizer = build(config)
    quantized = tokenizer.quantize(scale(images()))
    rebuilt = tokenizer.pictures(tokenizer.reconstruct(quantized.vectors))
    close(tokenizer.decode(quantized.codes), rebuilt.clamp(-1, 1))


def test_rows_do_not_meet(config):
    tokenizer = build(config)
    pixels = scale(images())
    assert torch.equal(tokenizer.encode(pixels)[1:2], tokenizer.encode(pixels[1:2]))


@pytest.mark.long
def test_four_pictures_are_learned(config):
    colors = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], dtype=torch.uint8)
    pairs = torch.tensor([[0, 1, 1, 0], [1, 2, 2, 1], [2, 3, 3, 2], [3, 0, 0, 3]])
    quarters = colors[pairs].view(4, 2, 2, 3).permute(0, 3, 1, 2)
    pictures = quarters.repeat_interleave(4, 2).repeat_interleave(4, 3)
    batch = {"images": pictures, "weight": torch.ones(4), "step": torch.tensor(0)}
    losses = next((LOSSES[name] for name in LOSSES if TOKENIZERS[name] is config), LossConfig(distance="l2"))
    turn = GeneratorTurn(build(config), losses)
    optimizer = torch.optim.Adam(turn.parameters(), lr=3e-3)
    weights = losses.weights()
    for step in range(240):
        given = turn(batch | {"step": torch.tensor(step), "noise_key": torch.arange(4) + 4 * step})
        optimizer.zero_grad()
        sum(weights[name] * given.pop(name) for name in turn.targets(batch)).backward()
        optimizer.step()
        if given:
            with torch.no_grad():
                turn.stepped(given)
    rebuilt = turn.tokenizer.decode(turn.tokenizer.encode(scale(batch["images"])))
    assert (rebuilt - scale(batch["images"])).square().mean() < 0.03


def test_lookup_is_the_inverse(quantizer):
    z = torch.randn(5, quantizer.config.takes, 4, 4, generator=torch.Generator().manual_seed(0))
    quantized = quantizer(z)
    close(quantizer.lookup(quantized.codes), quantized.vectors)


def test_every_code_is_its_own_nearest(quantizer):
    codes = torch.arange(quantizer.size).view(1, 1, -1)
    vectors = quantizer.lookup(codes)
    assert len(vectors.flatten(2)[0].T.unique(dim=0)) == quantizer.size
    if isinstance(quantizer, FiniteScalar):
        vectors = torch.atanh(vectors.clamp(-0.999, 0.999))  # what the quantizer squashes
    if isinstance(quantizer, Gumbel):
        vectors = functional.one_hot(codes, quantizer.size).permute(0, 3, 1, 2)  # its logits
    assert torch.equal(quantizer(vectors).codes, codes)


def test_gradients_pass_straight_through():
    quantizer = quantizer_of("codebook")
    z = torch.randn(2, 4, 3, 3, requires_grad=True)
    quantizer(z).vectors.sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))


def test_each_code_loss_moves_its_own_side():
    quantizer = quantizer_of("codebook")
    z = torch.randn(2, 4, 3, 3, requires_grad=True)
    losses = quantizer(z).losses
    assert torch.equal(losses["codebook"], losses["commitment"])
    inner, outer = torch.autograd.grad(losses["codebook"].sum(), [z, quantizer.vectors], allow_unused=True)
    assert inner is None
    assert outer.abs().sum() > 0
    inner, outer = torch.autograd.grad(
        quantizer(z).losses["commitment"].sum(), [z, quantizer.vectors], allow_unused=True
    )
    assert inner.abs().sum() > 0
    assert outer is None


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"linear": True}], ids=["plain", "sphere", "linear"])
def test_the_nearest_code_is_that_of_32_bits(options):
    quantizer = CodebookConfig(size=8192, width=8, **options).build()
    initialize(quantizer, 0)
    quantizer.requires_grad_(False)
    z = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0)) * quantizer.vectors.std()
    plain = quantizer(z)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = quantizer(z)
        close(quantizer.lookup(plain.codes), plain.vectors)
    assert torch.equal(rounded.codes, plain.codes)
    close(rounded.vectors, plain.vectors)


def test_a_linear_codebook_moves_as_a_whole():
    quantizer = quantizer_of("linear codebook")
    before = quantizer.lookup(torch.arange(16).view(1, 1, 16))
    optimizer = torch.optim.SGD([p for p in quantizer.parameters() if p.requires_grad], lr=1.0)
    z = torch.randn(1, 4, 1, 1)  # uses one code only
    quantizer(z).losses["codebook"].sum().backward()
    optimizer.step()
    moved = (quantizer.lookup(torch.arange(16).view(1, 1, 16)) - before).abs().amax(dim=1)
    assert (moved > 0).all()


TURNS = {
    "l1": (LossConfig(), None),
    "l2": (LossConfig(distance="l2"), None),
    "critic": (LossConfig(), CriticConfig(channels=8, layers=1, start_step=10)),
}


def turns(name, seed=0):
    losses, critic = TURNS[name]
    optim = OptimConfig(lr=1e-3)
    task = TokenizerTask(model=TOKENIZERS["patch vqgan, sphere"], losses=losses, optim=optim, critic=critic, seed=seed)
    return [update.module for update in task.updates()]


def batch(rows=3, step=0, size=(8, 12)):
    return {"images": images(rows, size), "weight": torch.ones(rows), "step": torch.tensor(step)}


@pytest.mark.parametrize("name", TURNS)
def test_losses_are_sums_over_counted_rows(name):
    for turn in turns(name):
        whole = turn(batch())
        assert whole.keys() == turn.targets(batch()).keys()
        hidden = turn(batch() | {"weight": torch.tensor([1.0, 0.0, 1.0])})
        rows = [turn({k: v[i : i + 1] if v.dim() else v for k, v in batch().items()}) for i in range(3)]
        for loss in whole:
            close(whole[loss], sum(row[loss] for row in rows))
            close(hidden[loss], rows[0][loss] + rows[2][loss])
        assert turn.targets(batch() | {"weight": torch.tensor([1.0, 0.0, 1.0])}).popitem()[1] == 2


def test_the_reconstruction_is_what_it_says():
    for name, distance in (("l1", torch.abs), ("l2", torch.square)):
        (turn,) = turns(name)
        pixels = scale(images())
        rebuilt = turn.tokenizer.reconstruct(turn.tokenizer.quantize(pixels).vectors)
        close(turn(batch())["reconstruction"], 3 * distance(rebuilt - pixels).mean())


def test_the_critic_sleeps_until_its_step():
    generator, _ = turns("critic")
    assert generator(batch(step=9))["adversarial"] == 0
    assert generator(batch(step=10))["adversarial"] != 0


def test_the_turns_do_not_train_each_other():
    generator, critic = turns("critic")
    assert not {id(p) for p in generator.parameters()} & {id(p) for p in critic.parameters()}
    sum(generator(batch(step=10)).values()).backward()
    assert all(parameter.grad is None for parameter in critic.parameters())
    assert all(parameter.grad is not None for parameter in generator.parameters())
    generator.zero_grad(set_to_none=True)
    critic(batch(step=10))["hinge"].backward()
    assert all(parameter.grad is None for parameter in generator.parameters())
    assert all(parameter.grad is not None for parameter in critic.parameters())


def test_the_hinge_loss_in_closed_form():
    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.answers = iter([torch.tensor([2.0, 0.5, -0.3]), torch.tensor([-2.0, 0.1, 0.7])])

        def forward(self, x):
            return next(self.answers).view(3, 1, 1, 1)

    _, turn = turns("critic")
    turn.critic = Fixed()
    assert turn(batch())["hinge"] / 3 == pytest.approx(0.76666665)


def test_the_adaptive_weight_balances_gradients():
    generator, judging = turns("critic")
    generator.train()
    pixels = batch(step=10)
    rebuilt = generator.tokenizer.reconstruct(generator.tokenizer.quantize(scale(pixels["images"])).vectors)
    last = generator.tokenizer.last_layer
    distance = (rebuilt - scale(pixels["images"])).abs().flatten(1).mean(1).sum()
    (of_distance,) = torch.autograd.grad(distance, last, retain_graph=True)
    (plain,) = torch.autograd.grad(judging.critic(rebuilt).flatten(1).mean(1).sum(), last)
    (of_critic,) = torch.autograd.grad(generator(pixels)["adversarial"], last)
    close(of_critic.norm(), 0.8 * of_distance.norm() * plain.norm() / (plain.norm() + 1e-4))


def test_the_task_makes_exports_and_travels(tmp_path):
    task = TokenizerTask(model=TOKENIZERS["patch vqgan"], losses=LossConfig(), optim=OptimConfig(lr=1e-2), seed=3)
    assert pickle.loads(pickle.dumps(task)) == task
    (first,), (again,) = task.updates(), task.updates()
    assert all(torch.equal(a, b) for a, b in zip(first.module.parameters(), again.module.parameters(), strict=True))
    assert task.where({"split": np.array(["train", "test"], object)}).tolist() == [True, False]
    pixels = list(images().permute(0, 2, 3, 1).numpy())
    arrays = task.collate({"pixels": pixels}, lambda salt: np.zeros(3))
    assert torch.equal(torch.from_numpy(arrays["images"]), images())
    engine = PlainEngine(first)
    engine.backward(engine(batch())["reconstruction"])
    engine.step(1e-2)
    task.export({"tokenizer": first.module.eval()}, str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["model"]["class"] == "PatchVQGANConfig"
    loaded = load_tokenizer(str(tmp_path))
    assert torch.equal(loaded.encode(scale(images())), first.module.tokenizer.encode(scale(images())))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_every_tokenizer_comes_back(config, tmp_path):
    tokenizer = build(config)
    save_tokenizer(tokenizer, str(tmp_path))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.config == config
    codes = tokenizer.encode(scale(images()))
    assert torch.equal(codes, loaded.encode(scale(images())))
    close(tokenizer.decode(codes), loaded.decode(codes))


def test_the_stage_writes_codes_in_raster_order(tmp_path):
    tokenizer = build(TOKENIZERS["patch vqgan"])
    save_tokenizer(tokenizer, str(tmp_path))
    stage = pickle.loads(pickle.dumps(Encode(str(tmp_path))))
    assert isinstance(stage, Stage)
    stage.setup()
    columns = stage({"pixels": list(images().permute(0, 2, 3, 1).numpy())})
    assert list(columns) == list(stage.writes) == ["codes"]
    assert np.array_equal(np.stack(columns["codes"]), tokenizer.encode(scale(images())).flatten(1).numpy())


@pytest.mark.parametrize("name", ["patch vqgan", "patch vqgan, patches alone"])
def test_a_code_is_of_its_own_patch_alone_where_it_is_asked_for(name):
    tokenizer, pictures = build(TOKENIZERS[name]), scale(images())
    other = pictures.clone()
    other[:, :, 2:4, 4:6] = -other[:, :, 2:4, 4:6]
    with torch.no_grad():
        moved = (tokenizer.encoder(functional.pixel_unshuffle(other, 2)) !=
                 tokenizer.encoder(functional.pixel_unshuffle(pictures, 2))).any(1)  # fmt: skip
    assert moved[:, 1, 2].all()
    moved[:, 1, 2] = False
    assert moved.any() == (name == "patch vqgan")


def test_wrong_sizes_are_told():
    with pytest.raises(ValueError, match="has a middle"):
        PatchVQGANConfig(encoder_kernel=2)
    with pytest.raises(ValueError, match="groups"):
        VQGANConfig(channels=30)
    with pytest.raises(ValueError, match="groups"):
        PatchVQGANConfig(channels=30)
    with pytest.raises(ValueError, match="levels"):
        FiniteScalarConfig(levels=(1, 4))
    with pytest.raises(ValueError, match="codes"):
        CodebookConfig(size=1)


def test_pixels_are_as_a_feed_resizes_them(tmp_path):
    tokenizer = build_tokenizer(PixelsConfig(size=(8, 16)))
    pictures = images(size=(16, 32))
    values = tokenizer.encode(scale(pictures))
    assert tokenizer.space((16, 32)) == Space((3, 8, 16), bound=1.0)
    for own, picture in zip(values, pictures, strict=True):
        fed = torch.from_numpy(resized(picture.permute(1, 2, 0).numpy(), (8, 16)).copy()).permute(2, 0, 1)
        assert (own - scale(fed)).abs().max() <= 2.1 / 127.5, "that one rounds after rows, and after columns"
        assert (own - scale(fed)).abs().mean() <= 0.5 / 127.5
    assert torch.equal(tokenizer.encode(values), values)
    assert torch.equal(tokenizer.decode(values * 3), (values * 3).clamp(-1, 1))
    save_tokenizer(tokenizer, str(tmp_path))
    assert torch.equal(load_tokenizer(str(tmp_path)).encode(scale(pictures)), values)
    with pytest.raises(ValueError, match="16x16 have other proportions than 8x16"):
        tokenizer.space((16, 16))
    with pytest.raises(ValueError, match="at least a pixel"):
        PixelsConfig(size=(0, 8))
