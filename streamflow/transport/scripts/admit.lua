-- id, digest, spec, images, tenant, timeout_s, priority, reserved_bytes, watch lease or '', trace, max_jobs, max_bytes
-- -> {'admitted' or 'attached', admitted_at, deadline_at} | {'exists'} | {'busy', retry_after_s, why}
local _, id, digest, spec, images, tenant, timeout_s, priority, reserved, watch_s, trace, max_jobs, max_bytes = unpack(ARGV)
local key = job_key(id)

local known = redis.call('HMGET', key, 'digest', 'admitted', 'deadline')
if known[1] then
  if known[1] ~= digest then return {'exists'} end
  return {'attached', known[2], known[3]}
end

-- First the write that is refused when memory is full.
local deadline, share = NOW + timeout_s, math.floor(reserved / images)
redis.call('HSET', key, 'digest', digest, 'spec', spec, 'images', images, 'left', images, 'tenant', tenant,
  'trace', trace, 'share', share, 'state', 'queued', 'revision', C.revision,
  'admitted', seconds(NOW), 'deadline', seconds(deadline))

local function refuse(why)
  redis.call('DEL', key)
  local gap = tonumber(redis.call('HGET', META, 'gap') or 0)
  local queued = redis.call('ZCARD', WAITING) + redis.call('SCARD', UNDER_WAY)
  return {'busy', seconds(math.min(60, math.max(1, gap * queued))), why}
end

local function excess()
  return (redis.call('HGET', META, 'reserved') or 0) + share * images - max_bytes
end

if redis.call('ZCARD', OPEN) >= tonumber(max_jobs) then return refuse('jobs') end
if excess() > 0 then
  -- Results that their client has read go first.
  for _, ref in ipairs(redis.call('ZRANGEBYSCORE', RESULTS, '-inf', NOW + C.delivered_s)) do
    if redis.call('HEXISTS', job_key(split_ref(ref)), 'delivered') == 1 then free_result(ref) end
    if excess() <= 0 then break end
  end
  if excess() > 0 then return refuse('bytes') end
end

redis.call('HINCRBY', META, 'reserved', share * images)
redis.call('ZADD', jobs_key(tenant), seconds(NOW), id)
redis.call('ZADD', OPEN, deadline, id)
if watch_s ~= '' then
  redis.call('HSET', key, 'watch_s', watch_s)
  redis.call('ZADD', WATCH, NOW + watch_s, id)
end
local rank = math.min(NOW - C.priority_weight_s * priority, deadline - C.urgent_s)
for index = 0, images - 1 do
  redis.call('HSET', key, 'i' .. index, 'waiting')
  redis.call('ZADD', WAITING, rank + index * 1e-6, id .. ':' .. index)
end
release()
return {'admitted', seconds(NOW), seconds(deadline)}
