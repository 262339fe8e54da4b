-- most jobs to end in one call -> how many things were touched
local limit = ARGV[2]
local touched = 0
go_on_when_full()

local function due(key, what)
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', key, '-inf', NOW, 'LIMIT', 0, limit)) do
    what(member)
    touched = touched + 1
  end
end

-- What waits for a stage in which nobody is measures nothing.
local taking = {}
for _, value in ipairs(redis.call('HVALS', WORKERS)) do
  local lapses, stage, _, draining = registered(value)
  if lapses and stage and lapses > NOW and not draining then taking[stage] = true end
end
if not (taking.encode and taking.denoise and taking.decode) then
  redis.call('HSET', META, 'steady_since', seconds(NOW), 'last_done', seconds(NOW))
end

due(OPEN, end_late)

-- While nobody reaped, nobody could renew either; or the clock jumped.
local last = tonumber(redis.call('HGET', META, 'reaped') or NOW)
if math.abs(NOW - last) > C.reap_gap_s then
  redis.call('HSET', META, 'watch_grace', seconds(NOW + C.watch_grace_s), 'steady_since', seconds(NOW),
    'last_done', seconds(NOW))
end
redis.call('HSET', META, 'reaped', seconds(NOW))
if NOW >= tonumber(redis.call('HGET', META, 'watch_grace') or 0) then
  due(WATCH, function(id)
    end_job(id, 'cancelled', 'cancelled', {'CANCELLED', 'nobody watched the job any more', ''})
  end)
end

due(RESULTS, free_result)
due(ENDED, function(id)
  local tenant, images = unpack(redis.call('HMGET', job_key(id), 'tenant', 'images'))
  -- What is left of its results cannot be accounted for without it.
  for index = 0, (images or 0) - 1 do
    if redis.call('ZSCORE', RESULTS, id .. ':' .. index) then free_result(id .. ':' .. index) end
  end
  redis.call('ZREM', jobs_key(tenant or ''), id)
  -- Without a job there is nothing reserved: what replicas that did not count so yet left in the sum goes.
  if redis.call('ZCARD', jobs_key(tenant or '')) == 0 then redis.call('HDEL', META, reserved_by(tenant or '')) end
  redis.call('DEL', job_key(id))
  redis.call('ZREM', ENDED, id)
end)
-- Clocks in the past mean nothing.
local tenants = redis.call('HGETALL', TENANTS)
for i = 1, #tenants, 2 do
  if string.sub(tenants[i], 1, 2) ~= 'n:' and tonumber(tenants[i + 1]) < NOW then redis.call('HDEL', TENANTS, tenants[i]) end
end
local workers = redis.call('HGETALL', WORKERS)
for i = 1, #workers, 2 do
  if (registered(workers[i + 1]) or 0) + C.dead_worker_s < NOW then
    forget_worker(workers[i])
    touched = touched + 1
  end
end
touched = touched + evict_cached()
redis.call('XTRIM', DEAD, 'MINID', math.floor((NOW - C.dead_entries_s) * 1000))
release()
return touched
