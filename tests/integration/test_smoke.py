from support.nats import NatsServer
from support.stack import MODEL, running
from support.view import idle


async def test_answers_through_the_sdk(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        client = stack.openai()
        answer = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "[[tokens=3]]"}]
        )
        assert answer.choices[0].message.content == "t0 t1 t2"
        stream = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "[[tokens=3]]"}], stream=True
        )
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "t0 t1 t2"
        assert (await idle(stack))["total_processed"] == 2
