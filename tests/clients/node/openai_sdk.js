// A tool loop by the OpenAI SDK, and a background response that is left and taken up. Arguments: as of ai_sdk.js.
import OpenAI from "openai";
import { zodResponsesFunction } from "openai/helpers/zod";
import { z } from "zod";

const [url, model, input] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "key", maxRetries: 0 });
const tools = [zodResponsesFunction({ name: "weather", parameters: z.object({ city: z.string() }) })];

const first = await client.responses.stream({ model, input, tools }).finalResponse();
const call = first.output.find((item) => item.type === "function_call");
const second = await client.responses.create({
  model,
  tools,
  previous_response_id: first.id,
  input: [
    {
      type: "function_call_output",
      call_id: call.call_id,
      output: `[[say]]Rain in ${call.parsed_arguments.city}.`,
    },
  ],
});

const long = { model, input: "[[tokens=20 delay_ms=20]]", background: true, stream: true };
let left;
for await (const event of await client.responses.create(long)) {
  left = { response_id: event.response?.id ?? left.response_id, starting_after: event.sequence_number };
  if (event.type === "response.output_text.delta") break;
}
const taken = await client.responses.stream(left).finalResponse();
console.log(JSON.stringify({ tool: second.output_text, background: taken.output_text }));
