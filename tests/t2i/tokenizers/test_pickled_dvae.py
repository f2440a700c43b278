"""OpenAI's pickled modules become a tokenizer, and nothing else that a pickle may ask for comes about."""

import sys
import warnings
from collections import OrderedDict
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional

from t2i.pixels import scale
from t2i.tokenizers import likelihood
from t2i.tokenizers.dvae import DVAEConfig
from t2i.tokenizers.gumbel import GumbelConfig
from t2i.tokenizers.pickled_dvae import load_pickled
from t2i.tokenizers.published import PublishedConfig
from t2i.tokenizers.task import load_tokenizer
from tests import kills

CODES, WIDTH = 24, 8  # codes, and channels of the decoder's first convolution


class Conv2d(nn.Module):
    def __init__(self, before, after, kernel):
        super().__init__()
        self.n_in, self.n_out, self.kw, self.device, self.use_float16 = before, after, kernel, torch.device("cpu"), True
        self.w = nn.Parameter(torch.randn(after, before, kernel, kernel) * 0.2, requires_grad=False)
        self.b = nn.Parameter(torch.randn(after) * 0.2, requires_grad=False)

    def forward(self, x):
        return functional.conv2d(x, self.w, self.b, padding=self.kw // 2)


class EncoderBlock(nn.Module):
    kernels = (3, 3, 3, 1)

    def __init__(self, before, after, depth):
        super().__init__()
        self.post_gain = 1 / depth**2
        self.id_path = Conv2d(before, after, 1) if before != after else nn.Identity()
        widths, parts = [before, *[after // 4] * 3, after], OrderedDict()
        for number, (ends, kernel) in enumerate(zip(pairwise(widths), self.kernels, strict=True), 1):
            parts[f"relu_{number}"], parts[f"conv_{number}"] = nn.ReLU(), Conv2d(*ends, kernel)
        self.res_path = nn.Sequential(parts)

    def forward(self, x):
        return self.id_path(x) + self.post_gain * self.res_path(x)


class DecoderBlock(EncoderBlock):
    kernels = (1, 3, 3, 3)


class Encoder(nn.Module):
    block, first, last, between = EncoderBlock, (3, 8, 7), (16, CODES, 1), ("pool", lambda: nn.MaxPool2d(kernel_size=2))
    widths = (8, 8, 16)

    def __init__(self):
        super().__init__()
        parts = OrderedDict(input=Conv2d(*self.first))
        for number, (before, after) in enumerate(pairwise(self.widths), 1):
            blocks = {f"block_{i}": self.block(before if i == 1 else after, after, 4) for i in (1, 2)}
            beyond = {} if number == 2 else {self.between[0]: self.between[1]()}
            parts[f"group_{number}"] = nn.Sequential(OrderedDict(blocks | beyond))
        parts["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(*self.last)))
        self.blocks = nn.Sequential(parts)

    def forward(self, x):
        return self.blocks(x)


class Decoder(Encoder):
    block, first, last = DecoderBlock, (CODES, WIDTH, 1), (8, 6, 1)
    between = "upsample", lambda: nn.Upsample(scale_factor=2, mode="nearest")
    widths = (WIDTH, 16, 8)


@pytest.fixture
def pickled(tmp_path, monkeypatch):
    """The files, as of modules of the package dall_e, and the modules."""
    places = {
        "dall_e.utils": [Conv2d],
        "dall_e.encoder": [EncoderBlock, Encoder],
        "dall_e.decoder": [DecoderBlock, Decoder],
    }
    for place, classes in {"dall_e": [], **places}.items():
        module = ModuleType(place)
        for each in classes:
            monkeypatch.setattr(each, "__module__", place)
            setattr(module, each.__name__, each)
        monkeypatch.setitem(sys.modules, place, module)
    torch.manual_seed(0)
    encoder, decoder = Encoder().eval(), Decoder().eval()
    torch.save(encoder, tmp_path / "encoder.pkl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for the sources
        torch.save(decoder, tmp_path / "decoder.pkl", _use_new_zipfile_serialization=False)  # as before torch 1.6
    for place in ("dall_e", *places):
        monkeypatch.delitem(sys.modules, place)
    return tmp_path, encoder, decoder


def pictures():
    return scale(torch.randint(256, (2, 3, 8, 12), generator=torch.Generator().manual_seed(2), dtype=torch.uint8))


@torch.no_grad()
def alike(ours, encoder, decoder):
    logits = encoder(likelihood.squeezed(pictures()))
    torch.testing.assert_close(ours.hidden(pictures()), logits, rtol=1e-5, atol=1e-5)
    codes = ours.encode(pictures())
    assert torch.equal(codes, logits.argmax(1))
    said = decoder(functional.one_hot(codes, CODES).permute(0, 3, 1, 2).float())
    torch.testing.assert_close(ours.reconstruct(ours.quantizer.lookup(codes)), said, rtol=1e-5, atol=1e-5)


def test_the_pickles_become_a_dvae(pickled):
    folder, encoder, decoder = pickled
    ours = load_pickled(folder / "encoder.pkl", folder / "decoder.pkl")
    quantizer = GumbelConfig(size=CODES, width=WIDTH)
    assert ours.config == DVAEConfig(channels=8, multipliers=(1, 2), blocks=2, quantizer=quantizer)
    alike(ours, encoder, decoder)
    assert "dall_e" not in sys.modules


def test_the_command_wants_trust(pickled, tmp_path):
    from workflows.options import recipe_options

    folder, encoder, decoder = pickled
    line = ["convert_dvae", "--encoder", f"{folder}/encoder.pkl", "--decoder", f"{folder}/decoder.pkl"]
    line += ["--out", f"{tmp_path}/dvae"]
    code, _, said = kills.here(*line)
    assert code == 1
    assert "are pickles, which may run code" in said
    assert not (tmp_path / "dvae").exists()
    code, told, said = kills.here(*line, "--trust", "--json")
    assert code == 0, said
    assert told == {"tokenizer": f"{tmp_path}/dvae", "codes": CODES}
    alike(load_tokenizer(f"{tmp_path}/dvae"), encoder, decoder)
    recipe = recipe_options(["debug", "--tokenizer", f"{tmp_path}/dvae"], "plan").recipe
    assert recipe.tokenizer.model == PublishedConfig(path=f"{tmp_path}/dvae")
    alike(recipe.tokenizer.model.build().eval(), encoder, decoder)
    code, _, said = kills.here(*line, "--trust")
    assert (code, "is there already" in said) == (1, True)


class Evil:
    def __reduce__(self):
        return (print, ("this ran",))


def test_nothing_else_comes_of_a_pickle(pickled, capfd):
    folder, encoder, _ = pickled
    whole, other = folder / "encoder.pkl", folder / "other.pkl"
    for held in (Evil(), {"a": Evil()}, nn.Linear(2, 2)):
        torch.save(held, other)
        with pytest.raises(ValueError, match=r"other\.pkl cannot be read as the decoder of OpenAI's dVAE"):
            load_pickled(whole, other)
    assert "this ran" not in capfd.readouterr().out
    torch.save(dict(encoder.state_dict()), other)
    with pytest.raises(ValueError, match=r"is not the decoder of OpenAI's dVAE: it holds a dict"):
        load_pickled(whole, other)
    with pytest.raises(ValueError, match=r"encoder\.pkl lack \d+ weights of a dVAE like this"):
        load_pickled(whole, whole)
    with pytest.raises(FileNotFoundError):
        load_pickled(folder / "none.pkl", other)
