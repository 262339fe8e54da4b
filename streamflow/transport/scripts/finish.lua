-- job, index, stage, entry, then the result, or code, message and service of a failure -> 0 or 1
local _, id, index, stage, entry, result, message, service = unpack(ARGV)
go_on_when_full()
if place(id, index) ~= stage .. ':' .. entry then
  discard(stream_key(stage, C.revision), entry)
  return 0
end
if message then
  end_image(id, index, 'error')
  end_job(id, 'error', 'cancelled', {result, message, service})
  return 1
end
-- What estimates are made of, as sums in which an image counts less with every one that follows: how long images took
-- (t) with their work (w), and the slot-seconds (busy) that work (done) took while every slot was in use.
local function measure()
  local work, released = unpack(redis.call('HMGET', job_key(id), 'work', 'r' .. index))
  local reaped, steady_since = unpack(redis.call('HMGET', META, 'reaped', 'steady_since'))
  released = tonumber(released)
  -- A clock that jumped has measured nothing. Somebody reaps every second, and notes when.
  if math.abs(NOW - (reaped or NOW)) > C.reap_gap_s or not released or released > NOW
    or released < tonumber(steady_since or 0) then
    redis.call('HSET', META, 'last_done', seconds(NOW))
    return
  end
  local time = NOW - released
  local terms = {n = 1, w = work, t = time, ww = work * work, wt = work * time}
  local slots = num_slots()
  if redis.call('SCARD', UNDER_WAY) >= slots then
    local last_done, full_since = unpack(redis.call('HMGET', META, 'last_done', 'full_since'))
    terms.busy = slots * math.max(0, NOW - math.max(last_done or NOW, full_since or 0))
    terms.done = work
  end
  for name, term in pairs(terms) do
    local before = redis.call('HGET', META, name) or 0
    redis.call('HSET', META, name, string.format('%.9g', C.memory * before + term))
  end
  redis.call('HSET', META, 'last_done', seconds(NOW), 'measured', seconds(NOW))
end

measure()
redis.call('SET', result_key(id, index), result)
redis.call('HSET', job_key(id), 'b' .. index, #result)
local left = end_image(id, index, 'done', #result)
if left == 0 then
  end_job(id, 'images', 'cancelled')
else
  wake(id)
  release()
end
return 1
