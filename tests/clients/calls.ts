// Copyright (c) the wggw authors. Proprietary, all rights reserved: see LICENSE.
// Every call of openapi-fetch with the types that openapi-typescript makes of /openapi.json: see run.
import { strict as assert } from 'node:assert';
import { createHash, createHmac, randomBytes } from 'node:crypto';
import { readFileSync } from 'node:fs';
import createClient from 'openapi-fetch';
import type { paths } from './wggw.js';

const secret = readFileSync(process.env.GATEWAY_KEY_FILE!, 'utf8').trim();
const client = createClient<paths>({ baseUrl: process.env.GATEWAY_URL! });

// The signing hook: RFC 9421, over the body as it is sent.
client.use({
  async onRequest({ request }) {
    const body = Buffer.from(await request.clone().arrayBuffer());
    const headers = new Headers(request.headers);
    const lines = [`"@method": ${request.method}`, `"@target-uri": ${request.url}`];
    let covered = '"@method" "@target-uri"';
    if (body.length > 0) {
      const digest = `sha-256=:${createHash('sha256').update(body).digest('base64')}:`;
      headers.set('Content-Digest', digest);
      lines.push(`"content-digest": ${digest}`);
      covered += ' "content-digest"';
    }
    const created = Math.floor(Date.now() / 1000);
    const nonce = randomBytes(16).toString('hex');
    const parameters = `(${covered});created=${created};nonce="${nonce}";keyid="default"`;
    const base = [...lines, `"@signature-params": ${parameters}`].join('\n');
    headers.set('Signature-Input', `sig1=${parameters}`);
    headers.set('Signature', `sig1=:${createHmac('sha256', secret).update(base).digest('base64')}:`);
    return new Request(request.url, {
      method: request.method, headers, body: body.length > 0 ? body : undefined,
    });
  },
});

async function good<T>(answer: Promise<{ data?: T, error?: unknown }>): Promise<NonNullable<T>> {
  const { data, error } = await answer;
  assert.equal(error, undefined, JSON.stringify(error));
  return data!;
}

const aKey = () => randomBytes(32).toString('base64');
const peer = '/api/v1/configurations/{public_key}';
const [alice, bob, carol] = [aKey(), aKey(), aKey()];
const path = (public_key: string) => ({ params: { path: { public_key } } });

const created = await good(client.POST('/api/v1/configurations', {
  body: { public_key: alice, protocol: 'dual', quota_bytes: 3e9, label: 'Alice' },
}));
assert.equal(created.status, 'created');
const listed = await good(client.GET('/api/v1/configurations', {
  params: { query: { status: 'active', limit: 1 } },
}));
assert.equal(listed.configurations[0].public_key, alice);
const got = await good(client.GET(peer, path(alice)));
assert.ok(typeof got !== 'string'); // as with format=wg-quick
assert.equal(got.assigned_ipv6, created.assigned_ipv6);
const text = await good(client.GET(peer, {
  params: { path: { public_key: alice }, query: { format: 'wg-quick' } }, parseAs: 'text',
}));
assert.match(String(text), /^\[Interface\]/);
const changed = await good(client.PATCH(peer, { ...path(alice), body: { label: null } }));
assert.deepEqual([changed.label, changed.quota_bytes], [null, 3e9]);
const rotated = await good(client.POST(`${peer}/rotate`, {
  ...path(alice), body: { new_public_key: bob },
}));
assert.equal(rotated.public_key, bob);
const fresh = await good(client.POST(`${peer}/reset-quota`, path(bob)));
assert.equal(fresh.quota_used, 0);
for (const [status, said] of [['suspended', 'suspended'], ['active', 'updated']] as const) {
  const answer = await good(client.PUT(`${peer}/status`, { ...path(bob), body: { status } }));
  assert.equal(answer.status, said);
}
const batch = await good(client.POST('/api/v1/configurations/batch', {
  body: {
    operations: [
      { op: 'create', public_key: carol },
      { op: 'update', public_key: bob, quota_bytes: null },
      { op: 'delete', public_key: carol },
      { op: 'delete', public_key: carol },
    ],
  },
}));
const statuses = batch.results.map((result) => result.status);
assert.deepEqual(statuses, ['created', 'updated', 'deleted', 404]);
const synced = await good(client.PUT('/api/v1/configurations', {
  params: { query: { dry_run: true } }, body: [{ public_key: bob }],
}));
assert.equal(synced.unchanged, 1);
const { changes } = await good(client.GET('/api/v1/changes', {
  params: { query: { after: 0, wait: 1 } },
}));
assert.equal(changes[0].configuration?.public_key, bob);
assert.deepEqual((await good(client.GET('/api/v1/usage'))).usage, []);
assert.ok((await good(client.GET('/api/v1/ip-usage'))).ipv6.total > 1e19);
assert.equal((await good(client.POST('/api/v1/sync-ips'))).status, 'synced');
const health = await good(client.GET('/api/v1/server/status'));
assert.deepEqual([health.status, health.remote_copy], ['healthy', null]);
assert.equal((await good(client.GET('/api/v1/server/metrics'))).wireguard.total_peers, 1);
assert.equal((await good(client.GET('/api/v1/obfuscation'))).parameters_version, 1);
const spoken = await good(client.POST('/api/v1/obfuscation/rotate', { body: { confirm: true } }));
assert.equal(spoken.parameters_version, 2);
const snapshot = await good(client.GET('/api/v1/snapshot', { parseAs: 'arrayBuffer' }));
assert.match(Buffer.from(snapshot).toString('latin1'), /^SQLite format 3/);
const imported = await good(client.PUT('/api/v1/snapshot', {
  body: '', // its type is that of a text: the serializer gives the bytes
  bodySerializer: () => snapshot,
  headers: { 'Content-Type': 'application/octet-stream' },
}));
assert.equal(imported.total_peers, 1);
assert.equal((await good(client.DELETE(peer, path(bob)))).status, 'deleted');
assert.equal((await client.DELETE(peer, path(bob))).error?.status, 404);
assert.match(await good(client.GET('/metrics', { parseAs: 'text' })), /wggw_peers/);
assert.equal((await good(client.GET('/healthz'))).status, 'alive');
assert.equal((await good(client.GET('/readyz'))).status, 'ready');
assert.equal((await good(client.GET('/openapi.json'))).openapi, '3.1.0');
