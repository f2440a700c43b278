"""DALL-E 2's way, small: a vector is drawn twice and judged, then values that hear it; and the rules of a chain."""

import numpy as np
import pytest
import torch

from t2i.chain import PICTURE, Link, paint
from t2i.conditions.hearing import Conditions
from t2i.conditions.labels import LabelConfig
from t2i.conditions.pictures import SmallerConfig
from t2i.conditions.vectors import VectorConfig
from t2i.diffusion.prior import DiffusionPrior, DiffusionSampling
from t2i.diffusion.process import Process
from t2i.diffusion.samplers import invert
from t2i.diffusion.schedules import Betas, Flow
from t2i.protocol import Asked, Space, Start
from t2i.random import child, keys_of
from tests.t2i.house.spot import Net, Spot, asker, falls, moments, normal, trained

LABEL = LabelConfig(labels=("left", "right"), drop=0.1)
EMBEDDING = VectorConfig(name="embedding", size=2, drop=0.1)
MEANS = torch.tensor([[-1.0, 0.5], [1.0, 0.5]])
A = torch.tensor([[0.8, 0.3], [-0.2, 0.6]])
SEEN = SmallerConfig(size=(2, 2), blur=2.0)
WIDTH = 64


def embedding_data(rows, draw):
    label = rows % 2
    return {
        "values": MEANS.numpy()[label] + 0.4 * normal(rows, 0, 2),
        "label": label.astype(np.int64),
        "dropped_label": draw("drop/label") < 0.1,
    }


def value_data(rows, draw):
    """x = A e + 0.3 epsilon, given e."""
    told = embedding_data(rows, draw)
    e = told.pop("values")
    dropped = {"dropped_embedding": draw("drop/embedding") < 0.1}
    return {"values": e @ A.numpy().T + 0.3 * normal(rows, 1, 2), "embedding": e, **dropped, **told}


def embedding_prior():
    space = Space((2,))
    process = Process(schedule=Betas(shape="cosine", steps=200), prediction="x0")
    return DiffusionPrior(Net(2, times=200.0), process, space, Conditions((LABEL,), WIDTH, space, {"vector"}))


def value_prior():
    space = Space((2,))
    process = Process(schedule=Flow(), prediction="velocity")
    return DiffusionPrior(Net(2), process, space, Conditions((LABEL, EMBEDDING), WIDTH, space, {"vector"}))


def spots():
    return {"embedding": Spot(embedding_prior, embedding_data), "values": Spot(value_prior, value_data)}


@pytest.fixture(scope="module")
def both():
    return {name: trained(spot) for name, spot in spots().items()}


def links(both, **second):
    first = Link(
        both["embedding"][0], asker(LABEL), DiffusionSampling(steps=25, sampler="dpm_solver_2m"), id="embedding",
        candidates=2, judge=lambda values, pictures, told: (values * values.new_tensor([0.0, 1.0])).sum(1),
    )  # fmt: skip
    return [
        first,
        Link(
            both["values"][0], asker(LABEL, EMBEDDING), DiffusionSampling(steps=20, sampler="heun"), id="values",
            given={"embedding": "embedding"}, **second,
        ),
    ]  # fmt: skip


def told_of(count):
    return {"class_label": [LABEL.labels[row % 2] for row in range(count)]}


def test_both_links_learn(both):
    assert falls(both["embedding"][1], "error", to=0.8)
    assert falls(both["values"][1], "error", to=0.8)


def test_what_is_painted_has_the_known_moments(both):
    """Of two draws the one that lies higher is kept: its second number has the mean and deviation of that maximum."""
    count = 2000
    seeds = list(range(count))
    two = links(both)
    painted = paint(two, told_of(count), seeds)
    for label in range(2):
        mean, covariance = moments(painted.values[label::2])
        higher = MEANS[label] + torch.tensor([0.0, 0.4 / np.pi**0.5])
        spread = torch.diag(torch.tensor([0.4**2, 0.4**2 * (1 - 1 / np.pi)]))
        torch.testing.assert_close(mean, (A @ higher).double(), rtol=0, atol=0.1)
        wanted = A @ spread @ A.T + 0.09 * torch.eye(2)
        torch.testing.assert_close(covariance, wanted.double(), rtol=0, atol=0.06)


def test_a_row_depends_on_its_seed_alone(both):
    two = links(both)
    together = paint(two, told_of(8), list(range(8))).values
    alone = torch.cat([paint(two, {"class_label": [LABEL.labels[row % 2]]}, [row]).values for row in range(8)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert not torch.allclose(together, paint(two, told_of(8), list(range(8, 16))).values)


def test_an_embedding_that_is_brought_is_heard(both):
    two, seeds = links(both), list(range(1000))
    e = MEANS[torch.arange(1000) % 2] + torch.tensor([0.2, -0.3])
    painted = paint(two, told_of(1000), seeds, {"embedding": e}).values
    mean, covariance = moments(painted - e @ A.T)
    torch.testing.assert_close(mean, torch.zeros(2).double(), rtol=0, atol=0.1)
    assert covariance.diagonal().sqrt().sub(0.3).abs().max() < 0.06
    assert paint(two[1:], told_of(9), seeds[:9], {"embedding": e[:9]}).values.shape == (9, 2)


class Echo:
    """A prior that tells what it was asked."""

    def __init__(self, shape=(2,)):
        self.space, self.calls = Space(shape), []

    def sample(self, asked, seeds, sampling, start=None):
        self.calls.append((asked, list(seeds), start))
        chances = [seed % 1009 / 1009 for seed in seeds]
        return torch.tensor(chances).view(-1, *[1] * len(self.space.shape)).expand(-1, *self.space.shape).clone()


class Doubled:
    """A tokenizer whose values are half of the picture's."""

    decodes = True

    def encode(self, images):
        return images[:, 0, 0, :2] / 2

    def decode(self, values):
        return (values * 2).view(-1, 1, 1, 2).expand(-1, 3, 2, 2)


def echo(ask=asker(), sampling=None, **options):  # noqa: B008 - it has no state
    return Link(Echo(), ask, sampling, **options)


def test_what_is_brought_wins_over_what_is_drawn():
    first, second = echo(id="a"), echo(asker(EMBEDDING), id="b", given={"embedding": "a"})
    own = torch.ones(3, 2)
    painted = paint([first, second], {}, [1, 2, 3], {"a": own})
    assert not first.prior.calls
    assert torch.equal(second.prior.calls[0][0].batch["embedding"], own)
    assert painted.pictures is None
    paint([first, second], {}, [1, 2, 3], {"embedding": own * 2})
    assert torch.equal(second.prior.calls[1][0].batch["embedding"], own * 2)
    assert len(first.prior.calls) == 1
    with pytest.raises(ValueError, match="nothing was drawn or brought"):
        paint([second], {}, [1, 2, 3])


def test_a_link_hears_what_was_drawn_last_else_the_encoding_of_the_last_picture():
    tokenizer = Doubled()
    links = [
        echo(tokenizer=tokenizer, id="a"),
        echo(tokenizer=tokenizer, id="a"),
        echo(asker(EMBEDDING), tokenizer=tokenizer, id="c", given={"embedding": "a"}),
        echo(asker(SEEN), tokenizer=tokenizer, id="d", given={"smaller": PICTURE}),
    ]
    painted = paint(links, {}, [5, 6])
    seeds = [link.prior.calls[0][1] for link in links]
    assert len({tuple(each) for each in seeds}) == 4
    drawn = [Echo().sample(None, each, None) for each in seeds]
    assert torch.equal(links[2].prior.calls[0][0].batch["embedding"], drawn[1])
    seen = links[3].prior.calls[0][0].batch["smaller"].float() / 127.5 - 1
    torch.testing.assert_close(seen, tokenizer.decode(drawn[2]).clamp(-1, 1), rtol=0, atol=0.01)
    assert torch.equal(painted.pictures, tokenizer.decode(painted.values))
    encoding = [links[0], echo(asker(EMBEDDING), id="b", given={"embedding": "d"}), links[3]]
    paint(encoding, {}, [5, 6])
    heard = encoding[1].prior.calls[0][0].batch["embedding"]
    assert torch.equal(heard, tokenizer.encode(tokenizer.decode(drawn[0])))


def test_a_condition_that_sees_is_given_the_picture():
    link = echo(asker(SEEN), id="b", given={"smaller": PICTURE})
    paint([echo(tokenizer=Doubled(), id="a"), link], {}, [3, 900])
    seen = link.prior.calls[0][0].batch["smaller"]
    assert seen.dtype == torch.uint8
    assert seen.shape == (2, 3, 2, 2)
    assert seen[0].float().mean() != seen[1].float().mean()


def test_the_best_candidate_of_each_row_is_kept_and_seeds_are_those_of_link_and_candidate():
    link = echo(candidates=4, judge=lambda values, pictures, told: -values[:, 0])
    painted = paint([link], {}, [1, 2, 3])
    keys = keys_of([1, 2, 3])
    seeds = [[1, 2, 3], *(child(keys, "link", 0, candidate).tolist() for candidate in range(1, 4))]
    assert [call[1] for call in link.prior.calls] == seeds
    every = torch.stack([Echo().sample(None, each, None) for each in seeds])
    assert torch.equal(painted.values, every.min(dim=0).values)
    seen = []

    def judging(values, pictures, told):
        seen.append((values, pictures, told))
        return torch.zeros(3)

    tied = echo(candidates=3, judge=judging, tokenizer=Doubled())
    first = paint([tied], {"caption": ["a", "b", "c"]}, [1, 2, 3]).values
    assert torch.equal(first, seen[0][0])
    for values, pictures, told in seen:
        assert torch.equal(pictures, tied.tokenizer.decode(values))
        assert told["caption"] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="judge"):
        echo(candidates=2)
    with pytest.raises(ValueError, match="at least one link"):
        paint([], {}, [1])


def test_a_picture_that_is_told_is_heard_until_one_is_drawn():
    own = np.full((2, 2, 3), 7, np.uint8)
    told = {"pixels": [own, own]}
    hearing = [echo(asker(SEEN), id=name, given={"smaller": PICTURE}, tokenizer=Doubled()) for name in "ab"]
    paint(hearing, told, [1, 2])
    first, second = (link.prior.calls[0][0].batch["smaller"] for link in hearing)
    assert (first == 7).all()
    assert not torch.equal(first, second)
    paint(hearing[:1], told, [1, 2], {"smaller": torch.ones(2, 3, 2, 2)})
    assert (hearing[0].prior.calls[1][0].batch["smaller"] == 255).all()
    with pytest.raises(ValueError, match="nothing was drawn or brought"):
        paint(hearing[:1], {}, [1, 2])


def test_what_was_inverted_is_drawn_again(both):
    """DDIM backwards, then a Start of the noise that came of it: other words change what is drawn."""
    prior, e = both["values"][0], torch.zeros(64, 2)
    own, many = prior.space.shape, 64
    sampling = DiffusionSampling(steps=50)
    values = 0.3 * torch.from_numpy(normal(np.arange(many), 7, *own))
    asked = asker(LABEL, EMBEDDING)(told_of(many), range(many), (), {"embedding": e})
    noise = invert(prior.process, prior.denoiser(asked, sampling), values, prior.ladder(sampling))
    assert noise.std() > 2 * values.std()
    link = Link(prior, asker(LABEL, EMBEDDING), sampling, id="values", given={"embedding": "e"})
    start = {"values": Start(noise, at=prior.process.schedule.first, noised=True)}
    again = paint([link], told_of(many), range(many), {**start, "embedding": e}).values
    torch.testing.assert_close(again, values, rtol=0, atol=0.05)
    moved = paint([link], told_of(many), range(many), {**start, "embedding": e + 2}).values
    assert (moved - values).abs().mean() > 0.3


def test_a_link_that_stops_leaves_the_rest_to_the_next(both):
    """Two halves of one ladder are the whole ladder, where the sampler draws nothing of its own."""
    prior, seeds = both["values"][0], [4, 5, 6]
    e, told = torch.zeros(3, 2), told_of(3)

    def link(**sampling):
        asking = asker(LABEL, EMBEDDING)
        return Link(prior, asking, DiffusionSampling(steps=10, **sampling), id="values", given={"embedding": "e"})

    asked = asker(LABEL, EMBEDDING)(told, seeds, (), {"embedding": e})
    whole = prior.sample(asked, seeds, DiffusionSampling(steps=10))
    parts = paint([link(stops=0.5), link()], told, seeds, {"embedding": e}).values
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


def test_what_a_link_left_over_wins_over_a_start_but_what_that_keeps_is_kept():
    """Image-to-image and inpainting with a base and a refiner."""
    stopping = DiffusionSampling(steps=4, stops=0.5)
    base, refiner = echo(sampling=stopping, id="a"), echo(id="a")
    begin, keep = torch.full((2, 2), 7.0), torch.tensor([True, False])
    paint([base, refiner], {}, [1, 2], {"a": Start(begin, at=0.9)})
    left = Echo().sample(None, base.prior.calls[0][1], None)
    assert base.prior.calls[0][2].at == 0.9
    start = refiner.prior.calls[0][2]
    assert (start.at, start.noised, start.keep) == (0.5, True, None)
    assert torch.equal(start.values, left)
    paint([base, refiner], {}, [1, 2], {"a": Start(begin, keep=keep)})
    start = refiner.prior.calls[1][2]
    assert (start.at, start.noised) == (0.5, True)
    assert torch.equal(start.keep, keep)
    assert torch.equal(start.values, torch.where(keep, begin, left))


def test_what_is_left_over_is_for_the_next_link_of_that_space():
    stopping = DiffusionSampling(steps=4, stops=0.5)
    for links, said in (
        ([echo(sampling=stopping, id="a"), echo(id="b")], "draws in the space 'b'"),
        ([echo(id="a"), echo(sampling=stopping, id="a")], "nobody goes on"),
    ):
        with pytest.raises(ValueError, match=said):
            paint(links, {}, [1, 2])
        assert not links[0].prior.calls
    whole = torch.ones(2, 2)
    assert torch.equal(paint([echo(sampling=stopping, id="a")], {}, [1, 2], {"a": whole}).values, whole)
    with pytest.raises(ValueError, match="no link draws there"):
        paint([echo(id="a")], {}, [1, 2], {"b": Start(whole)})


def test_a_chain_begins_after_the_last_space_that_is_brought_whole():
    tokenizer, own = Doubled(), torch.rand(2, 2)
    links = [echo(id="a"), echo(id="b", tokenizer=tokenizer), echo(asker(EMBEDDING), id="c", given={"embedding": "b"})]
    painted = paint(links, {}, [1, 2], {"b": own})
    assert not links[0].prior.calls + links[1].prior.calls
    assert torch.equal(links[2].prior.calls[0][0].batch["embedding"], own)
    assert torch.equal(painted.pictures, tokenizer.decode(own))
    first = echo(asker(EMBEDDING), id="c", given={"embedding": "a"})
    paint([*links[:2], first], {}, [1, 2], {"a": own * 2, "b": own})
    assert torch.equal(first.prior.calls[0][0].batch["embedding"], own * 2)


def test_a_condition_that_no_space_is_given_hears_what_is_brought():
    link, own = echo(asker(EMBEDDING), id="b"), torch.ones(3, 2)
    paint([link], {}, [1, 2, 3], {"embedding": own})
    assert torch.equal(link.prior.calls[0][0].batch["embedding"], own)


def test_negative_prompts_are_for_links_that_are_guided():
    heard = []

    def asking(told, seeds, negative=(), given=None):
        heard.append(list(negative))
        return Asked(len(seeds))

    guided = echo(asking, DiffusionSampling(guidance=3.0), id="a")
    paint([guided, echo(asking, id="b")], {}, [1], negative=["blurred"])
    assert heard == [["blurred"], []]
    with pytest.raises(ValueError, match="no link is guided"):
        paint([echo(asking, id="b")], {}, [1], negative=["blurred"])


def test_a_start_is_noised_and_kept(both):
    prior, seeds = both["values"][0], list(range(400))
    e, told = MEANS[torch.arange(400) % 2], told_of(400)
    asked = asker(LABEL, EMBEDDING)(told, seeds, (), {"embedding": e})
    begin = torch.full((400, 2), 0.4)
    near = prior.sample(asked, seeds, DiffusionSampling(steps=20), Start(begin, at=0.1))
    far = prior.sample(asked, seeds, DiffusionSampling(steps=20), Start(begin, at=0.9))
    assert (near - begin).abs().mean() < 0.2 < (far - begin).abs().mean()
    keep = torch.tensor([True, False])
    held = prior.sample(asked, seeds, DiffusionSampling(steps=20), Start(begin, keep=keep))
    assert torch.equal(held[:, 0], begin[:, 0])
    assert held[:, 1].std() > 0.1


def test_guidance_moves_a_drawn_class_further(both):
    prior, seeds = both["embedding"][0], list(range(600))
    asked = asker(LABEL)(told_of(600), seeds)
    plain, strong = (
        prior.sample(asked, seeds, DiffusionSampling(steps=20, guidance=scale))[::2, 0].mean() for scale in (1.0, 3.0)
    )
    assert plain == pytest.approx(-1.0, abs=0.15)
    assert strong < plain - 0.1
