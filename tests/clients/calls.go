// Copyright (c) the wggw authors. Proprietary, all rights reserved: see LICENSE.
// Every call of the client that oapi-codegen makes of /openapi.json. See tests/clients/run.
package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/oapi-codegen/nullable"

	"calls/wggw"
)

func check(good bool, told ...any) {
	if !good {
		panic(fmt.Sprint(told...))
	}
}

func must[T any](value T, err error) T {
	check(err == nil, err)
	return value
}

// The signing hook: RFC 9421, over the body as it is sent.
func sign(_ context.Context, request *http.Request) error {
	base := fmt.Sprintf("\"@method\": %s\n\"@target-uri\": %s\n", request.Method, request.URL)
	covered := `"@method" "@target-uri"`
	if request.Body != nil {
		body := must(io.ReadAll(request.Body))
		request.Body = io.NopCloser(bytes.NewReader(body))
		sum := sha256.Sum256(body)
		digest := "sha-256=:" + base64.StdEncoding.EncodeToString(sum[:]) + ":"
		request.Header.Set("Content-Digest", digest)
		base += "\"content-digest\": " + digest + "\n"
		covered += ` "content-digest"`
	}
	nonce := make([]byte, 16)
	rand.Read(nonce)
	parameters := fmt.Sprintf("(%s);created=%d;nonce=\"%s\";keyid=\"default\"",
		covered, time.Now().Unix(), hex.EncodeToString(nonce))
	mac := hmac.New(sha256.New, bytes.TrimSpace(must(os.ReadFile(os.Getenv("GATEWAY_KEY_FILE")))))
	mac.Write([]byte(base + "\"@signature-params\": " + parameters))
	request.Header.Set("Signature-Input", "sig1="+parameters)
	request.Header.Set("Signature", "sig1=:"+base64.StdEncoding.EncodeToString(mac.Sum(nil))+":")
	return nil
}

func key() string {
	random := make([]byte, 32)
	rand.Read(random)
	return base64.StdEncoding.EncodeToString(random)
}

func main() {
	trusted := x509.NewCertPool()
	trusted.AppendCertsFromPEM(must(os.ReadFile(os.Getenv("GATEWAY_CERT"))))
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: trusted}}
	c := must(wggw.NewClientWithResponses(os.Getenv("GATEWAY_URL"),
		wggw.WithHTTPClient(&http.Client{Transport: transport}), wggw.WithRequestEditorFn(sign)))
	ctx, alice, bob, carol := context.Background(), key(), key(), key()

	both, quota, label := wggw.CreatePeerBodyProtocol("dual"), int64(3_000_000_000), "Alice"
	created := must(c.CreatePeerWithResponse(ctx, wggw.CreatePeerJSONRequestBody{
		PublicKey: &alice, Protocol: nullable.NewNullableWithValue(both),
		QuotaBytes: nullable.NewNullableWithValue(quota), Label: nullable.NewNullableWithValue(label),
	}))
	check(created.JSON200 != nil && *created.JSON200.Status == "created", string(created.Body))
	check(created.JSON200.QuotaBytes.MustGet() == quota, "quota_bytes")
	active, one := wggw.ListPeersParamsStatus("active"), 1
	listed := must(c.ListPeersWithResponse(ctx, &wggw.ListPeersParams{Status: &active, Limit: &one}))
	check(*listed.JSON200.Configurations[0].PublicKey == alice, string(listed.Body))
	got := must(c.GetPeerWithResponse(ctx, alice, nil))
	check(got.JSON200.AssignedIpv6.MustGet() == *created.JSON200.AssignedIpv6, string(got.Body))
	quick := wggw.GetPeerParamsFormat("wg-quick")
	text := must(c.GetPeerWithResponse(ctx, alice, &wggw.GetPeerParams{Format: &quick}))
	check(strings.HasPrefix(string(text.Body), "[Interface]"), string(text.Body))
	changed := must(c.UpdatePeerWithResponse(ctx, alice, wggw.UpdatePeerJSONRequestBody{
		Label: nullable.NewNullNullable[string](),
	}))
	check(changed.JSON200.Label.IsNull() && !changed.JSON200.QuotaBytes.IsNull(), string(changed.Body))
	rotated := must(c.RotatePeerWithResponse(ctx, alice, wggw.RotatePeerJSONRequestBody{NewPublicKey: bob}))
	check(rotated.JSON200.PublicKey == bob, string(rotated.Body))
	fresh := must(c.ResetQuotaWithResponse(ctx, bob))
	check(fresh.JSON200.QuotaUsed == 0, string(fresh.Body))
	for _, asked := range []string{"suspended", "active"} {
		said := map[string]string{"suspended": "suspended", "active": "updated"}[asked]
		status := must(c.SetPeerStatusWithResponse(ctx, bob,
			wggw.SetPeerStatusJSONRequestBody{Status: wggw.SetPeerStatusBodyStatus(asked)}))
		check(string(status.JSON200.Status) == said, string(status.Body))
	}
	done := must(c.RunBatchWithResponse(ctx, wggw.RunBatchJSONRequestBody{Operations: []wggw.BatchOperation{
		{Op: "create", PublicKey: carol}, {Op: "update", PublicKey: bob, QuotaBytes: nullable.NewNullNullable[int64]()},
		{Op: "delete", PublicKey: carol}, {Op: "delete", PublicKey: carol},
	}}))
	results := done.JSON200.Results
	check(len(results) == 4 && results[0].Status == "created" && results[3].Status == 404.0, string(done.Body))
	dry := true
	synced := must(c.SyncPeersWithResponse(ctx, &wggw.SyncPeersParams{DryRun: &dry},
		wggw.SyncPeersJSONRequestBody{{PublicKey: bob}}))
	check(synced.JSON200.Unchanged == 1, string(synced.Body))
	after, wait := int64(0), 1
	changes := must(c.ListChangesWithResponse(ctx, &wggw.ListChangesParams{After: &after, Wait: &wait}))
	check(changes.JSON200.Changes[0].Configuration.MustGet().PublicKey == bob, string(changes.Body))
	check(len(must(c.ListUsageWithResponse(ctx, nil)).JSON200.Usage) == 0, "usage")
	check(must(c.GetIpUsageWithResponse(ctx, nil)).JSON200.Ipv6.Total > 1e19, "addresses")
	check(must(c.SyncIpsWithResponse(ctx, nil)).JSON200.Status == "synced", "sync-ips")
	status := must(c.GetStatusWithResponse(ctx))
	check(status.JSON200.Status == "healthy" && status.JSON200.RemoteCopy.IsNull(), string(status.Body))
	check(must(c.GetServerMetricsWithResponse(ctx)).JSON200.Wireguard.TotalPeers == 1, "metrics")
	check(must(c.GetObfuscationWithResponse(ctx)).JSON200.ParametersVersion == 1, "obfuscation")
	yes := true
	spoken := must(c.RotateObfuscationWithResponse(ctx, wggw.RotateObfuscationJSONRequestBody{
		Confirm: nullable.NewNullableWithValue(yes)}))
	check(spoken.JSON200.ParametersVersion == 2, string(spoken.Body))
	snapshot := must(c.ExportSnapshotWithResponse(ctx)).Body
	check(bytes.HasPrefix(snapshot, []byte("SQLite format 3")), "snapshot")
	imported := must(c.ImportSnapshotWithBodyWithResponse(ctx, nil, "application/octet-stream", bytes.NewReader(snapshot)))
	check(imported.JSON200 != nil && imported.JSON200.TotalPeers == 1, string(imported.Body))
	check(must(c.DeletePeerWithResponse(ctx, bob)).JSON200.Status == "deleted", "delete")
	check(strings.Contains(must(c.DeletePeerWithResponse(ctx, bob)).ApplicationproblemJSON404.Detail, "key"), "a problem")
	check(must(c.GetMetricsWithResponse(ctx)).StatusCode() == 200, "/metrics")
	check(must(c.GetHealthWithResponse(ctx)).JSON200.Status == "alive", "/healthz")
	check(must(c.GetReadinessWithResponse(ctx)).JSON200.Status == "ready", "/readyz")
	check((*must(c.GetOpenapiWithResponse(ctx)).JSON200)["openapi"] == "3.1.0", "/openapi.json")
}
