import math

import pytest
import torch

from forebay_contracts.wire.request import Sampling
from forebay_inference.engine.protocol import TokenRequest
from forebay_inference.engine.transformers.sampling import TokenChooser, choose, gumbel_noise

VOCABULARY = 1000
CPU = torch.device("cpu")


def chooser(sampling: Sampling, generated: tuple[int, ...] = (), prompt: tuple[int, ...] = (1, 2)) -> TokenChooser:
    return TokenChooser(TokenRequest("r", prompt, 1, sampling, "seed:0", generated=generated), VOCABULARY, CPU)


def draw(chooser: TokenChooser, scores: torch.Tensor) -> int:
    row = scores.clone().unsqueeze(0)
    choose([(0, chooser)], row)
    return int(row[0].argmax())


def test_draws_follow_the_softmax() -> None:
    scores = torch.full((VOCABULARY,), -math.inf)
    scores[[3, 5, 7]] = torch.log(torch.tensor([0.6, 0.3, 0.1]))
    sampler = chooser(Sampling())
    counts = {3: 0, 5: 0, 7: 0}
    for _ in range(3000):
        token = draw(sampler, scores)
        counts[token] += 1
        sampler.accept(token)
    assert [counts[token] / 3000 for token in (3, 5, 7)] == pytest.approx([0.6, 0.3, 0.1], abs=0.03)


def test_noise_is_gumbel() -> None:
    noise = gumbel_noise([(1, 2), (3, 4)], 50_000, CPU)
    assert noise.mean(dim=1).tolist() == pytest.approx([0.5772, 0.5772], abs=0.02)
    assert noise.var(dim=1).tolist() == pytest.approx([math.pi**2 / 6] * 2, abs=0.06)
    assert abs(float(torch.corrcoef(noise)[0, 1])) < 0.02


def test_noise_is_always_finite() -> None:
    # Every token of every request draws one of these for each word of the vocabulary: one in 2^24 comes soon.
    assert torch.isfinite(gumbel_noise([(key, 7) for key in range(8)], 8_000_000, CPU)).all()


def test_a_sequence_taken_up_again_draws_as_it_would_have() -> None:
    sampling = Sampling(frequency_penalty=0.5, presence_penalty=0.2, repetition_penalty=1.2, top_p=0.95, min_p=0.001)
    torch.manual_seed(0)
    rows = torch.randn(12, VOCABULARY) * 3
    first = chooser(sampling)
    tokens = []
    for row in rows:
        tokens.append(draw(first, row))
        first.accept(tokens[-1])
    again = chooser(sampling, generated=tuple(tokens[:5]))
    for row, token in zip(rows[5:], tokens[5:], strict=True):
        assert draw(again, row) == token
        again.accept(token)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.01, 5.0])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, spread: float) -> None:
    torch.manual_seed(1)
    scores = torch.randn(VOCABULARY) * spread
    narrowed = scores.clone()
    chooser(Sampling(top_p=top_p)).narrow(narrowed)
    kept = torch.isfinite(narrowed)
    mass = torch.softmax(scores, -1)
    assert float(mass[kept].sum()) >= top_p - 1e-5
    assert float(mass[kept].sum() - mass[kept].min()) < top_p + 1e-5
    assert scores[kept].min() > scores[~kept].max()


def test_top_k_and_min_p_cut() -> None:
    scores = torch.arange(VOCABULARY, dtype=torch.float32) / 10
    narrowed = scores.clone()
    chooser(Sampling(top_k=5)).narrow(narrowed)
    assert int(torch.isfinite(narrowed).sum()) == 5
    narrowed = scores.clone()
    chooser(Sampling(min_p=0.5)).narrow(narrowed)
    assert int(torch.isfinite(narrowed).sum()) == 7


def test_penalties_are_those_of_the_reference() -> None:
    scores = torch.ones(VOCABULARY)
    scores[4] = -1
    adjusted = scores.clone()
    chooser(Sampling(frequency_penalty=0.5, presence_penalty=0.25), generated=(7, 7, 8)).adjust(adjusted)
    assert adjusted[[6, 7, 8]].tolist() == [1, 1 - 2 * 0.5 - 0.25, 1 - 0.5 - 0.25]
    adjusted = scores.clone()
    chooser(Sampling(repetition_penalty=2), generated=(7,), prompt=(3, 4)).adjust(adjusted)
    assert adjusted[[3, 4, 7, 8]].tolist() == [0.5, -2, 0.5, 1]


def test_a_greedy_row_is_left_alone_beside_sampled_ones() -> None:
    scores = torch.randn(2, VOCABULARY)
    before = scores[0].clone()
    choose([(0, chooser(Sampling(temperature=0))), (1, chooser(Sampling()))], scores)
    assert torch.equal(scores[0], before)
