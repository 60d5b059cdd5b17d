"""vLLM and SGLang, as their sources say that they answer. `tests/vllm` asks the real vLLM."""

import asyncio
import gzip
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from typing import Any

import pytest
from aiohttp import web

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import ConfigurationError, InvalidRequest
from forebay_contracts.wire.request import Sampling
from forebay_inference.engine.protocol import Step, TokenLogprob, TokenRequest
from forebay_inference.engine.served import http as served_http
from forebay_inference.engine.served.dialect import Dialect, Load, NotReady, Served
from forebay_inference.engine.served.http import Http, ServerFailed
from forebay_inference.engine.served.sglang import SGLang
from forebay_inference.engine.served.tokenizer import Grammar
from forebay_inference.engine.served.vllm import VLLM
from forebay_inference.engine.simulated import SimulatedTokenizer
from support.inference_server import InferenceServer, Raw, inference_server

COMPLETIONS, GENERATE = "/v1/completions", "/generate"
SERVED = Served("1", 100, 2048, "none")
GRAMMAR = Grammar('start: "a"', None)


class Tokenizer(SimulatedTokenizer):
    """Cuts any text into two tokens."""

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        return [5, 6]


@pytest.fixture
async def server() -> AsyncIterator[InferenceServer]:
    async with inference_server({"/tokenize": {"tokens": [5, 6]}}) as started:
        yield started


@pytest.fixture
async def http(server: InferenceServer) -> AsyncIterator[Http]:
    asking = Http(server.url)
    yield asking
    await asking.close()


def asked(**fields: Any) -> TokenRequest:
    sampling = {"temperature": 0, **{name: fields.pop(name) for name in set(fields) & set(Sampling.model_fields)}}
    given: dict[str, Any] = {"end_tokens": frozenset({2}), "max_new_tokens": 9, "seed": "7:0", **fields}
    return TokenRequest("r", (1, 3), sampling=Sampling(**sampling), **given)


async def steps(dialect: Dialect, http: Http, request: TokenRequest) -> list[Step]:
    return [step async for step in dialect.generate(http, request, SERVED)]


def text(tokens: list[int], reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
    """An event of vLLM."""
    return {"choices": [{"index": 0, "token_ids": tokens, "finish_reason": reason, "logprobs": logprobs}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}}


def ids(tokens: list[int], count: int, reason: dict[str, Any] | None = None) -> dict[str, Any]:
    """An event of SGLang."""
    return {
        "output_ids": tokens,
        "meta_info": {"completion_tokens": count, "cached_tokens": 1, "finish_reason": reason},
    }


STOP = {"type": "stop", "matched": 2}
WHOLE = [Step((8,)), Step((9, 2), finish="stop", cached_tokens=1)]


async def test_vllm_s_tokens_and_its_end(server: InferenceServer, http: Http) -> None:
    server.answers[COMPLETIONS] = lambda body: [text([8]), text([9, 2], "stop"), USAGE]
    assert await steps(VLLM(), http, asked()) == WHOLE


@pytest.mark.parametrize("events", [[ids([8], 1), ids([9, 2], 3, STOP)], [ids([8], 1), ids([8, 9, 2], 3, STOP)]])
async def test_sglang_s_tokens_come_anew_or_all_again(server: InferenceServer, http: Http, events: list[Any]) -> None:
    server.answers[GENERATE] = lambda body: events
    assert await steps(SGLang(), http, asked()) == WHOLE


async def test_what_vllm_is_asked_for(server: InferenceServer, http: Http) -> None:
    server.answers[COMPLETIONS] = lambda body: [text([8], "length"), USAGE]
    fields = {"min_tokens": 4, "top_p": 0.0, "logit_bias": {3: 1.5}, "logprobs": None, "seed": 5}
    request = asked(**fields, generated=(4,), grammar=GRAMMAR)._replace(seed="5:0")
    await steps(VLLM(), http, request)
    body = server.asked[-1][1]
    assert body["prompt"] == [1, 3, 4]
    assert (body["max_tokens"], body["min_tokens"], body["stop_token_ids"], body["ignore_eos"]) == (9, 3, [2], True)
    assert 0 < body["top_p"] < 1e-6
    assert body["logit_bias"] == {"3": 1.5}
    assert body["structured_outputs"] == {"grammar": 'start: "a"'}
    assert 0 <= body["seed"] < 2**63
    await steps(VLLM(), http, asked())
    assert not {"seed", "logprobs", "logit_bias", "structured_outputs"} & set(server.asked[-1][1])


async def test_what_sglang_is_asked_for(server: InferenceServer, http: Http) -> None:
    server.answers[GENERATE] = lambda body: [ids([8], 1, {"type": "length", "length": 1})]
    await steps(SGLang(), http, asked(generated=(4,), grammar=GRAMMAR, ignore_eos=True))
    body, params = server.asked[-1][1], server.asked[-1][1]["sampling_params"]
    assert body["input_ids"] == [1, 3, 4]
    # An answer with a grammar ends at the end token.
    assert (params["ebnf"], params["ignore_eos"], params["stop_token_ids"]) == ('start: "a"', False, [2])
    assert (params["top_k"], params["max_new_tokens"]) == (-1, 9)
    await steps(SGLang(), http, asked(ignore_eos=True))
    assert server.asked[-1][1]["sampling_params"]["ignore_eos"] is True


async def test_vllm_s_logprobs_are_of_the_chosen_and_the_best(server: InferenceServer, http: Http) -> None:
    told = {"token_logprobs": [-3.0], "top_logprobs": [{"token_id:8": -3.0, "token_id:4": -2.0, "token_id:5": -1.0}]}
    server.answers[COMPLETIONS] = lambda body: [text([8], "length", told), USAGE]
    (step,) = await steps(VLLM(), http, asked(logprobs=2))
    assert step.logprobs == (TokenLogprob(8, -3.0, ((5, -1.0), (4, -2.0))),)
    assert server.asked[-1][1]["return_tokens_as_token_ids"] is True


async def test_vllm_scores_a_prompt(server: InferenceServer, http: Http) -> None:
    told = [None, {"3": {"logprob": -3.0, "rank": 7}, "9": {"logprob": -1.0, "rank": 1}}]
    server.answers[COMPLETIONS] = {"choices": [{"prompt_logprobs": told}]}
    found = [part async for part in VLLM().score(http, "r", (1, 3), 1, "", SERVED)]
    assert found == [(TokenLogprob(3, -3.0, ((9, -1.0),), 7),)]


@pytest.mark.parametrize(
    ("events", "error"),
    [
        ([{"error": {"message": "bad", "type": "BadRequestError", "code": 400}}], InvalidRequest),
        ([text([8]), {"error": {"message": "x", "type": "InternalServerError", "code": 500}}], ServerFailed),
        ([text([8], "abort"), USAGE], ServerFailed),
        ([text([8]), ...], ServerFailed),
        (web.Response(status=503), ServerFailed),
    ],
)
async def test_vllm_s_errors(server: InferenceServer, http: Http, events: Any, error: type[Exception]) -> None:
    server.answers[COMPLETIONS] = lambda body: events
    with pytest.raises(error):
        await steps(VLLM(), http, asked())


@pytest.mark.parametrize(
    ("events", "error"),
    [
        ([{"error": {"message": "bad"}}], InvalidRequest),
        ([ids([], 0, {"type": "abort", "status_code": 400, "message": "bad"})], InvalidRequest),
        ([ids([], 0, {"type": "abort", "status_code": 500, "message": "x"})], ServerFailed),
    ],
)
async def test_sglang_s_errors(server: InferenceServer, http: Http, events: Any, error: type[Exception]) -> None:
    server.answers[GENERATE] = lambda body: events
    with pytest.raises(error):
        await steps(SGLang(), http, asked())


@pytest.mark.parametrize(
    ("dialect", "path", "event"), [(VLLM(), COMPLETIONS, text([8])), (SGLang(), GENERATE, ids([8], 1))]
)
async def test_leaving_an_answer_closes_its_connection(
    server: InferenceServer, http: Http, dialect: Dialect, path: str, event: Any
) -> None:
    server.answers[path] = lambda body: (event if n % 2 == 0 else 0.005 for n in range(10_000))
    async with aclosing(dialect.generate(http, asked(), SERVED)) as answer:
        await anext(answer)
    await asyncio.wait_for(server.left.wait(), 30)


def vllm_answers(**changed: Any) -> dict[str, Any]:
    return {
        "/health": b"",
        "/version": {"version": "0.32.0+cpu"},
        "/v1/models": {"data": [{"id": "m", "max_model_len": 2048}]},
        COMPLETIONS: {"choices": []},
        **changed,
    }


def sglang_answers(**changed: Any) -> dict[str, Any]:
    return {
        "/v1/models": {"data": [{"id": "m", "max_model_len": 2048}]},
        "/get_server_info": {"version": "0.5.6", "grammar_backend": "llguidance", "quantization": None},
        "/metrics": b"",
        **changed,
    }


async def test_a_vllm_with_adapters_gives_no_log_probabilities_of_a_prompt(server: InferenceServer, http: Http) -> None:
    server.answers |= vllm_answers()
    assert (await VLLM().identify(http, Tokenizer())).capabilities is None
    models = [{"id": "m", "max_model_len": 2048}, {"id": "sql", "parent": "m"}]
    server.answers["/v1/models"] = {"data": models}
    capabilities = (await VLLM().identify(http, Tokenizer())).capabilities
    assert capabilities is not None
    assert (capabilities.prompt_logprobs, capabilities.logprobs, capabilities.adapters) == (False, True, True)


@pytest.mark.parametrize(("dialect", "answers"), [(VLLM(), vllm_answers), (SGLang(), sglang_answers)])
async def test_a_server_is_identified(
    server: InferenceServer, http: Http, dialect: Dialect, answers: Callable[..., dict[str, Any]]
) -> None:
    server.answers |= answers()
    served = await dialect.identify(http, Tokenizer())
    assert (served.context_length, served.vocabulary_size) == (2048, Tokenizer.vocabulary_size)
    server.answers["/tokenize"] = {"tokens": [5]}
    with pytest.raises(ConfigurationError, match="another tokenizer"):
        await dialect.identify(http, Tokenizer())


@pytest.mark.parametrize(
    ("dialect", "answers", "message"),
    [
        (VLLM(), vllm_answers(**{"/version": {"version": "0.9.2"}}), "vLLM 0.9.2 is too old"),
        (VLLM(), vllm_answers(**{"/v1/models": {}}), "does not answer like vLLM"),
        (VLLM(), vllm_answers(**{"/v1/models": lambda _: web.Response(status=401)}), "ENGINE_API_KEY is not its key"),
        (VLLM(), vllm_answers(**{"/version": lambda _: web.Response(status=404)}), "/version was answered with"),
        (VLLM(), vllm_answers(**{"/tokenize": {}}), "does not answer like vLLM"),
        (VLLM(), vllm_answers(**{"/version": b"<html>"}), "the answer to /version is no JSON"),
        (SGLang(), sglang_answers(**{"/tokenize": {}}), "does not answer like SGLang"),
        (SGLang(), sglang_answers(**{"/get_server_info": b"[]"}), "does not answer like SGLang"),
        (SGLang(), sglang_answers(**{"/get_server_info": b"<html>"}), "the answer to /get_server_info is no JSON"),
        (VLLM(), vllm_answers(**{COMPLETIONS: lambda _: web.Response(status=400)}), "--structured-outputs-config"),
        (SGLang(), sglang_answers(**{"/get_server_info": {"grammar_backend": "xgrammar"}}), "--grammar-backend"),
        (SGLang(), sglang_answers(**{"/metrics": lambda _: web.Response(status=404)}), "--enable-metrics"),
    ],
)
async def test_a_server_that_does_not_fit_is_refused(
    server: InferenceServer, http: Http, dialect: Dialect, answers: dict[str, Any], message: str
) -> None:
    server.answers |= answers
    with pytest.raises(ConfigurationError, match=message):
        await dialect.identify(http, Tokenizer())


async def test_a_server_that_loads_is_waited_for(server: InferenceServer, http: Http) -> None:
    server.answers |= vllm_answers(**{"/health": lambda _: web.Response(status=503)})
    with pytest.raises(NotReady):
        await VLLM().identify(http, Tokenizer())


async def test_load_is_read_from_the_metrics(server: InferenceServer, http: Http) -> None:
    server.answers["/metrics"] = (
        b'vllm:iteration_tokens_total_count{engine="0"} 20.0\nvllm:iteration_tokens_total_count{engine="1"} 3.0\n'
        b'vllm:kv_cache_usage_perc{engine="0"} 0.25\nsglang:generation_tokens_total{m="x y"} 7.0\n'
        b"sglang:token_usage 0.5\n"
    )
    assert await VLLM().load(http) == Load(23, 0.25)
    assert await SGLang().load(http) == Load(7, 0.5)


@pytest.mark.parametrize("dialect", [VLLM(), SGLang()])
def test_a_quantization_that_it_does_not_make_is_refused(dialect: Dialect) -> None:
    assert "{model}" in dialect.command(InferenceSettings(_env_file=None))
    with pytest.raises(ConfigurationError, match="MODEL_QUANTIZATION=fp4"):
        dialect.command(InferenceSettings(_env_file=None, model_quantization="fp4"))


def test_vllm_s_cache_is_bounded_on_a_cpu() -> None:
    command = VLLM().command(InferenceSettings(_env_file=None, model_device="cpu"))
    assert int(command[list(command).index("--kv-cache-memory-bytes") + 1]) > 0


async def test_no_other_server_gets_a_prompt(server: InferenceServer, http: Http) -> None:
    server.answers[COMPLETIONS] = web.Response(status=307, headers={"Location": "/elsewhere"})
    with pytest.raises(ServerFailed, match=f"{COMPLETIONS} was answered with status 307: it leads elsewhere"):
        await http.json(COMPLETIONS, {"prompt": [1]})
    assert [path for path, _ in server.asked] == [COMPLETIONS]


async def test_what_is_packed_is_not_unpacked(server: InferenceServer, http: Http) -> None:
    packed = gzip.compress(bytes(1 << 20))
    server.answers["/packed"] = web.Response(body=packed, headers={"Content-Encoding": "gzip"})
    assert await http.get("/packed") == packed


async def test_what_has_no_end_is_bounded(server: InferenceServer, http: Http, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_http, "_END_S", 0.05)
    monkeypatch.setattr(served_http, "_MAX_ANSWER_BYTES", 1000)
    server.answers["/endless"] = bytes(1001)
    with pytest.raises(ServerFailed, match="larger than 1000 bytes"):
        await http.get("/endless")

    def goes_on(body: Any) -> Iterator[Any]:
        yield from [text([8], "stop"), Raw(b"data: [DONE]\n\n")]
        while True:
            yield 0.001
            yield text([9])

    server.answers[COMPLETIONS] = goes_on
    async with asyncio.timeout(30):
        assert await steps(VLLM(), http, asked()) == [Step((8,), finish="stop")]
        await server.left.wait()
