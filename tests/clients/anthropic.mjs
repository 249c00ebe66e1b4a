// usage: node anthropic.mjs URL  (from a folder with @anthropic-ai/sdk); prints what it got as JSON
import Anthropic from "@anthropic-ai/sdk";

const client = new Anthropic({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const body = {
  model: "claude-sonnet-5", max_tokens: 500, messages: [{ role: "user", content: "Hello" }],
};
const tools = [{
  name: "get_weather",
  input_schema: {
    type: "object",
    properties: { city: { type: "string" }, days: { type: "integer" } },
    required: ["city"],
  },
}];

const whole = await client.messages.create(body);
const streamed = await client.messages.stream(body).finalText();
const called = await client.messages.stream({ ...body, tools }).finalMessage();
const use = called.content.find((block) => block.type === "tool_use");
const after = await client.messages.create({
  ...body,
  tools,
  messages: [
    ...body.messages,
    { role: "assistant", content: called.content },
    { role: "user", content: [{ type: "tool_result", tool_use_id: use.id, content: "sunny" }] },
  ],
});
const counted = await client.messages.countTokens({ model: body.model, messages: body.messages });
let refused = "";
try {
  await client.messages.create({ ...body, temperature: 9 });
} catch (error) {
  refused = error.constructor.name;
}
console.log(JSON.stringify({
  whole: whole.content.at(-1).text, streamed, input: use.input,
  afterTools: after.content.at(-1).text, counted: counted.input_tokens > 0, refused,
}));
