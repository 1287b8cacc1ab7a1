// The life of sandboxes, told with the published client: start, pause, find the paused ones, connect by id, auto-pause, kill.
//
//   cryovisor serve --data DIR &
//   E2B_API_URL=http://127.0.0.1:7480 E2B_API_KEY=$(cat DIR/api-key) node story.mjs
import { Sandbox, SandboxNotFoundError } from 'e2b'

const api = { apiKey: process.env.E2B_API_KEY || process.env.AGENTBOX_API_KEY }
const until = async (is) => {
  while (!(await is())) await new Promise((go) => setTimeout(go, 50))
}
const paused = async (metadata) => {
  const found = []
  for (const pages = Sandbox.list({ ...api, query: { state: ['paused'], metadata }, limit: 1 }); pages.hasNext;) {
    found.push(...(await pages.nextItems()))
  }
  return found
}

const metadata = { user: 'ada & co', run: String(process.pid) }
const box = await Sandbox.create({ ...api, metadata, timeoutMs: 60_000, lifecycle: { onTimeout: 'pause' } })
console.log('started:', (await box.getInfo()).state)

console.log('paused:', await box.pause(), 'and again:', await box.pause())
console.log('found among the paused:', (await paused(metadata)).map((s) => s.sandboxId === box.sandboxId))

const same = await Sandbox.connect(box.sandboxId, { ...api, timeoutMs: 1000 })
console.log('connected by its id:', (await same.getInfo()).state)

await until(async () => (await same.getInfo()).state === 'paused')
console.log('a second later it has paused by itself')

const [fork] = await Sandbox.fork(box.sandboxId, { ...api, count: 1 })
console.log('a fork runs:', (await fork.getInfo()).state)

console.log('killed:', await fork.kill(), await Sandbox.kill(box.sandboxId, api), 'and again:', await Sandbox.kill(box.sandboxId, api))
try {
  await Sandbox.connect(box.sandboxId, api)
} catch (err) {
  console.log('gone:', err instanceof SandboxNotFoundError)
}
