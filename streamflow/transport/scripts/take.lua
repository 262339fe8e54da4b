-- stage, service, worker, count, lease_ms, max_deliveries, entry ids in hand ...
-- -> {now, {{id, attempt, fields} ...}, last id read, 1 if what never failed is left to others}
local _, stage, service, worker, count, lease_ms, max_deliveries = unpack(ARGV, 1, 7)
local stream = stream_key(stage, C.revision)
count, max_deliveries = tonumber(count), tonumber(max_deliveries)
local in_hand, num_in_hand = {}, #ARGV - 7
for i = 8, #ARGV do in_hand[ARGV[i]] = true end

go_on_when_full()
release()

local function pending(...)
  local reply = redis.pcall('XPENDING', stream, GROUP, ...)
  if not reply.err then return reply end
  if not string.find(reply.err, 'NOGROUP', 1, true) then error(reply.err) end
  -- From 0, so that nothing that is in the stream is left out.
  redis.call('XGROUP', 'CREATE', stream, GROUP, 0, 'MKSTREAM')
  return {}
end

-- What is ours without our knowing, because a reply was lost and nothing of it was begun, and what nobody beat for a
-- lease; with how often it failed, and whether it did since it was last taken. What is in hand still is not given out
-- anew: it may have been handed back, and the call whose answer was lost be repeated.
local candidates, suspects, alone = {}, false, false
for _, item in ipairs(pending('-', '+', num_in_hand + count, worker)) do
  local id, deliveries = item[1], item[4]
  if in_hand[id] then
    suspects, alone = suspects or deliveries > 1, alone or deliveries >= max_deliveries
  else
    candidates[#candidates + 1] = {id, deliveries - 1, false}
  end
end
for _, item in ipairs(pending('IDLE', lease_ms, '-', '+', num_in_hand + count)) do
  local id, whose, _, deliveries = unpack(item)
  if whose ~= worker and not in_hand[id] then candidates[#candidates + 1] = {id, deliveries, whose ~= UNTRIED} end
end

-- Whoever else writes to the stream must not stop the stage.
local function is_well_formed(fields)
  return fields.v == '1' and fields.trace and string.find(fields.job or '', '^[%w._~-]+$')
    and string.find(fields.index or '', '^%d%d?%d?%d?$') and #(fields.deadline or '') < 20
    and string.find(fields.deadline or '', '^%d+%.?%d*$')
end

-- The fields of an entry that is still its image's place; others are acknowledged here.
local function current(id)
  local entry = redis.call('XRANGE', stream, id, id)[1]
  if entry then
    local fields = {}
    for i = 1, #entry[2], 2 do fields[entry[2][i]] = entry[2][i + 1] end
    if is_well_formed(fields) and place(fields.job, fields.index) == stage .. ':' .. id then return entry[2], fields end
  end
  discard(stream, id)
end

local function give_up(id, fields, deliveries)
  local message = 'the ' .. service .. ' did not finish this image in ' .. deliveries .. ' attempts'
  local job = redis.call('HMGET', job_key(fields.job), 'tenant', 'spec')
  redis.call('XADD', DEAD, 'MAXLEN', C.max_dead, '*', 'job', fields.job, 'index', fields.index, 'stage', service,
    'attempts', deliveries, 'reason', message, 'tenant', job[1], 'spec', job[2])
  tally('given_up:' .. stage)
  end_image(fields.job, fields.index, 'error')
  end_job(fields.job, 'error', 'cancelled', {'INTERNAL', message, service})
end

-- Where the next entry will be after.
local function last_read()
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local about = {}
    for i = 1, #group, 2 do about[group[i]] = group[i + 1] end
    if about.name == GROUP then return about['last-delivered-id'] end
  end
end

-- One worker at a time empties its hands for a last attempt: the field says who, and until when it is believed.
local cleared = 'cleared:' .. stream
local function clears_its_hands()
  local who, until_s = string.match(redis.call('HGET', META, cleared) or '', '^(%S+) (%S+)$')
  if who and who ~= worker and tonumber(until_s) > NOW then return false end
  redis.call('HSET', META, cleared, worker .. ' ' .. seconds(NOW + C.lease_s))
  return true
end

-- What failed before may have ended its worker. In its second attempt it keeps the worker from taking what never failed,
-- and it is never in hand with anything in its last one: so nobody innocent is given up, and a worker's many images do
-- not wait for each other.
local taken, waits = {}, false
for _, candidate in ipairs(candidates) do
  local id, failures = candidate[1], candidate[2]
  local suspect, last = failures > 0, failures > 0 and failures + 1 >= max_deliveries
  local raw, fields = current(id)
  if raw and failures >= max_deliveries then
    -- A job that no gateway of ours wrote cannot be ended either.
    if not pcall(give_up, id, fields, failures) then discard(stream, id) end
  elseif raw and last and num_in_hand + #taken > 0 then
    waits = waits or not alone and clears_its_hands()
  elseif raw and #taken < count and not alone and (suspect or not suspects) then
    redis.call('XCLAIM', stream, GROUP, worker, 0, id, 'RETRYCOUNT', failures + 1, 'JUSTID')
    taken[#taken + 1] = {id, failures + 1, raw}
    if candidate[3] then tally('redelivered:' .. stage) end
    suspects, alone = suspects or suspect, last
    if last then redis.call('HDEL', META, cleared) end
  end
end

local reads = not suspects and not waits
if #taken < count and reads then
  local reply = redis.call('XREADGROUP', 'GROUP', GROUP, worker, 'COUNT', count - #taken, 'STREAMS', stream, '>')
  for _, entry in ipairs(reply and reply[1][2] or {}) do
    -- After the group was lost, what is in hand comes once more.
    local raw = not in_hand[entry[1]] and current(entry[1])
    if raw then taken[#taken + 1] = {entry[1], 1, raw} end
  end
end
return {seconds(NOW), taken, last_read(), reads and 0 or 1}
