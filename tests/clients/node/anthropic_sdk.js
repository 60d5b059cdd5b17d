// A tool loop by the tool runner of the Anthropic SDK, whole and streamed. Arguments: as of ai_sdk.js.
import Anthropic from "@anthropic-ai/sdk";
import { betaZodTool } from "@anthropic-ai/sdk/helpers/beta/zod";
import { z } from "zod";

const [url, model, content] = process.argv.slice(2);
const client = new Anthropic({ baseURL: url, apiKey: "key", maxRetries: 0 });
const weather = betaZodTool({
  name: "weather",
  description: "The weather of a city",
  inputSchema: z.object({ city: z.string() }),
  run: ({ city }) => `[[say]]Rain in ${city}.`,
});

const texts = [];
for (const stream of [false, true]) {
  const runner = client.beta.messages.toolRunner({
    model,
    max_tokens: 1000,
    messages: [{ role: "user", content }],
    tools: [weather],
    stream,
  });
  texts.push((await runner.runUntilDone()).content[0].text);
}
console.log(JSON.stringify({ whole: texts[0], streamed: texts[1] }));
