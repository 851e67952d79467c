-- SPDX-License-Identifier: Apache-2.0
-- Makes wrk end with one line of JSON. Times in microseconds. Without a `response` function wrk
-- calls no Lua per request, so this costs the measurement nothing.
done = function(summary, latency)
    local errors = summary.errors
    io.write(string.format(
        '{"requests":%d,"duration":%d,"p50":%d,"p99":%d,"max":%d,"bytes":%.0f,' ..
        '"connect":%d,"read":%d,"write":%d,"status":%d,"timeout":%d,"errors":%d}\n',
        summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), latency.max,
        summary.bytes, errors.connect, errors.read, errors.write, errors.status, errors.timeout,
        errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
