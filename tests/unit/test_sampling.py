import math

import pytest
import torch

from forebay_contracts.wire.request import Sampling
from forebay_inference.engine.protocol import TokenLogprob, TokenRequest
from forebay_inference.engine.transformers.penalties import Histories
from forebay_inference.engine.transformers.sampling import Row, TokenChooser, adjust, choose, gumbel_noise, narrow

VOCABULARY = 1000
CPU = torch.device("cpu")
HISTORIES = Histories(VOCABULARY, CPU)


def chooser(
    sampling: Sampling,
    generated: tuple[int, ...] = (),
    prompt: tuple[int, ...] = (1, 2),
    ends: frozenset[int] = frozenset(),
    seed: str = "seed:0",
) -> TokenChooser:
    return TokenChooser(TokenRequest("r", prompt, 1, sampling, seed, generated=generated, end_tokens=ends))


def row_of(chooser: TokenChooser, at: int = 0) -> Row:
    return Row(at, chooser, len(chooser.tokens))


def draw(chooser: TokenChooser, scores: torch.Tensor) -> int:
    return int(choose([row_of(chooser)], scores.clone().unsqueeze(0), HISTORIES)[0])


def narrowed_by(sampling: Sampling, scores: torch.Tensor) -> torch.Tensor:
    rows = scores.clone().unsqueeze(0)
    narrow([chooser(sampling)], rows)
    return rows[0]


def adjusted_by(one: TokenChooser, scores: torch.Tensor) -> torch.Tensor:
    rows = scores.clone().unsqueeze(0)
    adjust([row_of(one)], rows, HISTORIES)
    return rows[0]


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
    narrowed = narrowed_by(Sampling(top_p=top_p), scores)
    kept = torch.isfinite(narrowed)
    mass = torch.softmax(scores, -1)
    assert float(mass[kept].sum()) >= top_p - 1e-5
    assert float(mass[kept].sum() - mass[kept].min()) < top_p + 1e-5
    assert scores[kept].min() > scores[~kept].max()


def test_top_k_and_min_p_cut() -> None:
    scores = torch.arange(VOCABULARY, dtype=torch.float32) / 10
    narrowed = narrowed_by(Sampling(top_k=5), scores)
    assert int(torch.isfinite(narrowed).sum()) == 5
    narrowed = narrowed_by(Sampling(min_p=0.5), scores)
    assert int(torch.isfinite(narrowed).sum()) == 7


def test_penalties_are_those_of_the_reference() -> None:
    scores = torch.ones(VOCABULARY)
    scores[4] = -1
    adjusted = adjusted_by(chooser(Sampling(frequency_penalty=0.5, presence_penalty=0.25), (7, 7, 8)), scores)
    assert adjusted[[6, 7, 8]].tolist() == [1, 1 - 2 * 0.5 - 0.25, 1 - 0.5 - 0.25]
    adjusted = adjusted_by(chooser(Sampling(repetition_penalty=2), (7,), (3, 4)), scores)
    assert adjusted[[3, 4, 7, 8]].tolist() == [0.5, -2, 0.5, 1]


def test_a_greedy_row_is_left_alone_beside_sampled_ones() -> None:
    scores = torch.randn(2, VOCABULARY)
    before = scores[0].clone()
    tokens = choose([row_of(chooser(Sampling(temperature=0))), row_of(chooser(Sampling()), 1)], scores, HISTORIES)
    assert torch.equal(scores[0], before)
    assert tokens[0] == before.argmax()


ASKED = [
    Sampling(temperature=0),
    Sampling(),
    Sampling(temperature=0.7, top_k=3),
    Sampling(top_p=0.4, min_p=0.01),
    Sampling(temperature=0, logit_bias={5: 100.0, 6: 99.0}),
    Sampling(temperature=1.5, top_k=900, top_p=0.999, logprobs=3, frequency_penalty=0.5),
    Sampling(temperature=0, repetition_penalty=1.3, logprobs=0),
    Sampling(presence_penalty=1.0, min_tokens=3),
    Sampling(temperature=0, min_tokens=30),
]


def test_a_row_gets_what_it_gets_alone() -> None:
    """In each of twelve passes, whatever other rows ask and wherever it stands among them."""
    torch.manual_seed(3)
    ends = frozenset({1, 2, 3})
    together = [chooser(sampling, ends=ends, seed=str(n)) for n, sampling in enumerate(ASKED)]
    alone = [chooser(sampling, ends=ends, seed=str(n)) for n, sampling in enumerate(ASKED)]
    for number in range(12):
        scores = torch.randn(len(ASKED), VOCABULARY) * 3
        order = torch.randperm(len(ASKED)).tolist()
        rows = [row_of(together[who], at) for at, who in enumerate(order)]
        tokens = choose(rows, scores[order], HISTORIES).tolist()
        for at, who in enumerate(order):
            assert tokens[at] == draw(alone[who], scores[who])
            position = len(alone[who].tokens)
            assert together[who].outcome(position) == alone[who].outcome(position)
            together[who].accept(tokens[at])
            alone[who].accept(tokens[at])
            assert number >= ASKED[who].min_tokens or tokens[at] not in ends


def test_log_probabilities_are_the_models_own() -> None:
    scores = torch.randn(1, VOCABULARY)
    expected = torch.log_softmax(scores[0], -1)
    one = chooser(Sampling(temperature=0, logprobs=2, logit_bias={9: 100.0}))
    choose([row_of(one)], scores, HISTORIES)
    noted = one.outcome(0)
    assert isinstance(noted, TokenLogprob)
    assert (noted.token, noted.logprob) == (9, float(expected[9]))
    best = expected.topk(2)
    assert noted.top == tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    assert one.outcome(0) is None


def test_a_token_that_was_thrown_away_is_not_counted() -> None:
    """A sequence that is taken out of the cache is computed again without the token of the pass under way."""
    one = chooser(Sampling(temperature=0, frequency_penalty=1.0))
    scores = torch.zeros(1, VOCABULARY)
    scores[0, 7] = 0.5
    assert [int(choose([Row(0, one, 0)], scores.clone(), HISTORIES)) for _ in range(2)] == [7, 7]
    # Of a token that the host does not know yet, but which counts.
    assert int(choose([Row(0, one, 1)], scores.clone(), HISTORIES)) != 7


def test_rows_of_the_tables_are_used_again() -> None:
    histories = Histories(VOCABULARY, CPU)
    scores = torch.zeros(1, VOCABULARY)
    for _ in range(20):
        choose([row_of(chooser(Sampling(frequency_penalty=1.0)))], scores.clone(), histories)
    assert len(histories._counts) == 4
