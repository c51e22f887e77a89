// Asks a board with the official openai client: node openai.mjs BASE_URL. Prints what it heard as one JSON object.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Name three colors." }];
const heard = {};

heard.models = [];
for await (const model of client.models.list()) heard.models.push(model.id);
heard.model = await client.models.retrieve("chat");

heard.chat = await client.chat.completions.create({ model: "chat", messages, temperature: 0 });

heard.deltas = [];
const options = { include_usage: true };
const stream = await client.chat.completions.create({
  model: "chat", messages, temperature: 0, stream: true, stream_options: options,
});
for await (const chunk of stream) {
  if (chunk.choices.length) heard.deltas.push(chunk.choices[0].delta.content ?? "");
  if (chunk.usage) heard.usage = chunk.usage;
}

const schema = {
  type: "object",
  properties: { color: { enum: ["red", "blue"] } },
  required: ["color"],
  additionalProperties: false,
};
heard.structured = await client.chat.completions.create({
  model: "chat",
  messages,
  temperature: 0,
  max_completion_tokens: 40,
  response_format: { type: "json_schema", json_schema: { name: "color", strict: true, schema } },
});

heard.response = (await client.responses.create({ model: "chat", input: "Name three colors.", temperature: 0 })).output_text;

// A client that has heard enough: the loop ends the stream.
const long = await client.completions.create({ model: "chat", prompt: "one two three", max_tokens: 1500, stream: true });
for await (const _ of long) break;

try {
  await client.chat.completions.create({ model: "gpt-4", messages });
} catch (error) {
  heard.error = { status: error.status, code: error.code, type: error.type, name: error.constructor.name };
}
console.log(JSON.stringify(heard));
