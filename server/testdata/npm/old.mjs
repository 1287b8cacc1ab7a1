// What an older client does, with the first generation of routes.
import assert from 'node:assert/strict'
import { Sandbox } from 'e2b-old'

const box = await Sandbox.betaCreate({ autoPause: true, timeoutMs: 60_000 })
assert.equal((await Sandbox.getInfo(box.sandboxId)).state, 'running')
assert.equal(await box.betaPause(), true)
assert.equal(await Sandbox.betaPause(box.sandboxId), false)
const same = await Sandbox.connect(box.sandboxId)
assert.equal((await same.getInfo()).state, 'running')
assert((await fetch(process.env.TEST_CLOCK + '?seconds=301', { method: 'POST' })).ok)
for (const end = Date.now() + 60_000; (await Sandbox.getInfo(box.sandboxId)).state !== 'paused';) assert(Date.now() < end, 'it does not pause by itself')
const pages = Sandbox.list({ query: { state: ['paused'] } })
assert.deepEqual((await pages.nextItems()).map((s) => s.sandboxId), [box.sandboxId])
assert.equal(await Sandbox.kill(box.sandboxId), true)
console.log('ok')
