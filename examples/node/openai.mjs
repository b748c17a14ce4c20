// node openai.mjs FILE: OpenAI's SDK for Node with whisperd; npm install openai undici
import fs from "node:fs";
import OpenAI from "openai";
import { Agent } from "undici";

const socketPath = process.env.WHISPERD_SOCKET ?? "/run/whisperd.sock";
const dispatcher = new Agent({ connect: { socketPath } });
const client = new OpenAI({ baseURL: "http://whisperd/v1", apiKey: "none", fetchOptions: { dispatcher } });

const file = fs.createReadStream(process.argv[2]);
console.log((await client.audio.transcriptions.create({ model: "whisper-1", file })).text);
