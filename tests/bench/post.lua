-- A wrk script that POSTs the lines of a file in rotation. Its arguments are the file, then "statuses" to count answers
-- by status.
local requests, next_request, threads = {}, 0, {}

function setup(thread)
  threads[#threads + 1] = thread
end

function init(arguments)
  local headers = { ["Content-Type"] = "application/json" }
  for line in io.lines(arguments[1]) do
    requests[#requests + 1] = wrk.format("POST", nil, headers, line)
  end
  statuses = {}
  if arguments[2] == "statuses" then
    function response(status)
      statuses[status] = (statuses[status] or 0) + 1
    end
  end
end

function request()
  next_request = next_request % #requests + 1
  return requests[next_request]
end

function done(summary, latency)
  local errors = summary.errors
  print(string.format("RESULT requests=%d seconds=%.6f p50_us=%d p99_us=%d max_us=%d refused=%d broken=%d timeouts=%d",
    summary.requests, summary.duration / 1e6, latency:percentile(50), latency:percentile(99), latency.max,
    errors.status, errors.connect + errors.read + errors.write, errors.timeout))
  for _, thread in ipairs(threads) do
    for status, count in pairs(thread:get("statuses")) do
      print(string.format("STATUS %d=%d", status, count))
    end
  end
end
