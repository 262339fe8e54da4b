-- What the scripts share; put before each of them. A script is atomic, and so is its trace in the append-only file.
--
-- An image is in one place, field i<n> of its job: 'waiting', '<stage>:<entry id>', or how it ended. Every hand-over
-- compares and sets that field, so it happens once whoever comes late. An image that ended has no entry anywhere.

local META, WAITING, UNDER_WAY, OPEN, WATCH, ENDED, RESULTS, CACHE, WORKERS, DEAD, TENANTS, GPUS = unpack(KEYS)
local C = cjson.decode(ARGV[1])
local GROUP = 'workers'
-- Of what was handed back: after a failure, and for no fault of anybody's.
local NOBODY, UNTRIED = 'nobody', 'untried'
local ENDS, MAX_ENDS_BYTES = 'ends', 2 ^ 18

local time = redis.call('TIME')
local NOW = time[1] + time[2] / 1e6

-- A script whose first write is allowed when memory is full may write the rest as well: so admitted work drains.
local function go_on_when_full()
  redis.call('HDEL', META, '_')
end

-- Counts what happens, for the deployment's metrics: with the move itself, so once, whoever does it and however often.
local function tally(what, by)
  redis.call('HINCRBY', META, 'total:' .. what, by or 1)
end

local function seconds(value)
  return string.format('%.6f', value)
end

local function job_key(id)
  return C.prefix .. 'job:' .. id
end

local function jobs_key(tenant)
  return C.prefix .. 'jobs:' .. tenant
end

local function result_key(id, index)
  return C.prefix .. 'res:' .. id .. ':' .. index
end

local function stream_key(stage, revision)
  return C.prefix .. stage .. (revision ~= '' and ':' .. revision or '')
end

local function split_ref(ref)
  return string.match(ref, '^(.*):(%d+)$')
end

local function wake(id)
  redis.call('PUBLISH', C.prefix .. 'ev:' .. id, '')
end

local function place(id, index)
  return redis.call('HGET', job_key(id), 'i' .. index)
end

local function is_live(where)
  return where and (where == 'waiting' or string.find(where, ':', 1, true) ~= nil)
end

-- Remembers whose the last move of an image was, from which entry.
local function note_move(id, index, from, entry, worker)
  redis.call('HSET', job_key(id), 'm' .. index, from .. ':' .. entry .. ' ' .. worker)
end

-- For a move that comes too late: 1 where this worker made the very same one, and only the answer was lost.
local function made_before(id, index, from, entry, worker)
  local made = redis.call('HGET', job_key(id), 'm' .. index)
  return worker ~= '' and made == from .. ':' .. entry .. ' ' .. worker and 1 or 0
end

local function discard(stream, entry)
  redis.call('XACK', stream, GROUP, entry)
  redis.call('XDEL', stream, entry)
end

-- Puts an image on a stage's stream, and its place with it. `payload` is a flat list of names and values.
local function enqueue(id, index, stage, payload)
  local job = redis.call('HMGET', job_key(id), 'revision', 'deadline', 'trace')
  local entry = redis.call('XADD', stream_key(stage, job[1]), '*', 'v', 1, 'job', id, 'index', index,
    'deadline', job[2], 'trace', job[3], unpack(payload))
  redis.call('HSET', job_key(id), 'i' .. index, stage .. ':' .. entry)
end

-- When a worker's lease lapses, its stage, its slots, and whether it drains; nothing where somebody else wrote the value.
local function registered(value)
  local lapses, stage, slots, draining =
    string.match(value, '^(%S+) {"stage": "(%l+)", "slots": (%d+), "draining": (%l+),')
  if lapses then return tonumber(lapses), stage, tonumber(slots), draining == 'true' end
  -- As replicas wrote it before. Decoding all that many workers say would take most of a script's time.
  local said
  lapses, said = string.match(value, '^(%S+) (.*)$')
  local readable, info = pcall(cjson.decode, said)
  if readable and type(info) == 'table' then
    return tonumber(lapses), info.stage, tonumber(info.slots) or 0, info.draining
  end
end

-- Of the live denoisers; half of the least window while there are none.
local function num_slots()
  local slots = 0
  for _, value in ipairs(redis.call('HVALS', WORKERS)) do
    local lapses, stage, has, draining = registered(value)
    if lapses and lapses > NOW and stage == 'denoise' and not draining then slots = slots + has end
  end
  return slots > 0 and slots or C.min_window / 2
end

local function add(key, field, amount)
  redis.call('HINCRBYFLOAT', key, field, string.format('%.9g', amount))
end

-- Images that were under way among about as many others are measured together: 1, 2 or 3, 4 to 7 ... of them.
local function class(load)
  local _, exponent = math.frexp(math.max(1, load))
  return exponent - 1
end

local SUMS = {'n', 'w', 't', 'ww', 'wt', 'x', 'at'}

-- How long an image of this work took in a class, among how many on average, and when the last one ended.
local function measured(number, work)
  local fields = {}
  for i, name in ipairs(SUMS) do fields[i] = name .. number end
  local sums = redis.call('HMGET', META, unpack(fields))
  if not sums[1] then return end
  for i = 1, #sums do sums[i] = tonumber(sums[i]) end
  local n, w, t, ww, wt, x, at = unpack(sums)
  -- A line through the measured images; through the origin where they were all alike.
  local slope, variance, covariance = t / w, ww / n - (w / n) ^ 2, wt / n - w / n * t / n
  if variance > 0.01 * (w / n) ^ 2 and covariance > 0 then slope = covariance / variance end
  return math.max(0, t / n + slope * (work - w / n)), x / n, at
end

-- How long an image of this work is under way among `load`, and when that was measured. Where it was not, the least that
-- it can be: as long as among fewer, and its share of what more of them took.
local function image_s(work, load)
  local time, _, at = measured(class(load), work)
  if time then return time, at end
  local least, latest = nil, 0
  for number = 0, 12 do
    local there, among, when = measured(number, work)
    if there then
      least = math.max(least or 0, number < class(load) and there or there * load / among)
      latest = math.max(latest, when)
    end
  end
  return least, latest
end

-- How long the last of some images of one job will take, with `ahead` units of work waiting before the first; whether
-- that is measured and not old; and how long they would take if nobody else were there. Nothing before the first
-- measurement.
local function estimate(ahead, work, images)
  local slots, under_way = num_slots(), redis.call('SCARD', UNDER_WAY)
  local window = 2 * slots
  local time, at = image_s(work, ahead > 0 and window or math.min(window, under_way + images))
  if not time then return nil, false end
  local busy, done = unpack(redis.call('HMGET', META, 'busy', 'done'))
  -- What waits for the window, at the rate of a server whose slots are all in use.
  local function queue_s(before, waiting)
    return tonumber(done or 0) > 0 and (before + work * math.max(0, waiting)) * busy / done / slots or 0
  end
  return queue_s(ahead, ahead > 0 and images - 1 or under_way + images - window) + time, NOW - at < C.fresh_s,
    queue_s(0, images - window) + image_s(work, math.min(window, images))
end

-- Adds an image that is under way to the sums of its class, in which it counts less with every one that follows, and to
-- the slot-seconds (busy) that work (done) takes while every slot is in use.
local function measure(id, index, is_done)
  local work, released, load = unpack(redis.call('HMGET', job_key(id), 'work', 'r' .. index, 'l' .. index))
  local reaped, steady_since, last_done, full_since = unpack(
    redis.call('HMGET', META, 'reaped', 'steady_since', 'last_done', 'full_since'))
  released = tonumber(released)
  if is_done then redis.call('HSET', META, 'last_done', seconds(NOW)) end
  -- A clock that jumped has measured nothing. Somebody reaps every second, and notes when.
  if math.abs(NOW - (reaped or NOW)) > C.reap_gap_s or not released or released > NOW
    or released < tonumber(steady_since or 0) then
    return
  end
  local time, slots, under_way = NOW - released, num_slots(), redis.call('SCARD', UNDER_WAY)
  local x = ((load or under_way) + under_way) / 2
  local number = class(x)
  -- What did not end says only that it takes longer.
  if not is_done and (measured(number, work) or 0) > time then return end
  local terms = {n = 1, w = work, t = time, ww = work * work, wt = work * time, x = x}
  local function add_term(field, term)
    redis.call('HSET', META, field, string.format('%.9g', C.memory * (redis.call('HGET', META, field) or 0) + term))
  end
  for name, term in pairs(terms) do add_term(name .. number, term) end
  redis.call('HSET', META, 'at' .. number, seconds(NOW))
  if is_done and under_way >= slots then
    add_term('busy', slots * math.max(0, NOW - math.max(last_done or NOW, full_since or 0)))
    add_term('done', work)
  end
end

-- What the work of a queue adds up to: an image's share of the sum, since images in it may differ.
local function work_before(rank)
  local count = redis.call('ZCARD', WAITING)
  return count > 0 and (redis.call('HGET', META, 'waiting_work') or 0) * rank / count or 0
end

-- Takes an image out of the queue; whether it was there.
local function leave_queue(ref, work)
  if redis.call('ZREM', WAITING, ref) == 0 then return end
  -- The sum is started anew whenever it can be, so that rounding does not add up.
  if redis.call('ZCARD', WAITING) == 0 then
    redis.call('HDEL', META, 'waiting_work')
  else
    add(META, 'waiting_work', -work)
  end
end

-- Lets waiting images into the stages while fewer than a window are under way.
local function release()
  if redis.call('ZCARD', WAITING) == 0 then return end
  local under_way = redis.call('SCARD', UNDER_WAY)
  -- The rate is measured over busy time only.
  if under_way == 0 then redis.call('HSET', META, 'last_done', seconds(NOW)) end
  local slots = num_slots()
  for number = under_way + 1, 2 * slots do
    local ref = redis.call('ZRANGE', WAITING, 0, 0)[1]
    if not ref then return end
    if number == slots then redis.call('HSET', META, 'full_since', seconds(NOW)) end
    local id, index = split_ref(ref)
    enqueue(id, index, 'encode', {})
    leave_queue(ref, redis.call('HGET', job_key(id), 'work'))
    redis.call('SADD', UNDER_WAY, ref)
    redis.call('HSET', job_key(id), 'state', 'running', 'r' .. index, seconds(NOW), 'l' .. index, number)
    wake(id)
  end
end

-- The field in which a tenant's part of what is reserved is kept.
local function reserved_by(tenant)
  return 'reserved:' .. tenant
end

-- Counts bytes that results of a tenant take or may take; back again with a negative number.
local function reserve(tenant, bytes)
  redis.call('HINCRBY', META, 'reserved', bytes)
  local sum = reserved_by(tenant)
  -- Below 0 where a replica that did not count so yet admitted the job.
  if redis.call('HINCRBY', META, sum, bytes) <= 0 then redis.call('HDEL', META, sum) end
end

-- Stores bytes under their hash, or sees to it that those which are there stay; whether they are there.
local function keep_blob(sha256, keep_ms, data)
  local key = C.prefix .. 'blob:' .. sha256
  local left_ms = redis.call('PTTL', key)
  if left_ms == -2 and not data then return 0 end
  if left_ms == -2 then
    redis.call('SET', key, data, 'PX', keep_ms)
  elseif left_ms < tonumber(keep_ms) then
    -- Other jobs may need it longer: the expiry is only ever moved on.
    redis.call('PEXPIRE', key, keep_ms)
  end
  return 1
end

-- Takes an image out of wherever it is. Gives back what was reserved beyond the bytes that are stored.
local function end_image(id, index, state, stored_bytes)
  local key, ref = job_key(id), id .. ':' .. index
  local job = redis.call('HMGET', key, 'i' .. index, 'revision', 'share', 'work', 'tenant')
  local stage, entry = string.match(job[1], '^(%l+):(.+)$')
  if stage then discard(stream_key(stage, job[2]), entry) end
  leave_queue(ref, job[4])
  redis.call('SREM', UNDER_WAY, ref)
  redis.call('HSET', key, 'i' .. index, state)
  reserve(job[5], (stored_bytes or 0) - job[3])
  tally('images:' .. state)
  return redis.call('HINCRBY', key, 'left', -1)
end

local function keep_result(id, index, keep_s)
  redis.call('PEXPIRE', result_key(id, index), math.ceil(keep_s * 1000))
  redis.call('ZADD', RESULTS, NOW + keep_s, id .. ':' .. index)
end

local function free_result(ref)
  local id, index = split_ref(ref)
  redis.call('DEL', result_key(id, index))
  local bytes, tenant = unpack(redis.call('HMGET', job_key(id), 'b' .. index, 'tenant'))
  -- Not a negated 0, which Redis does not take for an integer.
  if bytes then reserve(tenant, 0 - bytes) end
  redis.call('HDEL', job_key(id), 'b' .. index)
  redis.call('ZREM', RESULTS, ref)
end

-- Notes an end for whichever gateway asks next. Where none has asked for long, what cannot be noted is not told.
local function note_end(id, state)
  local ends = redis.call('HGET', META, ENDS) or ''
  if #ends > MAX_ENDS_BYTES then return end
  local took_s = NOW - (redis.call('HGET', job_key(id), 'admitted') or NOW)
  redis.call('HSET', META, ENDS, string.format('%s%s %s %.3f\n', ends, id, state, took_s))
end

-- Makes a job terminal: what is left of it becomes `rest`, results get their expiry.
local function end_job(id, state, rest, failure)
  local key = job_key(id)
  local in_work = false
  for index = 0, redis.call('HGET', key, 'images') - 1 do
    local where = place(id, index)
    if is_live(where) then
      in_work = in_work or where ~= 'waiting'
      end_image(id, index, rest)
    end
    if where == 'done' then keep_result(id, index, C.result_s) end
  end
  if in_work then redis.call('PUBLISH', C.prefix .. 'ended_jobs', id) end
  redis.call('HSET', key, 'state', state, 'finished', seconds(NOW))
  tally('ended:' .. state)
  note_end(id, state)
  if failure then
    redis.call('HSET', key, 'code', failure[1], 'message', failure[2], 'stage', failure[3])
  end
  if redis.call('ZREM', OPEN, id) == 1 then
    local count = 'n:' .. redis.call('HGET', key, 'tenant')
    if redis.call('HINCRBY', TENANTS, count, -1) <= 0 then redis.call('HDEL', TENANTS, count) end
  end
  redis.call('ZREM', WATCH, id)
  redis.call('ZADD', ENDED, NOW + C.tombstone_s, id)
  wake(id)
  release()
end

-- Ends a job whose deadline has passed.
local function end_late(id)
  -- Or nobody would learn from what never ends in time.
  for index = 0, redis.call('HGET', job_key(id), 'images') - 1 do
    local where = place(id, index)
    if is_live(where) and where ~= 'waiting' then measure(id, index, false) end
  end
  end_job(id, 'deadline', 'deadline', {'DEADLINE_EXCEEDED', 'the deadline passed before every image was finished', ''})
end

-- Cached values that expired go, and then those that will expire first until the rest fits.
local function evict_cached()
  local bytes = tonumber(redis.call('HGET', META, 'cached_bytes') or 0)
  local count = 0
  while true do
    local first = redis.call('ZRANGE', CACHE, 0, 0, 'WITHSCORES')
    if not first[1] or (tonumber(first[2]) > NOW and bytes <= C.max_cached_bytes) then break end
    local name = C.prefix .. 'cached:' .. first[1]
    bytes = bytes - redis.call('STRLEN', name)
    redis.call('DEL', name)
    redis.call('ZREM', CACHE, first[1])
    count = count + 1
  end
  if count > 0 then redis.call('HSET', META, 'cached_bytes', bytes) end
  return count
end

-- A consumer may be deleted only when nothing is pending for it: deleting erases what is.
local function forget_worker(worker)
  local value = redis.call('HGET', WORKERS, worker)
  if not value then return end
  local _, stage = registered(value)
  if type(stage) == 'string' then
    local stream = stream_key(stage, C.revision)
    local pending = redis.pcall('XPENDING', stream, GROUP, '-', '+', 1, worker)
    -- Later, then: whoever reaps next asks again.
    if #pending > 0 then return end
    if not pending.err then redis.call('XGROUP', 'DELCONSUMER', stream, GROUP, worker) end
  end
  redis.call('HDEL', WORKERS, worker)
end

