-- SPDX-License-Identifier: Apache-2.0
-- Makes wrk end with one line of JSON. Times in microseconds.
done = function(summary, latency)
    local errors = summary.errors
    io.write(string.format(
        '{"requests":%d,"duration":%d,"p50":%d,"errors":%d}\n',
        summary.requests, summary.duration, latency:percentile(50),
        errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
