-- For wrk: one chat request, and the figures as JSON. Arguments: MODEL TOKENS.

function init(arguments)
  local model, tokens = arguments[1] or "SmolLM2-135M-Instruct", arguments[2] or "5"
  wrk.method = "POST"
  wrk.headers["Content-Type"] = "application/json"
  wrk.body = string.format(
    '{"model": "%s", "messages": [{"role": "user", "content": "[[tokens=%s]]"}]}', model, tokens)
end

function done(summary, latency, requests)
  local errors = summary.errors
  print(string.format(
    '{"requests": %d, "requests_per_s": %.1f, "p50_ms": %.3f, "p95_ms": %.3f, "p99_ms": %.3f, "max_ms": %.3f, ' ..
    '"not_200": %d, "bad": %d}',
    summary.requests - errors.status, (summary.requests - errors.status) / (summary.duration / 1e6),
    latency:percentile(50) / 1000, latency:percentile(95) / 1000, latency:percentile(99) / 1000, latency.max / 1000,
    errors.status, errors.connect + errors.read + errors.write + errors.timeout))
end
