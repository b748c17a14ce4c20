// node conformance.mjs SOCKET FILE: what OpenAI's SDK makes of the daemon's answers, as one JSON object on stdout.
import fs from "node:fs";
import OpenAI from "openai";
import { Agent } from "undici";

const [socketPath, path] = process.argv.slice(2);
const dispatcher = new Agent({ connect: { socketPath } });
const client = new OpenAI({
  baseURL: "http://whisperd/v1",
  apiKey: "unused",
  maxRetries: 0,
  fetchOptions: { dispatcher },
});

const create = (fields) =>
  client.audio.transcriptions.create({ file: fs.createReadStream(path), model: "whisper-1", ...fields });

async function events(fields) {
  const found = [];
  for await (const event of await create({ stream: true, ...fields })) found.push(event);
  return found;
}

async function failure(fields) {
  try {
    await create(fields);
  } catch (error) {
    const { status, code, param, type, requestID } = error;
    return { class: error.constructor.name, status, code, param, type, requestID };
  }
  return null;
}

const found = {
  json: await create({}),
  verbose: await create({ response_format: "verbose_json", timestamp_granularities: ["word", "segment"] }),
  srt: await create({ response_format: "srt" }),
  vtt: await create({ response_format: "vtt" }),
  text: await create({ response_format: "text" }),
  logprobs: await create({ include: ["logprobs"] }),
  chunked: await create({ chunking_strategy: { type: "server_vad", threshold: 0.4 } }),
  events: await events({}),
  models: (await client.models.list()).data,
  model: await client.models.retrieve("whisper-1"),
  unknownModel: await failure({ model: "nope" }),
  wrongLanguage: await failure({ language: "klingon" }),
  wrongInclude: await failure({ include: ["pictures"] }),
  tooMuch: await failure({ temperature: 3 }),
};
process.stdout.write(JSON.stringify(found));
await dispatcher.close();
