// A receiver of webhooks by the OpenAI SDK: prints its URL, and the first event that it gets. Argument: the secret.
import http from "node:http";
import { text } from "node:stream/consumers";
import OpenAI from "openai";

const client = new OpenAI({ apiKey: "key", webhookSecret: process.argv[2] });

const server = http.createServer(async (request, response) => {
  const event = await client.webhooks.unwrap(await text(request), request.headers);
  response.writeHead(200).end();
  console.log(JSON.stringify(event));
  server.close();
  server.closeAllConnections();
});
server.listen(0, "127.0.0.1", () => console.log(`http://127.0.0.1:${server.address().port}/`));
