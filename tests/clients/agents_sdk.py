"""A tool loop by openai-agents, whole, streamed, over a WebSocket. Arguments: the api's URL, the model, the prompt."""

import asyncio
import json
import sys

from agents import (
    Agent,
    Runner,
    function_tool,
    set_default_openai_client,
    set_default_openai_responses_transport,
    set_tracing_disabled,
)
from openai import AsyncOpenAI


@function_tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"[[say]]Rain in {city}."


async def main(url: str, model: str, prompt: str) -> None:
    set_tracing_disabled(True)
    set_default_openai_client(AsyncOpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0))
    agent = Agent(name="reporter", instructions="Be brief.", model=model, tools=[weather])
    whole = await Runner.run(agent, prompt)
    streamed = Runner.run_streamed(agent, prompt)
    async for _ in streamed.stream_events():
        pass
    set_default_openai_responses_transport("websocket")
    socket = await Runner.run(agent, prompt)
    outputs = {"whole": whole.final_output, "streamed": streamed.final_output, "socket": socket.final_output}
    print(json.dumps(outputs))


asyncio.run(main(*sys.argv[1:]))
