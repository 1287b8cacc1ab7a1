// What the published client does, against a server whose clock the test moves: POST $TEST_CLOCK?seconds=N.
import assert from 'node:assert/strict'
import { AuthenticationError, Sandbox, SandboxNotFoundError } from 'e2b'

const advance = async (seconds) => assert((await fetch(process.env.TEST_CLOCK + '?seconds=' + seconds, { method: 'POST' })).ok)
const until = async (what, is) => {
  for (const end = Date.now() + 60_000; !(await is());) {
    assert(Date.now() < end, 'not within a minute: ' + what)
    await new Promise((go) => setTimeout(go, 10))
  }
}
const all = async (pages) => {
  const found = []
  while (pages.hasNext) found.push(...(await pages.nextItems()))
  return found
}
const ids = (list) => list.map((s) => s.sandboxId)

const metadata = { 'user name': 'ada & co=100%', plus: '1+1' }
const box = await Sandbox.create({ metadata, timeoutMs: 60_000, lifecycle: { onTimeout: 'pause', autoResume: true } })
const info = await box.getInfo()
assert.equal(info.state, 'running')
assert.deepEqual(info.metadata, metadata)
assert.deepEqual(info.lifecycle, { onTimeout: 'pause', autoResume: true })
assert.equal(info.name, 'base')
assert(await box.isRunning())
await box.setTimeout(120_000)
assert((await box.getInfo()).endAt - Date.now() > 100_000)
assert.equal((await box.getMetrics()).length, 1)

assert.equal(await box.pause(), true)
assert.equal(await box.pause(), false)
assert.equal(await Sandbox.pause(box.sandboxId), false)
assert(!(await box.isRunning()))
await assert.rejects(box.setTimeout(1000), SandboxNotFoundError)

const others = await Promise.all([1, 2, 3].map(() => Sandbox.create({ timeoutMs: 600_000 })))
await Promise.all(others.map((s) => s.pause()))
const paused = await all(Sandbox.list({ query: { state: ['paused'] }, limit: 1 }))
assert.deepEqual(new Set(ids(paused)), new Set([box, ...others].map((s) => s.sandboxId)))
assert.deepEqual(ids(await all(Sandbox.list({ query: { metadata } }))), [box.sandboxId])
assert.deepEqual(await all(Sandbox.list({ query: { state: ['running'] } })), [])

const same = await Sandbox.connect(box.sandboxId, { timeoutMs: 60_000 })
assert.equal((await same.getInfo()).state, 'running')
await same.connect({ timeoutMs: 1000 }) // never shorter
assert((await same.getInfo()).endAt - Date.now() > 50_000)
await advance(61)
await until('it pauses by itself', async () => (await box.getInfo()).state === 'paused')
await box.connect({ timeoutMs: 60_000 })
await advance(61)
await until('and again: the option outlives pauses', async () => (await box.getInfo()).state === 'paused')

const forks = await Sandbox.fork(box.sandboxId, { count: 2 })
assert.equal(forks.length, 2)
const { snapshotId, names } = await forks[0].createSnapshot({ name: 'kept' })
assert.deepEqual(names, ['kept'])
assert.deepEqual((await all(Sandbox.listSnapshots())).map((s) => s.snapshotId), [snapshotId])
const clone = await Sandbox.create('kept')
assert.equal(await clone.kill(), true)
assert.equal(await Sandbox.deleteSnapshot(snapshotId), true)
assert.equal(await Sandbox.deleteSnapshot(snapshotId), false)

assert.equal(await forks[0].kill(), true)
assert.equal(await Sandbox.kill(forks[1].sandboxId), true)
assert.equal(await Sandbox.kill(forks[1].sandboxId), false)
await assert.rejects(Sandbox.connect(forks[0].sandboxId), SandboxNotFoundError)
await assert.rejects(Sandbox.getInfo(forks[0].sandboxId), SandboxNotFoundError)
await assert.rejects(Sandbox.create({ apiKey: 'e2b_' + '0'.repeat(40) }), AuthenticationError)
await assert.rejects(Sandbox.create('no-such-template'))

await advance(30 * 24 * 3600)
await assert.rejects(Sandbox.connect(box.sandboxId), SandboxNotFoundError)
assert.equal(await Sandbox.kill(others[0].sandboxId), false)
assert.deepEqual(await all(Sandbox.list()), [])
console.log('ok')
