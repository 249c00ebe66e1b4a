// usage: node openai.mjs URL  (from a folder with the openai package); prints what it got as JSON
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const model = "deepseek-v4-flash";
const messages = [{ role: "user", content: "Hello" }];
const tools = [{
  type: "function",
  function: {
    name: "get_weather",
    parameters: {
      type: "object",
      properties: { city: { type: "string" }, days: { type: "integer" } },
      required: ["city"],
    },
  },
}];

const whole = await client.chat.completions.create({ model, messages });
let streamed = "";
for await (const chunk of await client.chat.completions.create({ model, messages, stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
}
const run = client.chat.completions.runTools({
  model,
  messages,
  tools: [{ ...tools[0], function: {
    ...tools[0].function, parse: JSON.parse, function: ({ city, days }) => `${city} ${days} sunny`,
  } }],
});
const afterTools = await run.finalContent();
const response = await client.responses.create({ model, input: "Hello" });
let refused = "";
try {
  await client.chat.completions.create({ model: "deepseek-chat", messages });
} catch (error) {
  refused = error.constructor.name;
}
console.log(JSON.stringify({
  whole: whole.choices[0].message.content, streamed, afterTools, response: response.output_text,
  refused,
}));
