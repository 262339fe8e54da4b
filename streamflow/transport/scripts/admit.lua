-- id, digest, spec, images, tenant, timeout_s, priority, work and bytes of an image, watch lease or '', trace, nonce,
-- most jobs, jobs of a tenant, bytes, bytes of a tenant or '', and images of a tenant in a minute (0 = any number),
-- whether it only looks (0, 1), then (sha256, bytes) for each blob that is stored with it
-- -> {'admitted' or 'attached', admitted_at, deadline_at} | {'exists'} | {'busy' or 'late', retry_after_s, why}
-- | {'open'} where it only looked
local _, id, digest, spec, images, tenant, timeout_s, priority, work, share, watch_s, trace = unpack(ARGV, 1, 12)
local nonce, max_jobs, max_tenant_jobs, max_bytes, max_tenant_bytes, per_minute, looks = unpack(ARGV, 13, 19)
local key = job_key(id)
images, per_minute = tonumber(images), tonumber(per_minute)

local known = redis.call('HMGET', key, 'digest', 'admitted', 'deadline', 'nonce')
if known[1] then
  if known[1] ~= digest then return {'exists'} end
  if redis.call('ZSCORE', OPEN, id) then
    go_on_when_full()
    -- Whoever leaves it to itself wants it made without being watched.
    if watch_s == '' then
      redis.call('HDEL', key, 'watch_s')
      redis.call('ZREM', WATCH, id)
    else
      redis.call('ZADD', WATCH, 'XX', NOW + watch_s, id)
    end
  end
  -- The same call again: its first answer was lost.
  return {nonce ~= '' and known[4] == nonce and 'admitted' or 'attached', known[2], known[3]}
end

-- First the write that is refused when memory is full.
local deadline = NOW + timeout_s
redis.call('HSET', key, 'digest', digest, 'spec', spec, 'images', images, 'left', images, 'tenant', tenant,
  'trace', trace, 'nonce', nonce, 'share', share, 'work', work, 'priority', priority, 'state', 'queued',
  'revision', C.revision, 'admitted', seconds(NOW), 'deadline', seconds(deadline))

local function refuse(kind, why, retry_after_s)
  redis.call('DEL', key)
  tally('refused:' .. (kind == 'busy' and why or kind))
  return {kind, seconds(math.min(60, math.max(1, retry_after_s))), why}
end

-- When the queue will have been worked off.
local function queue_s()
  return estimate(work_before(redis.call('ZCARD', WAITING)), 0, 1) or 0
end

-- Whether so many bytes are left in a sum, of one tenant or of all. Results that their client has read go first.
local function has_room(sum, most, whose)
  local function excess()
    return (redis.call('HGET', META, sum) or 0) + share * images - most
  end
  if excess() <= 0 then return true end
  for _, ref in ipairs(redis.call('ZRANGEBYSCORE', RESULTS, '-inf', NOW + C.delivered_s)) do
    local of = redis.call('HMGET', job_key(split_ref(ref)), 'delivered', 'tenant')
    if of[1] and (not whose or of[2] == whose) then free_result(ref) end
    if excess() <= 0 then return true end
  end
  return false
end

if redis.call('ZCARD', OPEN) >= tonumber(max_jobs) then return refuse('busy', 'jobs', queue_s()) end
if tonumber(redis.call('HGET', TENANTS, 'n:' .. tenant) or 0) >= tonumber(max_tenant_jobs) then
  return refuse('busy', 'tenant_jobs', queue_s())
end
local minute = 'm:' .. tenant
local paced = math.max(NOW, tonumber(redis.call('HGET', TENANTS, minute) or 0))
if per_minute > 0 then
  -- As if the images were made evenly: a minute's worth may come at once.
  paced = paced + 60 * images / per_minute
  if paced > NOW + 60 then return refuse('busy', 'rate', paced - NOW - 60) end
end
if max_tenant_bytes ~= '' and not has_room(reserved_by(tenant), max_tenant_bytes, tenant) then
  return refuse('busy', 'tenant_bytes', queue_s())
end
if not has_room('reserved', max_bytes) then return refuse('busy', 'bytes', queue_s()) end

-- Fair queuing: every image of a tenant moves its clock on by the time that it alone would take, and who is served
-- next is whose clock is behind. While nothing waits nobody is ahead of anybody.
local clock = 'q:' .. tenant
local waits = redis.call('ZCARD', WAITING) > 0
local start = math.max(NOW, waits and tonumber(redis.call('HGET', TENANTS, clock) or 0) or 0)
local busy, done = unpack(redis.call('HMGET', META, 'busy', 'done'))
local each_s = work * (tonumber(done or 0) > 0 and busy / done / num_slots() or C.work_s)
local function rank(index)
  return math.min(start + index * each_s - C.priority_weight_s * priority, deadline - C.urgent_s + index * 1e-6)
end

-- What cannot be done in time is refused at once, if the estimate can be relied on.
local before = redis.call('ZCOUNT', WAITING, '-inf', rank(0))
local expected_s, fresh, alone_s = estimate(work_before(before), work, images)
local allowed_s = timeout_s / C.headroom
if fresh and expected_s > allowed_s then
  if alone_s > allowed_s then return refuse('late', seconds(alone_s), 0) end
  return refuse('busy', 'work', expected_s - allowed_s)
end
if looks == '1' then
  redis.call('DEL', key)
  return {'open'}
end
if expected_s then redis.call('HSET', key, 'estimate', seconds(expected_s)) end

tally('admitted')
tally('admitted_images', images)
reserve(tenant, share * images)
local keep_ms = math.ceil((timeout_s + C.blob_margin_s) * 1000)
for i = 20, #ARGV, 2 do keep_blob(ARGV[i], keep_ms, ARGV[i + 1]) end
redis.call('ZADD', jobs_key(tenant), seconds(NOW), id)
redis.call('ZADD', OPEN, deadline, id)
redis.call('HINCRBY', TENANTS, 'n:' .. tenant, 1)
redis.call('HSET', TENANTS, clock, seconds(start + images * each_s))
if per_minute > 0 then redis.call('HSET', TENANTS, minute, seconds(paced)) end
if watch_s ~= '' then
  redis.call('HSET', key, 'watch_s', watch_s)
  redis.call('ZADD', WATCH, NOW + watch_s, id)
end
for index = 0, images - 1 do
  redis.call('HSET', key, 'i' .. index, 'waiting')
  redis.call('ZADD', WAITING, seconds(rank(index)), id .. ':' .. index)
end
add(META, 'waiting_work', work * images)
release()
return {'admitted', seconds(NOW), seconds(deadline)}
