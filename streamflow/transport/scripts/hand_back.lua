-- stage, worker, whether the attempt counts (0, 1), entries ...; without entries all that the worker has -> how many
local _, stage, worker, counts = unpack(ARGV, 1, 4)
local stream = stream_key(stage, C.revision)
local LONG_AGO_MS = 24 * 3600 * 1000
local lease_ms = math.floor(C.lease_s * 1000)
local handed_back = 0
go_on_when_full()

local function hand_back(pending)
  for _, item in ipairs(pending.err and {} or pending) do
    if item[2] == worker then
      -- At once, or a while later each time that it failed: what fails for a moment must not fail every attempt.
      local idle_ms, deliveries, whose = LONG_AGO_MS, item[4] - 1, UNTRIED
      if counts == '1' then
        idle_ms = math.max(0, lease_ms - math.floor(1000 * C.retry_s * 2 ^ deliveries))
        deliveries, whose = deliveries + 1, NOBODY
      end
      -- A consumer of nobody's, so that this worker does not take it for a delivery whose reply was lost.
      redis.call('XCLAIM', stream, GROUP, whose, 0, item[1], 'IDLE', idle_ms, 'RETRYCOUNT', deliveries, 'JUSTID')
      handed_back = handed_back + 1
    end
  end
end

if #ARGV == 4 then hand_back(redis.pcall('XPENDING', stream, GROUP, '-', '+', 100000, worker)) end
for i = 5, #ARGV do hand_back(redis.pcall('XPENDING', stream, GROUP, ARGV[i], ARGV[i], 1)) end
return handed_back
