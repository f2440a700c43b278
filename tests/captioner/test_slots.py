import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner import slots
from captioner.slots import greedy

SEP, VOCABULARY, PATCHES = 5, 60, 17


def make_decoder(hidden, layers, seed=0):
    """Random weights, large enough that captions differ from row to row and end at many lengths."""
    torch.manual_seed(seed)
    config = transformers.BlipTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        encoder_hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        initializer_range=0.3 if hidden < 256 else 0.05,  # with more, fp32 itself errs by whole logits at twelve layers
        max_position_embeddings=64,
        bos_token_id=1,
        sep_token_id=SEP,
    )
    return transformers.BlipTextLMHeadModel(config).eval()


@pytest.fixture(scope="module")
def decoder():
    return make_decoder(64, 3)


@pytest.fixture(scope="module")
def features():
    return torch.randn(23, PATCHES, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def generated(decoder, features, prompt, fewest, most):
    """What transformers says of one picture."""
    ids = torch.tensor([prompt])
    output = decoder.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        encoder_hidden_states=features[None],
        encoder_attention_mask=torch.ones(1, len(features), dtype=torch.long),
        do_sample=False,
        num_beams=1,
        max_new_tokens=most,
        min_new_tokens=min(fewest, most),
        eos_token_id=SEP,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    return output[: output.index(SEP)] if SEP in output else output


prompts = st.lists(st.integers(6, VOCABULARY - 1), max_size=9).map(lambda tokens: [1, *tokens])
rows = st.lists(st.tuples(prompts, st.integers(3, 30)), min_size=1, max_size=23)


@settings(deadline=None, max_examples=25)
@given(rows=rows, slots=st.integers(1, 9), fewest=st.integers(0, 3))
def test_every_row_says_what_it_says_alone(decoder, features, rows, slots, fewest):
    asked, most = [prompt for prompt, _ in rows], [bound for _, bound in rows]
    said, _ = greedy(decoder, features[: len(rows)], asked, sep=SEP, fewest=fewest, most=most, slots=slots)
    assert said == [
        generated(decoder, features[row], prompt, fewest, bound) for row, (prompt, bound) in enumerate(rows)
    ]


@pytest.mark.timeout(120)
def test_on_a_decoder_of_published_depth_and_width():
    """Where errors of padding and place have twelve layers to grow in."""
    decoder = make_decoder(768, 12)
    features = torch.randn(10, PATCHES, 768, generator=torch.Generator().manual_seed(2))
    asked = [[1, *range(6, 6 + row % 5)] for row in range(10)]
    said, _ = greedy(decoder, features, asked, sep=SEP, fewest=1, most=[20] * 10, slots=4)
    alone = [generated(decoder, features[row], prompt, 1, 20) for row, prompt in enumerate(asked)]
    assert said == alone
    assert len({tuple(tokens) for tokens in said}) > 5, "captions that are all alike would show nothing"
    padded = [[1, *[0] * (4 - len(prompt) + 1), *prompt[1:]] for prompt in asked]
    assert greedy(decoder, features, padded, sep=SEP, fewest=1, most=[20] * 10)[0] != said


def test_logp_is_the_mean_over_tokens_and_end(decoder, features):
    asked = [[1, 7, 9], [1], [1, 8]]
    said, logp = greedy(decoder, features[:3], asked, sep=SEP, fewest=1, most=[12] * 3, slots=2)
    for row, (prompt, tokens) in enumerate(zip(asked, said, strict=True)):
        whole = [*tokens, SEP][:12]
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *whole]])
            every = decoder(ids, encoder_hidden_states=features[row : row + 1], use_cache=False).logits[0]
        chances = every.float().log_softmax(-1)
        mean = sum(float(chances[len(prompt) - 1 + i, token]) for i, token in enumerate(whole)) / len(whole)
        assert logp[row] == pytest.approx(mean, abs=1e-4)


def test_rows_that_end_make_room(decoder, features, monkeypatch):
    """No step takes more rows than there are slots, and the last steps take only those that are left."""
    sizes = []
    step = slots._Slots.step
    monkeypatch.setattr(slots._Slots, "step", lambda self, tokens: sizes.append(len(tokens)) or step(self, tokens))
    most = [30 if row % 8 == 0 else 2 for row in range(23)]
    greedy(decoder, features, [[1]] * 23, sep=VOCABULARY - 1, fewest=30, most=most, slots=8)
    assert max(sizes) == 8
    assert sizes[-1] <= 3
    assert len(sizes) < 60, "fixed batches of 8 would take three times 30 steps"


def test_one_token_is_a_caption(decoder, features):
    said, logp = greedy(decoder, features[:4], [[1]] * 4, sep=SEP, fewest=0, most=[1] * 4)
    assert all(len(tokens) <= 1 for tokens in said)
    assert all(value <= 0 for value in logp)
