// A tool loop by the AI SDK, whole and streamed. Arguments: the api's URL, the model, the prompt.
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [url, model, prompt] = process.argv.slice(2);
const weather = tool({
  description: "The weather of a city",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `[[say]]Rain in ${city}.`,
});
const asked = {
  model: createOpenAI({ baseURL: `${url}/v1`, apiKey: "key" })(model),
  tools: { weather },
  stopWhen: stepCountIs(3),
  prompt,
};

const whole = await generateText(asked);
const streamed = streamText(asked);
let text = "";
for await (const part of streamed.textStream) text += part;
console.log(JSON.stringify({ whole: whole.text, streamed: text, steps: (await streamed.steps).length }));
