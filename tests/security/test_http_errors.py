"""Nothing of the inside and nothing of a request is told to whom it does not concern."""

import pytest

from forebay_inference.engine.protocol import reason_of
from support.answers import error_of
from support.nats import NatsServer
from support.stack import running

PROMPT = "xyzzy-the-secret-prompt"


def test_an_unexpected_error_is_logged_without_what_it_says() -> None:
    with pytest.raises(ValueError, match=PROMPT) as caught:
        int(PROMPT)
    told = reason_of(caught.value)
    assert told.startswith("ValueError at test_http_errors.py:")
    assert "test_an_unexpected_error_is_logged_without_what_it_says" in told
    assert PROMPT not in told


async def test_no_prompt_in_a_log_and_no_inside_in_an_answer(nats_server: NatsServer) -> None:
    async with running(nats_server, max_deliveries=1, log_level="DEBUG") as stack:
        for text, status in (("[[tokens=2]]", 200), ("[[tokens=1 fail]]", 500), ("[[nonsense]]", 400)):
            answer = await stack.chat(f"{PROMPT} {text}")
            assert answer.status_code == status
            if status == 500:
                assert PROMPT not in error_of(answer)["message"]
        url = f"{stack.apis[0].url}/v1/chat/completions"
        for body in (
            b'{"messages": "' + PROMPT.encode(),
            b"[" * 100_000,
            b'{"model": 1, "messages": [{"role": "' + PROMPT.encode() + b'"}]}',
            b"\xff\xfe" + PROMPT.encode(),
        ):
            answer = await stack.http.post(url, content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 400
            error_of(answer)
        await stack.idle()
        for service in (*stack.apis, *stack.workers):
            assert not [line for line in await service.whole_log() if PROMPT in line or "Traceback" in line]
