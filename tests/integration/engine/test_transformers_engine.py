"""The real engine on the real default model, quantized to NF4, all tests in one batch of one engine."""

import asyncio

import pytest
from bitsandbytes.functional import has_avx512bf16

from forebay_contracts.wire.errors import InvalidRequest
from forebay_inference.engine.events import Accepted, Tokens
from forebay_inference.engine.text.model import TextModel
from support.engine import answer, answers, chat, completion
from support.near_ties import same_or_near_tie, steps_of

pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]


# How long an answer gets depends on the processor's rounding, which decides near ties. Ends by itself well before this.
TO_ITS_END = 1000
# Computed in two ways, this is hardly in doubt.
COUNTING = "One, two, three, four, five, six, seven, eight." + " One, two, three, four, five, six, seven, eight." * 3


async def test_the_capital_of_france_is_paris_and_the_answer_ends(engine: TextModel) -> None:
    found = await answer(engine, chat(max_tokens=TO_ITS_END))
    assert "Paris" in found.text
    assert found.finish_reason == "stop"
    assert "<|im_end|>" not in found.text


async def test_a_stream_is_the_same_each_time_and_comes_in_pieces(engine: TextModel) -> None:
    await answer(engine, chat(max_tokens=1))  # the prompt is in the cache for both from here on
    first, second = await answer(engine, chat()), await answer(engine, chat())
    assert first.text == second.text == "".join(first.pieces)
    assert len(first.pieces) > 10


async def test_a_prompt_from_the_cache_gets_the_same_answer_but_for_near_ties(engine: TextModel) -> None:
    request = chat("Why does the sea look blue on a sunny day? " * 3, logprobs=5)
    first, second = await answer(engine, request), await answer(engine, request)
    assert first.cached_tokens < 32 <= second.cached_tokens
    assert same_or_near_tie(steps_of(first), steps_of(second))


async def test_requests_of_every_kind_share_the_batch(engine: TextModel) -> None:
    requests = [
        chat("Tell me about the sea.", max_tokens=16, logprobs=5),
        chat("Tell me about the sea.", max_tokens=16, temperature=1.0, seed=7),
        chat("Tell me about the sea.", max_tokens=16, temperature=0.7, top_p=0.9, top_k=40, min_p=0.05, seed=7),
        chat("Tell me about the sea.", max_tokens=16, repetition_penalty=1.3),
        chat("Tell me about the sea.", max_tokens=16, presence_penalty=1.5, frequency_penalty=1.5),
    ]
    await answer(engine, requests[0])  # the prompt is in the cache for all from here on
    alone = [await answer(engine, request) for request in requests]
    together = await asyncio.gather(*(answer(engine, request) for request in requests))
    assert same_or_near_tie(steps_of(alone[0]), steps_of(together[0]))
    if has_avx512bf16():  # without, a product of one row rounds unlike one of several: see docs/engine.md
        assert [found.tokens for found in alone] == [found.tokens for found in together]
    assert len({found.text for found in alone}) == len(requests)


async def test_a_seed_is_the_request_s_own(engine: TextModel) -> None:
    def ask(seed: int | None) -> object:
        return answer(engine, chat("Invent a name.", temperature=1.0, seed=seed, max_tokens=16))

    seven, again, eight, none, other = await asyncio.gather(*map(ask, (7, 7, 8, None, None)))
    assert seven.text == again.text
    assert len({seven.text, eight.text, none.text, other.text}) > 2


async def test_the_choices_of_one_request_differ(engine: TextModel) -> None:
    found = await answers(engine, chat("Invent a name.", temperature=1.0, seed=1, n=3, max_tokens=12))
    assert sorted(found) == [0, 1, 2]
    assert len({choice.text for choice in found.values()}) > 1


async def test_several_prompts_are_answered_in_order(engine: TextModel) -> None:
    found = await answers(engine, completion("The capital of France is", "The opposite of hot is", max_tokens=4))
    assert "Paris" in found[0].text
    assert "cold" in found[1].text


@pytest.mark.parametrize("kept", [1, 9, 20])
async def test_a_resumed_answer_goes_on_as_the_undisturbed_one(engine: TextModel, kept: int) -> None:
    """Prefill and decode round differently, which decides near ties."""
    request = completion(COUNTING, max_tokens=24, logprobs=5)
    whole = await answer(engine, request)
    rest = await answer(engine, request, {0: whole.tokens[:kept]})
    assert same_or_near_tie(steps_of(whole)[kept:], steps_of(rest))
    assert len(rest.tokens) == 24 - kept
    assert rest.finish_reason == whole.finish_reason == "length"


@pytest.mark.parametrize("kept", [1, 5, 11])
async def test_a_resumed_answer_has_no_seam(engine: TextModel, kept: int) -> None:
    """Characters of several tokens, a stop string and the limit, all over the place where it was taken up again."""
    sampling = {"temperature": 1.0, "seed": 5, "frequency_penalty": 0.5, "max_tokens": 16}
    request = completion("Some emojis: 😀 🚀 🐍 🔥 🦊", **sampling)
    whole = await answer(engine, request)
    rest = await answer(engine, request, {0: whole.tokens[:kept]})
    tokens = whole.tokens[:kept] + rest.tokens
    assert "".join(whole.pieces[:kept]) + rest.text == engine._serving.loaded.tokenizer.decode(tokens)
    assert len(tokens) == 16 or rest.finish_reason == "stop"


async def test_a_resume_that_was_at_its_end_ends(engine: TextModel) -> None:
    request = chat(max_tokens=TO_ITS_END)
    whole = await answer(engine, request)
    rest = await answer(engine, request, {0: whole.tokens})
    assert (rest.tokens, rest.text, rest.finish_reason) == ([], "", "stop")


async def test_a_stop_string_over_token_borders_ends_the_answer(engine: TextModel) -> None:
    await answer(engine, chat(max_tokens=1))  # the prompt is in the cache for both from here on
    plain = await answer(engine, chat())
    place = plain.text.index("of France") + 1
    stop = plain.text[place : place + 6]
    cut = await answer(engine, chat(stop=(stop,)))
    assert cut.text == plain.text[:place]
    assert cut.finish_reason == "stop"
    assert len(cut.tokens) < len(plain.tokens)


async def test_max_tokens_ends_with_length(engine: TextModel) -> None:
    found = await answer(engine, chat(max_tokens=3))
    assert (len(found.tokens), found.finish_reason) == (3, "length")
    none = await answer(engine, completion("Hello", max_tokens=0))
    assert (none.tokens, none.finish_reason) == ([], "length")


async def test_ignore_eos_goes_on_and_shows_no_special_token(engine: TextModel) -> None:
    found = await answer(engine, chat(max_tokens=60, ignore_eos=True))
    assert (len(found.tokens), found.finish_reason) == (60, "length")
    assert "<|im_" not in found.text


async def test_logit_bias_forbids_and_forces(engine: TextModel) -> None:
    plain = await answer(engine, chat(max_tokens=1))
    other = await answer(engine, chat(max_tokens=1, logit_bias={plain.tokens[0]: -100}))
    assert other.tokens != plain.tokens
    forced = await answer(engine, chat(max_tokens=3, logit_bias={other.tokens[0]: 100}))
    assert forced.tokens == other.tokens * 3


async def test_logprobs_are_those_of_the_chosen_and_the_best(engine: TextModel) -> None:
    found = await answer(engine, chat(max_tokens=5, logprobs=3))
    assert [entry.token for entry in found.logprobs] == found.tokens
    for entry in found.logprobs:
        assert [top.logprob for top in entry.top] == sorted((top.logprob for top in entry.top), reverse=True)
        # Which of two equally likely ones comes first is nobody's promise.
        assert entry.token in [top.token for top in entry.top]
        assert entry.logprob == pytest.approx(entry.top[0].logprob)
        assert entry.logprob <= 0
    assert "".join(entry.text for entry in found.logprobs) == found.text


async def test_closing_the_generator_takes_the_request_out_of_the_batch(engine: TextModel) -> None:
    batch = engine.engine._batch
    generator = engine.generate(chat(max_tokens=4000, ignore_eos=True), {})
    async for event in generator:
        if isinstance(event, Tokens):
            break
    await generator.aclose()
    scheduler = batch._manager.batch_processor.scheduler
    async with asyncio.timeout(60):
        while scheduler.active_requests or scheduler.waiting_requests or batch._sequences:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert "Paris" in (await answer(engine, chat())).text


async def test_what_cannot_fit_is_refused_before_it_is_accepted(engine: TextModel) -> None:
    with pytest.raises(InvalidRequest, match="maximum context length is 8192 tokens") as refused:
        await answer(engine, chat("word " * 9000))
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(InvalidRequest, match="you requested") as refused:
        await answer(engine, completion("Hello", max_tokens=8192))
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")


async def test_messages_that_the_template_does_not_take_are_refused(engine: TextModel) -> None:
    with pytest.raises(InvalidRequest, match="text only") as refused:
        await answer(engine, chat(messages=({"role": "user", "content": [{"type": "image_url"}]},)))
    assert refused.value.param == "messages"
    with pytest.raises(InvalidRequest) as refused:
        await answer(engine, completion((10**7,)))
    assert refused.value.param == "prompt"


async def test_a_shared_prefix_is_computed_once(engine: TextModel) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 20
    first = await answer(engine, chat(text + "First.", max_tokens=2))
    second = await answer(engine, chat(text + "Second.", max_tokens=2))
    assert first.cached_tokens < 64
    assert second.cached_tokens >= 192


async def test_a_prompt_longer_than_a_pass_is_computed_in_parts(engine: TextModel) -> None:
    text = "Remember the number 42. " * 40
    long, short = await asyncio.gather(
        answer(engine, chat(text + "Which number?", max_tokens=16)), answer(engine, chat())
    )
    assert "42" in long.text
    assert "Paris" in short.text


async def test_more_requests_than_slots_are_all_answered(engine: TextModel) -> None:
    found = await asyncio.gather(*(answer(engine, chat(max_tokens=6)) for _ in range(12)))
    assert len({choice.text for choice in found}) == 1


async def test_accepted_tells_the_length_of_the_prompt(engine: TextModel) -> None:
    events = [event async for event in engine.generate(completion("Hello", max_tokens=1, n=2), {})]
    assert events[0] == Accepted(1)


async def test_echo_shows_the_prompt_once(engine: TextModel) -> None:
    request = completion("The capital of France is", max_tokens=3, echo=True)
    plain = await answer(engine, request.model_copy(update={"echo": False}))
    echoed = await answer(engine, request)
    assert echoed.text == "The capital of France is" + plain.text
    rest = await answer(engine, request, {0: echoed.tokens[:1]})
    assert echoed.pieces[0] + rest.text == echoed.text
    only = await answer(engine, completion("The capital", max_tokens=0, echo=True))
    assert (only.text, only.tokens) == ("The capital", [])


async def test_best_of_shows_the_likeliest(engine: TextModel) -> None:
    request = completion("A good name for a cat is", temperature=1.0, seed=4, max_tokens=6, logprobs=0)
    every = await answers(engine, request.model_copy(update={"n": 4}))
    scores = {index: sum(entry.logprob for entry in one.logprobs) / 6 for index, one in every.items()}
    found = await answer(engine, request.model_copy(update={"n": 1, "best_of": 4}))
    assert found.text == every[max(scores, key=scores.__getitem__)].text
    with pytest.raises(InvalidRequest, match="best_of"):
        await answer(engine, request.model_copy(update={"n": 2, "best_of": 1}))
