<?php
// Copyright (c) the wggw authors. Proprietary, all rights reserved: see LICENSE.
// Every call of the client that openapi-generator's php makes of /openapi.json: see run.
declare(strict_types=1);

use GuzzleHttp\Client;
use GuzzleHttp\HandlerStack;
use GuzzleHttp\Middleware;
use OpenAPI\Client as Wggw;
use OpenAPI\Client\Model;
use Psr\Http\Message\RequestInterface;

require '/usr/share/php/GuzzleHttp/autoload.php';
spl_autoload_register(function (string $class): void {
    $path = 'wggw/lib/' . str_replace(['OpenAPI\\Client\\', '\\'], ['', '/'], $class) . '.php';
    if (is_file($path)) {
        require $path;
    }
});

function check(mixed $expected, mixed $got): void
{
    if ($expected != $got) {
        throw new Exception('expected ' . var_export($expected, true) . ', got ' . var_export($got, true));
    }
}

// The signing hook: RFC 9421, over the body as it is sent.
function signed(RequestInterface $request): RequestInterface
{
    $lines = ["\"@method\": {$request->getMethod()}", "\"@target-uri\": {$request->getUri()}"];
    $covered = '"@method" "@target-uri"';
    $body = (string) $request->getBody();
    if ($body !== '') {
        $digest = 'sha-256=:' . base64_encode(hash('sha256', $body, true)) . ':';
        $request = $request->withHeader('Content-Digest', $digest);
        $lines[] = "\"content-digest\": $digest";
        $covered .= ' "content-digest"';
    }
    $parameters = sprintf('(%s);created=%d;nonce="%s";keyid="default"', $covered, time(), bin2hex(random_bytes(16)));
    $lines[] = "\"@signature-params\": $parameters";
    $key = trim(file_get_contents(getenv('GATEWAY_KEY_FILE')));
    $signature = base64_encode(hash_hmac('sha256', implode("\n", $lines), $key, true));
    return $request->withHeader('Signature-Input', "sig1=$parameters")->withHeader('Signature', "sig1=:$signature:");
}

$aKey = fn(): string => base64_encode(random_bytes(32));
$handlers = HandlerStack::create();
$handlers->push(Middleware::mapRequest(signed(...)));
$http = new Client(['handler' => $handlers, 'verify' => getenv('GATEWAY_CERT')]);
$config = (new Wggw\Configuration())->setHost(getenv('GATEWAY_URL'));
$peers = new Wggw\Api\PeersApi($http, $config);
$gateway = new Wggw\Api\GatewayApi($http, $config);
$monitoring = new Wggw\Api\MonitoringApi($http, $config);
[$alice, $bob, $carol] = [$aKey(), $aKey(), $aKey()];

$created = $peers->createPeer(new Model\CreatePeerBody([
    'public_key' => $alice, 'protocol' => 'dual', 'quota_bytes' => 3_000_000_000, 'label' => 'Alice',
]));
check('created', $created->getStatus());
check(3_000_000_000, $created->getQuotaBytes());
$listed = $peers->listPeers(1, status: 'active', online: false);
check($alice, $listed->getConfigurations()[0]->getPublicKey());
check($created->getAssignedIpv6(), $peers->getPeer($alice)->getAssignedIpv6());
$text = $http->send($peers->getPeerRequest($alice, 'wg-quick'))->getBody(); // no configuration to decode
check('[Interface]', substr((string) $text, 0, 11));
$changed = $peers->updatePeer($alice, new Model\UpdatePeerBody(['label' => null]));
check([null, 3_000_000_000], [$changed->getLabel(), $changed->getQuotaBytes()]);
check($bob, $peers->rotatePeer($alice, new Model\RotatePeerBody(['new_public_key' => $bob]))->getPublicKey());
check(0, $peers->resetQuota($bob)->getQuotaUsed());
foreach (['suspended' => 'suspended', 'active' => 'updated'] as $asked => $said) {
    $answer = $peers->setPeerStatus($bob, new Model\SetPeerStatusBody(['status' => $asked]));
    check($said, $answer->getStatus());
}
$operation = fn(array $fields): Model\BatchOperation => new Model\BatchOperation($fields);
$results = $peers->runBatch(new Model\RunBatchBody(['operations' => [
    $operation(['op' => 'create', 'public_key' => $carol]),
    $operation(['op' => 'update', 'public_key' => $bob, 'quota_bytes' => null]),
    $operation(['op' => 'delete', 'public_key' => $carol]),
    $operation(['op' => 'delete', 'public_key' => $carol]),
]]))->getResults();
check(['created', 'updated', 'deleted', 404], array_map(fn($result) => $result->getStatus(), $results));
check(1, $peers->syncPeers([new Model\DesiredPeer(['public_key' => $bob])], true)->getUnchanged());
check($bob, $peers->listChanges(0, 10, 1)->getChanges()[0]->getConfiguration()->getPublicKey());
check([], $peers->listUsage()->getUsage());
check(2 ** 64 - 2, $gateway->getIpUsage()->getIpv6()->getTotal());
check('synced', $gateway->syncIps()->getStatus());
$health = $gateway->getStatus();
check(['healthy', null], [$health->getStatus(), $health->getRemoteCopy()]);
check(1, $gateway->getServerMetrics()->getWireguard()->getTotalPeers());
check(1, $gateway->getObfuscation()->getParametersVersion());
$spoken = $gateway->rotateObfuscation(new Model\RotateObfuscationBody(['confirm' => true]));
check(2, $spoken->getParametersVersion());
$snapshot = $gateway->exportSnapshot();
check('SQLite format 3', $snapshot->fread(15));
$bytes = file_get_contents($snapshot->getPathname()); // of a file the length would not be told
check(1, $gateway->importSnapshot($bytes)->getTotalPeers());
check('deleted', $peers->deletePeer($bob)->getStatus());
try {
    $peers->deletePeer($bob);
    check('a problem', 'none');
} catch (Wggw\ApiException $error) {
    check(404, $error->getResponseObject()->getStatus());
}
check(true, str_contains($monitoring->getMetrics(), 'wggw_peers'));
check('alive', $monitoring->getHealth()->getStatus());
check('ready', $monitoring->getReadiness()->getStatus());
check('3.1.0', $monitoring->getOpenapi()['openapi']);
